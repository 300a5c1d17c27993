"""open_tokenizer: the tokenizer of a name, without weights; and what tells two of them apart."""

import hashlib
import tempfile
from pathlib import Path

from zoo import Tokenizer


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of whatever `zoo.load` loads, or of a folder that holds only a tokenizer.

    Raises:
        ValueError: there is none; one line.
    """
    from zoo.opening import open_target
    from zoo.target import resolve
    from zoo.weights.adapter import is_adapter

    target = resolve(name)
    path = target.path
    if path is not None and path.is_dir() and not is_adapter(path):
        found = Tokenizer.from_folder(path)
    else:
        found = open_target(target, "published", None).tokenizer
    if found is None:
        raise ValueError(f"{name} has no tokenizer; name a model or a folder that has one")
    return found


def fingerprint(tokenizer: Tokenizer) -> str:
    """A checksum of all that decides about ids: the same for the same tokenizer.json."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        content = (Path(folder) / "tokenizer.json").read_bytes()
    special = f"{tokenizer.bos_id} {tokenizer.eos_id}".encode()
    return hashlib.sha256(content + special).hexdigest()


def end_id(tokenizer: Tokenizer, end: str) -> int | None:
    """The token behind every document.

    Args:
        end: "eos" (the tokenizer's own, if it has one), "none", or a token such as
            "<|endoftext|>".

    Raises:
        ValueError: no such token.
    """
    if end == "eos":
        return tokenizer.eos_id
    if end == "none":
        return None
    ids = tokenizer.encode(end, add_bos=False)
    if len(ids) != 1:
        raise ValueError(
            f'the end of a document must be one token, "eos" or "none", not {end!r}, which is '
            f"{len(ids)} tokens"
        )
    return ids[0]


def pad_id(tokenizer: Tokenizer) -> int:
    """What fills rows: any token will do, because nothing that counts sees it."""
    known = (tokenizer.pad_id, tokenizer.eos_id, 0)
    return next(token for token in known if token is not None)
