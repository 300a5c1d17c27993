"""Outcome: the score of one item of a task. Scores of models are means of these, pairs too.

An item's name says what was asked, and nothing of the model: the same item of two models pairs up.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_LOG_LARGEST = math.log(sys.float_info.max)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one item of a task gave under one metric.

    Attributes:
        task: such as "passkey" or "lambada".
        cell: what is reported apart, such as {"context": 2048, "depth": 0.5, "wording": "magic"}.
        item: unique within task and cell, and the same for every model.
        metric: such as "accuracy" or "perplexity".
        value: 0 or 1 for an accuracy; for a perplexity the summed negative log-likelihood.
        weight: that the value counts for in a mean: of a perplexity, the tokens, words or bytes.
    """

    task: str
    cell: Mapping[str, object] = field(default_factory=dict)
    item: str
    metric: str
    value: float
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean over the items of a task and cell.

    Attributes:
        value: sum of values over sum of weights; of a perplexity, exp of that, perhaps infinite.
        error: its standard error (of a perplexity by the delta method), None for one
            item or infinity.
        n: items.
    """

    task: str
    cell: Mapping[str, object]
    metric: str
    value: float
    error: float | None
    n: int


def is_perplexity(metric: str) -> bool:
    """Whether the score is exp of a mean."""
    return metric.endswith("perplexity")


def ratio(outcomes: Iterable[Outcome]) -> float:
    """Sum of values over sum of weights."""
    values, weights = 0.0, 0.0
    for outcome in outcomes:
        values += outcome.value
        weights += outcome.weight
    return values / weights


def score(outcomes: list[Outcome]) -> Score:
    """The score of outcomes that share task, cell and metric."""
    first, n = outcomes[0], len(outcomes)
    mean = ratio(outcomes)
    error: float | None = None
    if n > 1:
        weight = sum(outcome.weight for outcome in outcomes) / n
        squares = sum((x.value - mean * x.weight) ** 2 for x in outcomes)
        error = math.sqrt(squares / (n - 1) / n) / weight
    if is_perplexity(first.metric):
        mean = math.exp(mean) if mean < _LOG_LARGEST else math.inf
        error = None if error is None or math.isinf(mean) else mean * error
    return Score(
        task=first.task, cell=first.cell, metric=first.metric, value=mean, error=error, n=n
    )


def scores(outcomes: Iterable[Outcome]) -> list[Score]:
    """One score for each task, cell and metric, in the order in which they first come."""
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for outcome in outcomes:
        cell = tuple(sorted((name, str(value)) for name, value in outcome.cell.items()))
        groups.setdefault((outcome.task, cell, outcome.metric), []).append(outcome)
    return [score(group) for group in groups.values()]
