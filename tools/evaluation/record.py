"""Record: the outcome of every item as a line of a file, from which a killed run goes on."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import BinaryIO

from tools.evaluation.outcome import Outcome
from tools.evaluation.sample_lines import Line, read_sample_lines

Key = tuple[str, str, str, str]


def key_of(outcome: Outcome) -> Key:
    """What tells outcomes of a model apart: task, cell, item and metric."""
    return (outcome.task, cell_text(outcome.cell), outcome.item, outcome.metric)


def cell_text(cell: Mapping[str, object]) -> str:
    """A cell as JSON, the same for every order of its names."""
    return json.dumps(dict(cell), sort_keys=True, ensure_ascii=False)


def case_digest(case: Mapping[str, object]) -> str:
    """A short name for a model's case."""
    text = json.dumps(dict(case), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Record:
    """The outcomes of one model, those of earlier runs included.

    Args:
        path: the file, made if need be; None: nothing is kept beyond this process.
        model: the name of the model.
        case: what the outcomes depend on.
        full: whether every layer has full attention.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it holds a line that is no outcome, other than one that a kill cut.
    """

    def __init__(
        self,
        path: Path | None,
        model: str,
        case: Mapping[str, object],
        *,
        full: bool = False,
    ) -> None:
        self._model, self._case, self._full = model, case_digest(case), full
        self._outcomes: dict[Key, Outcome] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        if path.is_file():  # a device or pipe, such as /dev/stdout, might never end
            lines = read_sample_lines(path)
            found = (x.outcome for x in lines if x is not None and x.case == self._case)
            self._outcomes = {key_of(outcome): outcome for outcome in found}
        self._file = path.open("ab")
        if self._file.tell() and not _ends_with_newline(path):
            self._file.write(b"\n")

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def done(self) -> Set[Key]:
        """What need not be computed again."""
        return self._outcomes.keys()

    def add(self, outcome: Outcome) -> None:
        """Keeps an outcome, unless it is known; from here on a kill does not lose it."""
        known = self._outcomes.setdefault(key_of(outcome), outcome)
        if self._file is None or known is not outcome:
            return
        line = Line(self._model, self._case, self._full, outcome)
        self._file.write(line.encode())
        self._file.flush()

    def __iter__(self) -> Iterator[Outcome]:
        """The outcomes, those of earlier runs first."""
        return iter(self._outcomes.values())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
