"""Metrics: what a run says of itself, a JSON line a step and, if installed, TensorBoard.

    {"stage": "distill", "step": 12, "tokens": 425984, "loss": 0.31, "logit_kl": 0.31, ...}

After a kill, lines of steps that are taken once more are cut off, so every step is there once.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from zoo.weights.atomic import write_text


class _Writer(Protocol):
    def add_scalar(self, tag: str, value: float, step: int) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Of one stage of a run.

    Args:
        path: metrics.jsonl, of all stages.
        stage: whose lines are written.
        step: of the next line; those of this and later ones are cut off.
        tensorboard: folder of its events; None: none.
    """

    def __init__(self, path: Path, stage: str, step: int, tensorboard: Path | None) -> None:
        self._path, self._stage = path, stage
        _cut(path, stage, step)
        self._file = path.open("a", encoding="utf-8")
        self._writer = None if tensorboard is None else _open_writer(tensorboard, step)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends what is known of a step, from 0. None is left out."""
        known = {name: value for name, value in values.items() if value is not None}
        row: dict[str, object] = {"stage": self._stage, "step": step} | known
        row["time"] = round(time.time(), 3)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in known.items():
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """Waits until all lines are on the disk: a checkpoint takes them for written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, which then is on the disk."""
        self.sync()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _cut(path: Path, stage: str, step: int) -> None:
    """Takes the lines of a stage from a step on out of the file, and a line that a kill cut."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not (row["stage"] == stage and row["step"] >= step):
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _open_writer(folder: Path, step: int) -> _Writer:
    """Raises ValueError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs the package tensorboard: pip install 'flasheva-zoo[train]'"
        ) from None
    writer: _Writer = SummaryWriter(str(folder), purge_step=step)
    return writer
