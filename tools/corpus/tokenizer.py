"""train_tokenizer: a SentencePiece tokenizer of a corpus, as a folder that models have.

BPE of Llama's kind: a word begins with its blank, digits stand alone, what the vocabulary lacks is
spelled in bytes, and texts are not normalised. A newline is always one token. Pieces 0 to 3 are
<unk>, <s>, </s> and <pad>.
"""

import io
import json
import string
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from zoo import Tokenizer
from zoo.weights.atomic import replacing_folder, write_text

MODEL_FILE = "tokenizer.model"
_FILES = (MODEL_FILE, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_BYTES = 256
_LONGEST = 1 << 20  # bytes; SentencePiece leaves longer documents out, by default those of 4 KB


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Trains a tokenizer and writes it; an earlier one in the folder is replaced in one step.

    The same texts in the same order give the same files.

    Args:
        texts: of documents.
        vocab_size: of pieces, all kinds together.
        folder: made if missing.

    Returns:
        The tokenizer, as read from the folder.

    Raises:
        ValueError: in one line, a vocabulary too small for the letters of the texts or too large
            for their words, or a folder that holds something else.
    """
    if vocab_size <= _BYTES:
        raise ValueError(
            f"vocab_size must be more than {_BYTES}, one for each byte, not {vocab_size}"
        )
    if folder.is_dir():
        others = [path.name for path in sorted(folder.iterdir()) if path.name not in _FILES]
        if others:
            raise ValueError(
                f"will not replace {folder}, which holds {others[0]}; name a new folder"
            )
    model = _train(texts, vocab_size)
    with replacing_folder(folder, owned=_FILES.__contains__) as fresh:
        (fresh / MODEL_FILE).write_bytes(model)
        # Not "legacy": only a text's first word gets a blank that it does not have.
        config = fresh / "tokenizer_config.json"
        write_text(config, json.dumps({"legacy": False, "add_bos_token": True}))
        read = Tokenizer.from_folder(fresh)
        assert read is not None
        read.save(fresh)  # tokenizer.json, which is read without SentencePiece
    found = Tokenizer.from_folder(folder)
    assert found is not None
    return found


def _train(texts: Iterable[str], vocab_size: int) -> bytes:
    """The bytes of tokenizer.model."""
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            required_chars=string.digits,
            user_defined_symbols=["\n"],
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=_LONGEST,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # Of the form "INTERNAL: file.cc(123) [condition] What is wrong."
        reason = " ".join(str(error).rpartition("] ")[2].split())
        raise ValueError(f"cannot train {vocab_size} pieces on these texts: {reason}") from None
    return model.getvalue()
