"""Sources by name, and what identifies them: the same names, sizes and checksums, the same text.

Files whose names differ by a number at the end only are one source: gutenberg-000.jsonl.zst and
gutenberg-001.jsonl.zst are "gutenberg". `NAME=FILE` gives a name.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from tools.training.data.readers import HubSource

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_NUMBER = re.compile(r"[-_]\d+$")
_NAME = re.compile(r"[\w.-]+")


def draw(documents: Iterable[str], share: float) -> Iterator[str]:
    """About this share of documents, in their order: those of the lowest checksums.

    A document is kept or not whatever stands beside it, and a greater share keeps it too.
    """
    for text in documents:
        checksum = hashlib.sha256(text.encode()).digest()
        if int.from_bytes(checksum[:8]) < share * 2**64:
            yield text


class Input(TypedDict):
    """One file or data set, as a manifest records it.

    Attributes:
        name: of the file, without its folder; of a data set, all of `hf:...`.
        size: bytes, or rows of a data set.
        sha256: of the file; of a data set, of the files behind it and their sizes.
    """

    name: str
    size: int
    sha256: str


def name_sources(specs: Sequence[str]) -> dict[str, list[str]]:
    """Which files and data sets belong to which source, both in the order given.

    Args:
        specs: each a path, `hf:...`, or one of these behind `NAME=`.

    Raises:
        ValueError: none at all, one twice, or a name that makes no file name.
    """
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for spec in specs:
        match = None if Path(spec).exists() else _NAMED.fullmatch(spec)
        name, source = match.groups() if match else (_usual_name(spec), spec)
        if not _NAME.fullmatch(name) or name.startswith("."):
            raise ValueError(
                f"{source} needs a name of letters, digits, - and _: write NAME={source}"
            )
        place = source if HubSource.parse(source) else str(Path(source).resolve())
        if place in seen:
            raise ValueError(f"{source} is given twice")
        seen.add(place)
        found.setdefault(name, []).append(source)
    if not found:
        raise ValueError("no source given; name text files, JSON lines or hf:NAME:SPLIT")
    return found


def identify(source: str) -> Input:
    """Name, size and checksum of a file or data set.

    Raises:
        OSError: the file cannot be read.
        ValueError: the data set cannot be had.
    """
    hub = HubSource.parse(source)
    if hub is None:
        with Path(source).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Input(name=Path(source).name, size=file.tell(), sha256=digest)
    rows = hub.load()
    # The addresses of its files have the revision in them.
    files = sorted(
        (str(name), str(info)) for name, info in (rows.download_checksums or {}).items()
    )
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return Input(name=source, size=len(rows), sha256=digest)


def _usual_name(spec: str) -> str:
    hub = HubSource.parse(spec)
    if hub is None:
        return _NUMBER.sub("", Path(spec).name.partition(".")[0])
    return "-".join(re.sub(r"\W+", "_", Path(part).name) for part in (hub.name, hub.split))
