"""check_stages: what would stop a later stage is found before the first one begins."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode

from recipes import Stage
from tools.training.lora import merge_lora
from tools.training.memory import converted_layers
from tools.training.parameters import prepare
from zoo.config import ModelConfig
from zoo.families import build

_RESERVED = ("checkpoints", "tensorboard", "bad-batch")
ADAPTER = "-adapter"
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.new")  # as zoo/weights/atomic.py names them


def check_stages(
    config: ModelConfig, stages: Sequence[Stage], *, weights: str, rows: int | None, ranks: int
) -> None:
    """Nothing is read or allocated.

    Args:
        config: of the student.
        stages: of a recipe.
        weights: of the base; "random" ones teach nothing.
        rows: rows that a process computes at a time; None: all that it has.
        ranks: processes.

    Raises:
        ValueError: one line, with the stage's name.
    """
    with FakeTensorMode() as fake:
        model = build(config, "auto")
    for stage in stages:
        if stage.name in _RESERVED or stage.name.endswith(ADAPTER):
            raise ValueError(
                f"a stage cannot be called {stage.name!r}, as other folders of a run are"
            )
        longest = config.max_position_embeddings
        if stage.context > longest:
            raise ValueError(
                f"stage {stage.name!r}: context {stage.context} exceeds the model's {longest}"
            )
        if stage.needs_teacher and weights == "random":
            raise ValueError(
                f"stage {stage.name!r} compares with a teacher, which random weights are not; "
                'its loss can be "cross_entropy"'
            )
        rows_at_a_time(stage, rows, ranks)
        with fake:
            merge_lora(model)
            prepare(model, stage)  # patterns may fit nothing
        if "attention_mse" in stage.weights and not converted_layers(model):
            raise ValueError(
                f"stage {stage.name!r}: 'attention_mse' compares converted layers, and the model "
                "has none"
            )


def rows_at_a_time(stage: Stage, rows: int | None, ranks: int) -> int:
    """Rows that a process computes at a time.

    Raises:
        ValueError: they do not divide its part of the batch.
    """
    if stage.batch_size % ranks:
        raise ValueError(
            f"stage {stage.name!r}: batch_size {stage.batch_size} must be a multiple of the "
            f"{ranks} processes"
        )
    own = stage.batch_size // ranks
    found = own if rows is None else rows
    if found < 1 or own % found:
        raise ValueError(
            f"stage {stage.name!r}: rows must divide the {own} of a process, not be {found}"
        )
    return found


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed were writing to the folder of a run."""
    for path in folder.iterdir():
        if not _UNFINISHED.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
