"""compare: two models on the same items, with a paired bootstrap interval of the difference.

Items that both models have are drawn with replacement, as many as there are, each with both of
its outcomes; what is easy or hard for every model then cancels. The interval holds the middle
95 % of the differences of the scores of such draws (a percentile bootstrap: Efron and Tibshirani,
An Introduction to the Bootstrap, chapter 13). A perplexity is exp of a ratio of sums, in every
draw anew. Items count as independent draws: the questions of one paragraph are a little less.

Intervals are not corrected for their number: of twenty differences that are noise one is expected
to look like more. Who prints them has to say so.

Dims: N pairs of items, K different pairs of outcomes among them, R resamples.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.evaluation.outcome import Outcome, is_perplexity
from tools.evaluation.record import cell_text

FEW = 30  # fewer pairs, and a percentile interval is too narrow
_LEVEL = 0.95
_CELLS = 1 << 22  # numbers that are in memory at a time, beside the draws themselves

Floats = NDArray[np.float64]
_Group = tuple[str, str, str]  # task, the part of the cell that is reported by, metric
_Pairs = dict[tuple[str, str], Outcome]  # by whole cell and item


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on one task and cell, over the items that both have.

    Attributes:
        task, cell, metric: what was measured.
        model: the other model; the base is the same throughout.
        n: pairs of items.
        base_score, score: of the base and of the other model.
        difference: `score` less `base_score`.
        low, high: its 95 % interval; None for a single pair.
        unpaired: items that only the base has, and that only the other has.
    """

    task: str
    cell: Mapping[str, object]
    metric: str
    model: str
    n: int
    base_score: float
    score: float
    difference: float
    low: float | None
    high: float | None
    unpaired: tuple[int, int]

    @property
    def noise(self) -> bool:
        """Whether the interval holds 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    @property
    def few(self) -> bool:
        """Whether there are too few pairs for such an interval."""
        return self.n < FEW


def compare_models(
    models: Mapping[str, Sequence[Outcome]],
    *,
    by: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Comparison]:
    """Compares every model with the first.

    Args:
        models: at least two, with their outcomes.
        by: names of a cell to report by, whatever the others are; None: all of them.
        metrics: only these; None: all.
        resamples: R.
        seed: of the draws; the same seed gives the same intervals, whatever else is compared.

    Returns:
        One for each task, cell, metric and further model that has pairs with the base, in the
        order of the base's outcomes.

    Raises:
        ValueError: fewer than two models, no pair at all, names that no cell has, metrics that no
            outcome has, `resamples` below 100, or `seed` below 0.
    """
    check_comparison(models, resamples, seed)
    _check_names(models, by, metrics)
    (base_name, base_outcomes), *others = models.items()
    base = _grouped(base_outcomes, by, metrics)
    grouped = {name: _grouped(outcomes, by, metrics) for name, outcomes in others}
    found = []
    for group, pairs in base.items():
        for name, groups in grouped.items():
            both = [key for key in pairs if key in groups.get(group, {})]
            if both:
                ours, theirs = pairs, groups[group]
                found.append(_compare(group, name, ours, theirs, both, by, resamples, seed))
    if not found:
        names = " or ".join(name for name, _ in others)
        raise ValueError(f"no item of {base_name} is also one of {names}: nothing to compare")
    return found


def check_comparison(models: Mapping[str, Sequence[Outcome]], resamples: int, seed: int) -> None:
    """Refuses what no comparison with intervals can be made of.

    Raises:
        ValueError: fewer than two models, `resamples` below 100, or `seed` below 0.
    """
    if len(models) < 2:
        raise ValueError(f"a comparison needs two models; here: {', '.join(models) or 'none'}")
    if resamples < 100:
        raise ValueError(f"an interval needs at least 100 resamples, not {resamples}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, not {seed}")


def interval(draws: Floats) -> tuple[float, float]:
    """The middle 95 % of what resamples gave, [R]."""
    tail = (1 - _LEVEL) / 2
    low, high = (float(x) for x in np.quantile(draws, [tail, 1 - tail]))
    return low, high


def bootstrap_differences(
    base: Floats, other: Floats, *, perplexity: bool, resamples: int, seed: int
) -> Floats:
    """Differences of scores in resamples of pairs.

    Args:
        base, other: [N, 2], value and weight of each item.
        perplexity: whether a score is exp of the ratio of sums.
        resamples: R.
        seed: of the draws.

    Returns:
        [R].
    """
    # Equal pairs are drawn together: of accuracies there are four kinds, whatever N is.
    kinds, times = np.unique(np.hstack([base, other]), axis=0, return_counts=True)
    drawn = _draw(tuple(times.tolist()), resamples, seed)
    columns = [np.ascontiguousarray(column) for column in kinds.T]
    differences = []
    for counts in np.array_split(drawn, -(-drawn.size // _CELLS)):
        # Products one by one: equal columns then give equal sums, and a difference of exactly 0.
        v, w, other_v, other_w = (
            counts.astype(np.float64, copy=False) @ column for column in columns
        )
        with np.errstate(over="ignore"):
            first, second = _score(v, w, perplexity), _score(other_v, other_w, perplexity)
        differences.append(second - first)
    return np.concatenate(differences)


@functools.lru_cache(maxsize=2)  # cells of a task have as many items, and share their draws
def _draw(times: tuple[int, ...], resamples: int, seed: int) -> NDArray[np.generic]:
    """How often each kind is drawn when sum(times) pairs are, [R, K]; many in a small dtype."""
    n = sum(times)
    generator = np.random.default_rng([seed, n, len(times)])
    parts = np.array(times) / n
    rows = max(1, _CELLS // len(times))
    few = resamples * len(times) <= _CELLS
    kind = np.dtype(np.float64) if few else np.min_scalar_type(n)
    return np.concatenate(
        [
            generator.multinomial(n, parts, size=min(rows, resamples - first)).astype(kind)
            for first in range(0, resamples, rows)
        ]
    )


def _score(value: Floats, weight: Floats, perplexity: bool) -> Floats:
    return np.exp(value / weight) if perplexity else value / weight


def _compare(
    group: _Group,
    model: str,
    base: _Pairs,
    other: _Pairs,
    both: Sequence[tuple[str, str]],
    by: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> Comparison:
    task, _, metric = group
    arrays = [
        np.array([(pairs[key].value, pairs[key].weight) for key in both])
        for pairs in (base, other)
    ]
    perplexity = is_perplexity(metric)
    sums = [array.sum(0, keepdims=True) for array in arrays]
    scores = [_score(x[:, 0], x[:, 1], perplexity).item() for x in sums]
    low = high = None
    if len(both) > 1:
        differences = bootstrap_differences(
            *arrays, perplexity=perplexity, resamples=resamples, seed=seed
        )
        low, high = interval(differences)
    return Comparison(
        task=task,
        cell=_part(base[both[0]].cell, by),
        metric=metric,
        model=model,
        n=len(both),
        base_score=scores[0],
        score=scores[1],
        difference=scores[1] - scores[0],
        low=low,
        high=high,
        unpaired=(len(base) - len(both), len(other) - len(both)),
    )


def _grouped(
    outcomes: Sequence[Outcome], by: Sequence[str] | None, metrics: Sequence[str] | None
) -> dict[_Group, _Pairs]:
    groups: dict[_Group, _Pairs] = {}
    for outcome in outcomes:
        if metrics is None or outcome.metric in metrics:
            group = (outcome.task, cell_text(_part(outcome.cell, by)), outcome.metric)
            key = (cell_text(outcome.cell), outcome.item)
            groups.setdefault(group, {})[key] = outcome
    return groups


def _part(cell: Mapping[str, object], by: Sequence[str] | None) -> dict[str, object]:
    return {name: cell[name] for name in (cell if by is None else by) if name in cell}


def _check_names(
    models: Mapping[str, Sequence[Outcome]],
    by: Sequence[str] | None,
    metrics: Sequence[str] | None,
) -> None:
    outcomes = [outcome for group in models.values() for outcome in group]
    for what, wanted, known in (
        ("part of a cell", by, dict.fromkeys(name for x in outcomes for name in x.cell)),
        ("metric", metrics, dict.fromkeys(x.metric for x in outcomes)),
    ):
        for name in wanted or ():
            if name not in known:
                there = ", ".join(known) or "none"
                raise ValueError(f"there is no {what} {name!r} in these outcomes; there: {there}")
