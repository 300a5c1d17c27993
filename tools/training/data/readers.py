"""read_documents: the documents of a text file, of JSON lines or of a Hugging Face data set.

What a source is follows from its name:

    hf:NAME:SPLIT[:FIELD]       a data set, NAME being org/name, org/name/config, a bare name, or
                                a local folder (it begins with . or /); SPLIT may be train[:1000]
    *.jsonl, *.jsonl.zst, ...   one JSON object a line
    anything else               UTF-8 text: one document, or several that a marker parts

.xz, .gz and .zst are decompressed, a byte order mark in front is dropped. Documents of blanks
only are left out.
"""

import codecs
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from tools.text_files import decode, json_field, read_blocks

_HUB = "hf:"
_HUB_FORM = re.compile(r"hf:([^:\[\]]+):([^:\[\]]+(?:\[[^\[\]]*\])?)(?::([^:\[\]]+))?")


class DataSet(Protocol):
    """What is used of a `datasets.Dataset`."""

    @property
    def download_checksums(self) -> dict[str, object] | None: ...
    def __len__(self) -> int: ...
    def select_columns(self, names: str) -> "DataSet": ...
    def __iter__(self) -> Iterator[dict[str, object]]: ...


@dataclass(frozen=True)
class HubSource:
    """A split of a data set, as `hf:NAME:SPLIT[:FIELD]` spells it.

    Attributes:
        name: what `datasets.load_dataset` takes.
        config: its configuration, or None.
        split: such as "train" or "train[:1000]".
        field: the column of the text, or None for the usual one.
    """

    name: str
    config: str | None
    split: str
    field: str | None

    @classmethod
    def parse(cls, source: str) -> Self | None:
        """The parts of a source; None if it is a file.

        Raises:
            ValueError: it begins with hf: and goes on otherwise.
        """
        if not source.startswith(_HUB):
            return None
        match = _HUB_FORM.fullmatch(source)
        if match is None:
            raise ValueError(
                f"{source} is no data set: write hf:NAME:SPLIT or hf:NAME:SPLIT:FIELD, such as "
                "hf:org/name:train"
            )
        path, split, field = match.groups()
        name, config = path, None
        if not path.startswith((".", "/")) and path.count("/") == 2:
            name, _, config = path.rpartition("/")
        return cls(name, config, split, field)

    def load(self) -> DataSet:
        """Downloads the split, if it is not in the cache.

        Raises:
            ValueError: in one line, the package or the data set is missing.
        """
        try:
            import datasets
        except ModuleNotFoundError:
            raise ValueError(
                "reading hf: sources needs a package that is missing: pip install datasets"
            ) from None
        try:
            return datasets.load_dataset(self.name, self.config, split=self.split)
        except Exception as error:  # the library raises whatever its loaders do
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{_HUB}{self.name}, split {self.split}: {reason}") from None


def read_documents(
    source: str,
    *,
    field: str = "text",
    marker: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """The documents of a source, in its order.

    Args:
        source: a path or a data set, see above.
        field: of the JSON objects or of the data set, where the source names none.
        marker: what parts the documents of a text file; it belongs to none of them.
        advance: told how many more bytes of a file, or rows of a data set, have been read.

    Raises:
        OSError: a file cannot be opened.
        ValueError: in one line, with file and line, what is damaged; a source without documents.
    """
    if marker == "":
        raise ValueError("the marker between documents must not be empty")
    hub = HubSource.parse(source)
    if hub is not None:
        found = _hub_documents(source, hub, hub.field or field, advance)
    elif ".jsonl" in Path(source).suffixes:
        found = _json_documents(Path(source), field, advance)
    else:
        found = _text_documents(Path(source), marker, advance)
    none = True
    for place, text in found:
        if text.strip():
            none = False
            yield _valid(text, place)
    if none:
        raise ValueError(f"{source} holds no text")


def check_not_empty(source: str, *, field: str = "text") -> None:
    """Reads a source up to its first document, whatever parts it from the next one.

    Raises:
        OSError, ValueError: as `read_documents`; what is damaged further on is not seen.
    """
    path = Path(source)
    if HubSource.parse(source) is not None or ".jsonl" in path.suffixes:
        next(read_documents(source, field=field))
    else:  # without holding all of a text
        pieces = codecs.iterdecode(read_blocks(path), "utf-8-sig", errors="replace")
        if not any(piece.strip() for piece in pieces):
            raise ValueError(f"{source} holds no text")


def _text_documents(
    path: Path, marker: str | None, advance: Callable[[int], None] | None
) -> Iterator[tuple[str, str]]:
    content = decode(b"".join(read_blocks(path, advance)), str(path))
    for text in [content] if marker is None else content.split(marker):
        yield str(path), text


def _json_documents(
    path: Path, field: str, advance: Callable[[int], None] | None
) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path, advance), start=1):
        place = f"{path}, line {number}"
        if line.strip():
            yield place, json_field(decode(line, place), field, place)


def _lines(path: Path, advance: Callable[[int], None] | None) -> Iterator[bytes]:
    """Without their ends, so that a file of any size needs the memory of a line."""
    rest = [b""]
    for block in read_blocks(path, advance):
        first, *others = block.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    yield b"".join(rest)


def _hub_documents(
    source: str, hub: HubSource, field: str, advance: Callable[[int], None] | None
) -> Iterator[tuple[str, str]]:
    rows = hub.load()
    try:
        rows = rows.select_columns(field)
    except ValueError as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows):
        text = row[field]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"{source}, row {number}: {field!r} must be a string, not {kind}")
        yield f"{source}, row {number}", text
        if advance is not None:
            advance(1)


def _valid(text: str, place: str) -> str:
    """The text, if a tokenizer can read it: JSON can spell half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{place}: the text has a lone surrogate, no valid Unicode") from None
    return text
