"""Candidates: every placement that was scored, as a line of a file, from which a search goes on.

A line is {"model", "case", "objective", "layers", "score", "error", "n", "cells"}: "case" is a
digest of the model, of what was read and of the device. Steps of gates are lines with "gates", the
name of what they belong to, in the place of "objective".
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from recipes.placement import LayerSet
from tools.evaluation.record import case_digest
from tools.placement.gates import GateStep
from tools.placement.scoring import Advance, Scored, Scorer


class Candidates:
    """Scores that are remembered.

    Args:
        path: the file, made if need be; None: nothing is kept beyond this process.
        model: its name.
        case: what all scores depend on.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it holds a line that is none of ours, other than one that a kill has cut.
    """

    def __init__(self, path: Path | None, model: str, case: Mapping[str, object]) -> None:
        self._model, self._case = model, case_digest(case)
        self._known: dict[tuple[str, LayerSet], Scored] = {}
        self._gates: dict[str, GateStep] = {}
        self._file: BinaryIO | None = None
        self._made: Path | None = None
        if path is None:
            return
        if not path.exists():
            self._made = path
        cut = self._made is None and self._read(path)
        self._file = path.open("ab")
        if cut:
            self._file.write(b"\n")

    def __enter__(self) -> "Candidates":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        # Of a search that was refused before it scored anything.
        if self._made is not None and not self._made.stat().st_size:
            self._made.unlink()

    def score(
        self, scorer: Scorer, placements: Sequence[LayerSet], advance: Advance
    ) -> list[Scored]:
        """Scores placements; those that are known are not computed again."""
        new = [x for x in dict.fromkeys(placements) if (scorer.name, x) not in self._known]
        advance(scorer.steps(len(placements) - len(new)))
        for scored in scorer(new, advance) if new else ():
            self._known[scorer.name, scored.layers] = scored
            self._write({"objective": scorer.name, **dataclasses.asdict(scored)})
        return [self._known[scorer.name, layers] for layers in placements]

    def last_step(self, gates: str) -> GateStep | None:
        """The last step of these gates that was kept."""
        return self._gates.get(gates)

    def add_step(self, gates: str, step: GateStep) -> None:
        """Keeps a step of these gates."""
        self._gates[gates] = step
        self._write({"gates": gates, **dataclasses.asdict(step)})

    def _write(self, fields: Mapping[str, object]) -> None:
        if self._file is None:
            return
        line = {"model": self._model, "case": self._case, **fields}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, path: Path) -> bool:
        """Reads what belongs to this case; whether the file ends in a line that is not whole."""
        content = path.read_bytes()
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
                if found["case"] == self._case:
                    self._keep(found)
            except (ValueError, KeyError, TypeError, RecursionError):
                # What a kill has cut, at the end or before a later run, is computed again.
                if line.startswith(b'{"model": ') and not line.endswith(b"}"):
                    continue
                raise ValueError(f"{path}, line {number}: not a candidate of zoo place") from None
        return bool(content) and not content.endswith(b"\n")

    def _keep(self, found: dict[str, Any]) -> None:
        if "gates" in found:
            names = [field.name for field in dataclasses.fields(GateStep)]
            self._gates[found["gates"]] = GateStep(**{name: found[name] for name in names})
            return
        names = [field.name for field in dataclasses.fields(Scored)]
        values = {name: found[name] for name in names} | {"layers": tuple(found["layers"])}
        self._known[found["objective"], values["layers"]] = Scored(**values)
