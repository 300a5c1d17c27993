"""relative_accuracy: what part of one model's accuracy in recall tasks another one has.

    part = (mean over tasks of the other's accuracy) / (mean over tasks of the base's)

Each task counts once, however many items it has. What counts are prompts of cells (a task and a
context) that are not void, from both models. Intervals are percentile bootstraps of pairs, drawn
cell by cell, so that every cell keeps its number of items.

Dims: N pairs of items of a cell, K different pairs of outcomes among them, R resamples.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from tools.evaluation.compare import Floats, check_comparison, interval
from tools.evaluation.outcome import Outcome
from tools.evaluation.recall import RECALL
from tools.evaluation.record import cell_text

_Cell = tuple[str, str]  # task, `cell_text` of its context
_Values = dict[str, float]  # by whole cell and item


@dataclass(frozen=True, kw_only=True)
class Relative:
    """One model beside the base.

    Attributes:
        model: the other model.
        tasks: that count, in the order of the base's outcomes.
        n: pairs of items.
        value: the part; 1 is as much as the base.
        low, high: its 95 % interval.
    """

    model: str
    tasks: tuple[str, ...]
    n: int
    value: float
    low: float
    high: float


def relative_accuracy(
    models: Mapping[str, Sequence[Outcome]],
    void: Set[_Cell],
    *,
    beyond: int = 0,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Relative]:
    """Compares every model with the first.

    Args:
        models: at least two, with their outcomes.
        void: cells that do not count, of `void_cells(..., ["context"])`.
        beyond: only prompts of more tokens than this.
        resamples: R.
        seed: of the draws.

    Returns:
        One for each further model that has pairs with the base; over the tasks that both have.

    Raises:
        ValueError: as `check_comparison`, nothing to compare, or `beyond` below 0.
    """
    check_comparison(models, resamples, seed)
    if beyond < 0:
        raise ValueError(f"beyond must be at least 0, not {beyond}")
    (base_name, base_outcomes), *others = models.items()
    base = _by_cell(base_outcomes, void, beyond)
    found = []
    for name, outcomes in others:
        other = _by_cell(outcomes, void, beyond)
        pairs = {
            cell: np.array([(values[key], other[cell][key]) for key in both])
            for cell, values in base.items()
            if (both := [key for key in values if key in other.get(cell, {})])
        }
        if pairs and any(array[:, 0].any() for array in pairs.values()):
            found.append(_relative(name, pairs, resamples, seed))
    if not found:
        names = " or ".join(name for name, _ in others)
        raise ValueError(
            f"no item of a recall task with prompts of more than {beyond} tokens, in a cell that "
            f"is not void, is of {base_name} and of {names}"
        )
    return found


def _relative(model: str, pairs: Mapping[_Cell, Floats], resamples: int, seed: int) -> Relative:
    tasks = tuple(dict.fromkeys(task for task, _ in pairs))
    mean = np.zeros(2)
    means = np.zeros((resamples, 2))
    for task in tasks:
        cells = [(i, array) for i, (cell, array) in enumerate(pairs.items()) if cell[0] == task]
        n = sum(len(array) for _, array in cells)
        mean += sum(array.sum(0) for _, array in cells) / n
        for index, array in cells:
            kinds, times = np.unique(array, axis=0, return_counts=True)
            generator = np.random.default_rng([seed, index])
            drawn = generator.multinomial(len(array), times / len(array), size=resamples)
            means += drawn @ kinds / n
    with np.errstate(divide="ignore", invalid="ignore"):  # of a base that draws nothing right
        parts = means[:, 1] / means[:, 0]
    low, high = interval(parts)
    count = sum(map(len, pairs.values()))
    value = float(mean[1] / mean[0])
    return Relative(model=model, tasks=tasks, n=count, value=value, low=low, high=high)


def _by_cell(outcomes: Sequence[Outcome], void: Set[_Cell], beyond: int) -> dict[_Cell, _Values]:
    cells: dict[_Cell, _Values] = {}
    for x in outcomes:
        if x.metric != "accuracy" or x.task not in RECALL or "context" not in x.cell:
            continue
        context = x.cell["context"]
        cell = (x.task, cell_text({"context": context}))
        if cell not in void and isinstance(context, int) and context > beyond:
            cells.setdefault(cell, {})[f"{cell_text(x.cell)} {x.item}"] = x.value / x.weight
    return cells
