"""read_records: the user's files of a data folder, JSON lines, compressed or not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from tools.text_files import read_lines

_ENDS = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst")


def find_file(data: Path | None, stem: str, task: str) -> Path:
    """The file of this name in the data folder, or in `eval` there.

    Raises:
        ValueError: no folder is given, or it has no such file.
    """
    if data is None:
        raise ValueError(f"{task} reads {stem}.jsonl: name its folder with --data")
    for folder in (data, data / "eval"):
        for end in _ENDS:
            if (folder / f"{stem}{end}").is_file():
                return folder / f"{stem}{end}"
    raise ValueError(f"{task} needs {stem}.jsonl, or that with .xz, .gz or .zst, in {data}")


def read_records(path: Path, fields: Sequence[str]) -> list[dict[str, object]]:
    """The objects of a file of JSON lines.

    Raises:
        OSError: the file cannot be opened.
        ValueError: in one line, a file that is damaged or lacks one of the `fields`.
    """
    records = []
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
        records.append(cast("dict[str, object]", value))
    if not records:
        raise ValueError(f"{path} holds no record")
    return records
