"""SweepScorer, CommonsenseScorer: scores of many placements of one model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from recipes.placement import LayerSet
from tools.evaluation.batches import BatchLimits
from tools.evaluation.shared import Shared
from tools.placement.branches import Branches
from tools.placement.objectives import Batch, Objective
from tools.placement.sweep import blocks_run, sweep

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A placement and what it is worth.

    Attributes:
        layers: the exact ones.
        score: the mean over items, higher is better.
        error: its standard error; None for one item.
        n: items.
        cells: means of each part of the items, of the score and of what else was measured.
    """

    layers: LayerSet
    score: float
    error: float | None
    n: int
    cells: dict[str, dict[str, float]] = field(default_factory=dict)


class Scorer(Protocol):
    """What scores placements.

    Attributes:
        name: of what is scored.
    """

    name: str

    def steps(self, placements: int) -> int:
        """How far `advance` comes in scoring so many placements."""
        ...

    def __call__(self, placements: Sequence[LayerSet], advance: Advance) -> Iterator[Scored]:
        """Scores placements, in this order."""
        ...


class SweepScorer:
    """An objective, with the work that placements share done once.

    Args:
        branches: the model.
        objective: what is good.
        batch_size: rows that are read together, under every placement.
        rows: rows that a block is given at a time, those of all placements together.
        share: False: every placement is computed by itself, for comparison.

    Attributes:
        blocks, blocks_alone: blocks run so far, and as many as passes one by one would have run.
    """

    def __init__(
        self,
        branches: Branches,
        objective: Objective,
        *,
        batch_size: int,
        rows: int,
        share: bool = True,
    ) -> None:
        for what, number in (("batch_size", batch_size), ("rows", rows)):
            if number < 1:
                raise ValueError(f"{what} must be at least 1, not {number}")
        self.name = objective.name
        self.blocks = self.blocks_alone = 0
        self._branches, self._objective = branches, objective
        self._batch_size, self._rows, self._share = batch_size, rows, share
        self._batches = list(objective.batches(batch_size))

    def steps(self, placements: int) -> int:
        return placements * len(self._batches)

    def __call__(self, placements: Sequence[LayerSet], advance: Advance) -> Iterator[Scored]:
        found: list[list[dict[str, float]]] = [[] for _ in placements]
        for batch in self._batches:
            for index, values in self.batch(batch, placements, advance):
                found[index] += values
        cells = [cell for batch in self._batches for cell in batch.cells]
        for layers, values in zip(placements, found, strict=True):
            yield _summary(layers, values, cells)

    def batch(
        self, batch: Batch, placements: Sequence[LayerSet], advance: Advance
    ) -> Iterator[tuple[int, list[dict[str, float]]]]:
        """The index of each placement, and the values of each row of a batch under it."""
        groups = [list(placements)] if self._share else [[layers] for layers in placements]
        first = 0
        for group in groups:
            for index, values in self._run(batch, group):
                yield first + index, values
            first += len(group)
            advance(len(group))

    def _run(
        self, batch: Batch, placements: Sequence[LayerSet]
    ) -> Iterator[tuple[int, list[dict[str, float]]]]:
        branches, objective = self._branches, self._objective
        # What others are compared with comes first.
        before = [branches.layers] if objective.needs_all else []
        asked = [*before, *placements]
        self.blocks += blocks_run(asked, branches.depth)
        self.blocks_alone += len(asked) * branches.depth
        ids = batch.ids.to(branches.model.device)
        exact: torch.Tensor | None = None
        for index, hidden in sweep(branches, ids, asked, rows=self._rows):
            if index < len(before):
                exact = hidden
                continue
            with torch.inference_mode():
                values = objective.values(branches.model.lm_head, batch, hidden, exact)
            columns = {name: value.double().tolist() for name, value in values.items()}
            rows = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
            yield index - len(before), rows


class CommonsenseScorer:
    """The mean accuracy of the harness's tasks that have local files.

    Short prompts fit into EVA's window, where every placement is the same model: they are read
    behind unrelated text.

    Args:
        branches: the model.
        model_name: for messages.
        tasks: of `tools.evaluation.harness.LOCAL_TASKS`.
        data: the folder of their files.
        far: words of text before each prompt.
        limit: items of each task.
        batch_size: rows at once.
        seed: of the text.
    """

    name = "commonsense"

    def __init__(
        self,
        branches: Branches,
        model_name: str,
        tasks: Sequence[str],
        *,
        data: Path,
        far: int,
        limit: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._branches, self._model_name, self._tasks = branches, model_name, tasks
        self._data, self._far, self._limit = data, far, limit
        self._batch_size, self._seed = batch_size, seed

    def steps(self, placements: int) -> int:
        from tools.evaluation.harness import check_installed, count_items

        check_installed()
        return placements * count_items(self._tasks, self._data, self._limit)

    def __call__(self, placements: Sequence[LayerSet], advance: Advance) -> Iterator[Scored]:
        from tools.evaluation.harness import run_harness

        shared = Shared()  # tasks take seconds to load
        for layers in placements:
            with self._branches.placed(layers) as model:
                outcomes = list(
                    run_harness(
                        model,
                        self._model_name,
                        self._tasks,
                        data=self._data,
                        far=self._far,
                        limit=self._limit,
                        limits=BatchLimits(rows=self._batch_size),
                        seed=self._seed,
                        advance=advance,
                        shared=shared,
                    )
                )
            right = [outcome for outcome in outcomes if outcome.metric == "acc"]
            if not right:
                raise ValueError(f"{', '.join(self._tasks)} have no accuracy; choose other tasks")
            yield _summary(layers, [{"score": x.value} for x in right], [x.task for x in right])


def _summary(layers: LayerSet, values: Sequence[dict[str, float]], cells: Sequence[str]) -> Scored:
    scores = [value["score"] for value in values]
    if not all(map(math.isfinite, scores)):
        raise ValueError(
            "the model's logits are not finite numbers; try another dtype, such as float32"
        )
    n, mean = len(scores), sum(scores) / len(scores)
    error = None
    if n > 1:
        error = math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n)
    groups: dict[str, list[dict[str, float]]] = {}
    for cell, value in zip(cells, values, strict=True):
        groups.setdefault(cell, []).append(value)
    means = {
        cell: {name: sum(x[name] for x in group) / len(group) for name in group[0]}
        for cell, group in groups.items()
    }
    return Scored(layers=layers, score=mean, error=error, n=n, cells=means)
