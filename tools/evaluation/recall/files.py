"""read_records: the user's files of a data folder, JSON lines, compressed or not."""

import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tools.text_files import read_lines

Parsed = TypeVar("Parsed")

_PACKED = ("", ".xz", ".gz", ".zst")


def find_file(data: Path | None, stem: str, task: str, end: str = ".jsonl") -> Path:
    """The file of this name in the data folder, or in `eval` there, compressed or not.

    Raises:
        ValueError: no folder is given, or it has no such file.
    """
    if data is None:
        raise ValueError(f"{task} reads {stem}{end}: name its folder with --data")
    for folder in (data, data / "eval"):
        for packed in _PACKED:
            if (folder / f"{stem}{end}{packed}").is_file():
                return folder / f"{stem}{end}{packed}"
    raise ValueError(f"{task} needs {stem}{end}, or that with .xz, .gz or .zst, in {data}")


def item_suffix(path: Path) -> str:
    """What the name of an item says of the file that it is from, such as "-1a2b3c4d".

    An outcome with another file is then never taken for one with this.
    """
    return _suffix(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _suffix(path: Path, changed: int) -> str:
    del changed
    return f"-{zlib.crc32(read_lines(path).encode()):08x}"


def read_records(
    path: Path, fields: Sequence[str], parse: Callable[[Mapping[str, object]], Parsed]
) -> list[Parsed]:
    """What `parse` makes of the objects of a file of JSON lines.

    Raises:
        OSError: the file cannot be opened.
        ValueError: in one line, a file that is damaged, lacks one of the `fields`, or holds
            something that `parse` cannot read.
    """
    records: list[Parsed] = []
    for number, line in enumerate(read_lines(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"{path}, line {number}: not valid JSON") from None
        missing = [f for f in fields if not isinstance(value, dict) or f not in value]
        if missing:
            raise ValueError(f"{path}, line {number}: expected an object with {missing[0]!r}")
        try:
            records.append(parse(value))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: no such record ({type(error).__name__}: {error})"
            ) from None
    if not records:
        raise ValueError(f"{path} holds no record")
    return records
