"""Checkpoints: where a stage is, so that it goes on after a kill with what it would have had.

torch.distributed.checkpoint writes and reads; a checkpoint of n processes is read by any number.
It is a folder `step-00000500` that gets its name when it is complete.
"""

import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tools.training.ranks import Ranks

_NAME = re.compile(r"step-(\d{8})")
_NORMS = 64


class Checkpoints:
    """Of one stage.

    Args:
        folder: made with the first one.
        keep: how many of the newest stay.
        ranks: all processes save and load together.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int = 2) -> None:
        self._folder, self._keep, self._ranks = folder, keep, ranks

    def newest(self) -> int | None:
        """The step of the newest complete one, which is the step to go on with."""
        return max(self._steps(), default=None)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, norms: list[float]
    ) -> None:
        """Saves a run that has taken `step` steps. `norms`: of gradients, at most 64."""
        path = self._folder / f"step-{step:08d}"
        fresh = self._folder / f".{path.name}.new"
        if self._ranks.first:
            shutil.rmtree(fresh, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
        self._ranks.wait()
        of_model, of_optimizer = get_state_dict(model, optimizer)
        padded = [*norms, *[float("nan")] * (_NORMS - len(norms))]
        state = {
            "model": of_model,
            "optimizer": of_optimizer,
            "norms": torch.tensor(padded, dtype=torch.float64),
        }
        try:
            with _quiet():
                save(state, checkpoint_id=fresh, no_dist=self._ranks.count == 1)
        except CheckpointException as error:  # no Exception: nothing else would catch it
            if self._ranks.first:
                shutil.rmtree(fresh, ignore_errors=True)
            raise ValueError(
                f"cannot write the checkpoint {path}: {_reason(error)}; the one before is kept"
            ) from None
        self._ranks.wait()
        if self._ranks.first:
            shutil.rmtree(path, ignore_errors=True)
            fresh.rename(path)
            for old in sorted(self._steps())[: -self._keep]:
                shutil.rmtree(self._folder / f"step-{old:08d}", ignore_errors=True)
        self._ranks.wait()

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        """Restores model and optimizer in place; returns the norms.

        Raises:
            ValueError: it is of another model or stage, or damaged.
        """
        path = self._folder / f"step-{step:08d}"
        of_model, of_optimizer = get_state_dict(model, optimizer)
        norms = torch.full((_NORMS,), float("nan"), dtype=torch.float64)
        state = {"model": of_model, "optimizer": of_optimizer, "norms": norms}
        try:
            with _quiet():
                load(state, checkpoint_id=path, no_dist=self._ranks.count == 1)
        except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"cannot go on from {path}: {_reason(error)}; without that folder, the run goes "
                "on from the one before"
            ) from None
        set_state_dict(
            *(model, optimizer), model_state_dict=of_model, optim_state_dict=of_optimizer
        )
        return norms[~norms.isnan()].tolist()

    def remove(self) -> None:
        """Deletes all of them: the stage is done."""
        if self._ranks.first:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return [int(match[1]) for match in found if match]


def _reason(error: BaseException) -> str:
    """One line, of the first process that failed."""
    if isinstance(error, CheckpointException):
        for cause, _ in error.failures.values():
            error = cause
            break
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process only, and tracebacks of what is raised."""
    log, before = logging.getLogger(), logging.getLogger().disabled  # the loader's is the root
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        log.disabled = before
