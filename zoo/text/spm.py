"""Reading a SentencePiece `tokenizer.model` of Llama's kind into the `tokenizers` library.

`sentencepiece` reads the file; the vocabulary and its merges then run in `tokenizers`, so that
special tokens inside a text, streaming and saving work as for every other tokenizer here.
"""

from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space inside a piece

# Both readings must agree on this and on a sample of the vocabulary before we trust ours.
_PROBE = "Hello  world!\n\tfor i in range(10): x[i] += 3.14\r\nÀ la carte, 你好, naïve 🙂🙃 x²"


class SentencePiece(NamedTuple):
    """A converted tokenizer, and which of bos, eos, unk and pad it has, as text."""

    backend: Backend
    special: dict[str, str]


def read_spm(path: Path, *, legacy: bool) -> SentencePiece:
    """Convert a BPE `tokenizer.model`; ValueError if it is broken or of another kind.

    Args:
        path: the SentencePiece model file.
        legacy: whether the text after each special token starts with a space of its own, as in
            Llama 2's published tokenizer.json, and not only the text at the very start.
    """
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable SentencePiece model: {reason}") from None
    ids = list(range(processor.GetPieceSize()))
    pieces = processor.IdToPiece(ids)
    control, unknown = processor.IsControl(ids), processor.IsUnknown(ids)
    special = [p for p, c, u in zip(pieces, control, unknown, strict=True) if c or u]
    byte = [p for p, b in zip(pieces, processor.IsByte(ids), strict=True) if b]
    unknown_piece = pieces[processor.unk_id()]
    scores = processor.GetScore(ids)
    backend = Backend(bpe(pieces, scores, whole=special, byte=byte, unknown=unknown_piece))
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first", split=False
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in special])
    sample = "".join(
        p for p in pieces[:: max(1, len(pieces) // 2000)] if p not in {*special, *byte}
    )
    for text in (_PROBE, "a" + sample.replace(SPACE, " ")):
        if backend.encode(text, add_special_tokens=False).ids != processor.EncodeAsIds(text):
            raise ValueError(
                f"{path} is not a BPE model of Llama's kind; convert it to tokenizer.json with "
                "transformers (AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW))"
            )
    named = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
        "pad_token": processor.pad_id(),
    }
    return SentencePiece(backend, {name: pieces[i] for name, i in named.items() if i >= 0})


def bpe(
    pieces: list[str], scores: list[float], *, whole: list[str], byte: list[str], unknown: str
) -> models.BPE:
    """SentencePiece's BPE model.

    Args:
        pieces: the vocabulary in the order of ids.
        scores: of each piece; the best one is merged first.
        whole: pieces that are found as a whole, and no merges lead to.
        byte: those that spell bytes.
        unknown: the piece for what has no other.
    """
    return models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=_merges(pieces, scores, skip={*whole, *byte}),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=bool(byte),
    )


def _merges(pieces: list[str], scores: list[float], skip: set[str]) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, best score first: how SentencePiece merges."""
    known = set(pieces) - skip
    by_rank = sorted(range(len(pieces)), key=lambda i: -scores[i])
    return [
        (piece[:cut], piece[cut:])
        for piece in (pieces[i] for i in by_rank if pieces[i] not in skip)
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
