"""The tokenizer inside a GGUF file: byte-level BPE, or SentencePiece's BPE as Gemma has it.

For byte-level BPE, a GGUF holds vocabulary, merges and the name of a pre-tokenizer, whose regular
expressions are llama.cpp's: each splits further what the ones before it left. For SentencePiece
("llama") it holds pieces and their scores. Other tokenizers (unknown pre-tokenizers, SentencePiece
with a space of its own before a text) are read from a tokenizer.json or tokenizer.model beside the
file.
"""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from zoo.text.spm import SPACE, bpe
from zoo.text.tokenizer import Tokenizer, prepend_bos

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9]{3}"),
}
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # values of tokenizer.ggml.token_type


def gguf_tokenizer(metadata: Mapping[str, object], path: Path) -> Tokenizer | None:
    """The tokenizer of the GGUF file at `path`, None if neither it nor its folder has one.

    Raises:
        ValueError: a kind that is not supported here, without a tokenizer file beside it.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and pre in _SPLITS:
        return _tokenizer(_byte_level(metadata, str(pre), path), metadata, path)
    if kind == "llama" and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        return _tokenizer(_sentencepiece(metadata, path), metadata, path)
    beside = Tokenizer.from_folder(path.parent)
    if beside is None and kind is not None:
        raise ValueError(
            f"{path} has a tokenizer of kind {kind!r} with pre-tokenizer {pre!r}, supported are "
            f"'gpt2' with {', '.join(_SPLITS)}, and 'llama' without a space before the text; "
            "put the model's tokenizer.json beside the file"
        )
    return beside


def _byte_level(metadata: Mapping[str, object], pre: str, path: Path) -> Backend:
    tokens = _strings(metadata, "tokenizer.ggml.tokens", path)
    merges = _strings(metadata, "tokenizer.ggml.merges", path)
    llama3 = pre == "llama-bpe"
    try:
        # Llama 3 takes a word that is in the vocabulary whole, even where merges miss it.
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, _, right in (m.partition(" ") for m in merges)],
            ignore_merges=llama3,
        )
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{path} has a vocabulary that does not fit its merges: {error}"
        ) from None
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, object], path: Path) -> Backend:
    tokens, scores = _strings(metadata, "tokenizer.ggml.tokens", path), _scores(metadata, path)
    found = _of_kinds(metadata, tokens, _CONTROL, _USER_DEFINED, _BYTE)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if len(scores) != len(tokens):
        raise ValueError(f"{path} has {len(tokens)} tokens, but {len(scores)} scores")
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise ValueError(f"{path} has no unknown token: {unknown!r}")
    backend = Backend(
        bpe(
            tokens,
            scores,
            whole=found[_CONTROL] + found[_USER_DEFINED],
            byte=found[_BYTE],
            unknown=tokens[unknown],
        )
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _tokenizer(backend: Backend, metadata: Mapping[str, object], path: Path) -> Tokenizer:
    """What all kinds have: special tokens, bos in front of a text, a chat template."""
    tokens = _strings(metadata, "tokenizer.ggml.tokens", path)
    llama3 = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    found = _of_kinds(metadata, tokens, _CONTROL, _USER_DEFINED)
    # All at once: each call looks through all of them.
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in found[_CONTROL]]
    )
    backend.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in found[_USER_DEFINED]]
    )

    def ids(*names: str) -> list[int]:
        values = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
        return [v for v in values if isinstance(v, int) and 0 <= v < len(tokens)]

    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{ours}_token": tokens[i] for ours, theirs in named.items() for i in ids(theirs)}
    if metadata.get("tokenizer.ggml.add_bos_token", llama3) is True:
        prepend_bos(backend, special.get("bos_token"))
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        special=special,
        eos_ids=ids("eos", "eot"),
        chat_template=template if isinstance(template, str) else None,
    )


def _of_kinds(
    metadata: Mapping[str, object], tokens: list[str], *kinds: int
) -> dict[int, list[str]]:
    """The tokens of each kind, in the order of ids."""
    stored = metadata.get("tokenizer.ggml.token_type")
    pairs = list(zip(tokens, stored if isinstance(stored, list) else [], strict=False))
    return {kind: [token for token, found in pairs if found == kind] for kind in kinds}


def _scores(metadata: Mapping[str, object], path: Path) -> list[float]:
    values = metadata.get("tokenizer.ggml.scores")
    if not isinstance(values, list) or not all(isinstance(value, float) for value in values):
        raise ValueError(f"{path} has no list of numbers tokenizer.ggml.scores")
    return values


def _strings(metadata: Mapping[str, object], key: str, path: Path) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{path} has no list of strings {key}")
    return values
