"""Record: the outcome of every item as a line of a file, from which a killed run goes on.

A line is {"model", "case", "task", "cell", "item", "metric", "value", "weight"}: "case" is a
digest of the model with its weights, attention, dtype and device, so that outcomes of another one
are never taken for its own; "model" is the name that was typed.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import BinaryIO, cast

from tools.evaluation.outcome import Outcome

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

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it holds a line that is no outcome, other than a last one that a kill cut.
    """

    def __init__(self, path: Path | None, model: str, case: Mapping[str, object]) -> None:
        self._model, self._case = model, case_digest(case)
        self._outcomes: dict[Key, Outcome] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        if path.exists():
            self._outcomes = _read(path, self._case)
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
        line = {
            "model": self._model,
            "case": self._case,
            "task": outcome.task,
            "cell": dict(outcome.cell),
            "item": outcome.item,
            "metric": outcome.metric,
            "value": outcome.value,
            "weight": outcome.weight,
        }
        text = json.dumps(line, allow_nan=False, ensure_ascii=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def __iter__(self) -> Iterator[Outcome]:
        """The outcomes, those of earlier runs first."""
        return iter(self._outcomes.values())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _read(path: Path, case: str) -> dict[Key, Outcome]:
    outcomes = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = cast("dict[str, object]", json.loads(line))
            if found["case"] != case:
                continue
            outcome = Outcome(
                task=str(found["task"]),
                cell=cast("dict[str, object]", found["cell"]),
                item=str(found["item"]),
                metric=str(found["metric"]),
                value=float(cast("float", found["value"])),
                weight=float(cast("float", found["weight"])),
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            # What a kill has cut is without effect: that item is computed again.
            if number == len(lines) or _is_cut(line):
                continue
            raise ValueError(f"{path}, line {number}: not an outcome of zoo evaluate") from None
        outcomes[key_of(outcome)] = outcome
    return outcomes


def _is_cut(line: bytes) -> bool:
    """The beginning of a line, behind which a later run has begun a new one."""
    return line.startswith(b'{"model": ') and not line.endswith(b"}")
