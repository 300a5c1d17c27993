"""greedy, restore_one, ratio_of_drops: searches for exact layers by a score of theirs.

A score says how good a set of exact layers is, and higher is better. It may be a log-likelihood, a
perplexity or divergence with its sign changed, an accuracy: nothing here knows. Sets are scored in
lists, so that whoever scores them can share what they have in common.

All searches are deterministic; of equal scores, the layer nearest to the input wins.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

LayerSet = tuple[int, ...]  # in ascending order
Scores = Callable[[Sequence[LayerSet]], Sequence[float]]
Ranking = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A placement that a search has found.

    Attributes:
        layers: the exact layers, in ascending order.
        order: the same, as they were taken.
        score: of the layers together; None where they were never scored together.
    """

    layers: LayerSet
    order: tuple[int, ...]
    score: float | None


def one_by_one(score: Callable[[LayerSet], float]) -> Scores:
    """A score of one set as a score of many."""
    return lambda sets: [score(layers) for layers in sets]


def restore_one(scores: Scores, candidates: Iterable[int], start: LayerSet = ()) -> Ranking:
    """Ranks layers by the score with this one, and those of `start`, exact; best first.

    With the divergence from the original model as the score, this is the ranking of KL-LS (arXiv
    2512.20569), but for the training that it does before.
    """
    tried = [layer for layer in candidates if layer not in start]
    return _ranked(tried, _scored(scores, [_with(start, layer) for layer in tried]))


def drop_one(scores: Scores, candidates: Sequence[int]) -> dict[int, float]:
    """The score with all candidates exact but one, for each of them."""
    found = _scored(
        scores, [tuple(x for x in sorted(candidates) if x != layer) for layer in candidates]
    )
    return dict(zip(candidates, found, strict=True))


def most_missed(scores: Scores, candidates: Sequence[int]) -> Ranking:
    """Ranks layers by how much worse the score is without each; the most missed one first.

    With the log-likelihood of answers as the score, this is the NLL-guided selection of arXiv
    2606.27791. Values are scores with their sign changed.
    """
    without = drop_one(scores, candidates)
    return _ranked(list(without), [-score for score in without.values()])


def ratio_of_drops(
    recall: dict[int, float], commonsense: dict[int, float], epsilon: float = 1e-10
) -> Ranking:
    """Ranks layers as HALO (arXiv 2601.22156) does, best first.

    Args:
        recall: R_l, the score in recall of the original model without an exact layer l, see
            `drop_one`.
        commonsense: C_l, likewise in common sense.
        epsilon: keeps the ratio finite.

    Returns:
        Layers with (max R - R_l) / (max C - C_l + epsilon): what recall loses over what common
        sense loses, each against the layer that loses least. (The authors cut ratios of
        accuracies off at 50, which changes no order but among those above.)
    """
    least_recall, least_sense = max(recall.values()), max(commonsense.values())
    ratios = [
        (least_recall - recall[layer]) / (least_sense - commonsense[layer] + epsilon)
        for layer in recall
    ]
    return _ranked(list(recall), ratios)


def top(ranking: Ranking, count: int) -> Found:
    """The first `count` layers of a ranking, which were not scored together."""
    order = tuple(layer for layer, _ in ranking[:count])
    return Found(layers=tuple(sorted(order)), order=order, score=None)


def greedy(
    scores: Scores, candidates: Sequence[int], count: int, *, exchanges: int = 0
) -> list[Found]:
    """Adds, `count` times, the layer that makes the score of all together best.

    A layer that was right at first may be of little use beside later ones. With `exchanges`, after
    every addition but the first, the layer that is missed least is dropped and the best one added
    in its place, at most so many times, as long as that makes the score better: a backward step as
    in floating search (Pudil et al., 1994), with sizes kept.

    Args:
        scores: of sets of layers.
        candidates: the layers to choose from.
        count: of the largest set.
        exchanges: at most so many for each size.

    Returns:
        The best set of each size found, 1 to `count`.

    Raises:
        ValueError: `count` is no number of candidates, `exchanges` is negative, or a score is not
            a number.
    """
    if not 1 <= count <= len(candidates):
        raise ValueError(f"count must be 1 to {len(candidates)}, the layers there are: {count}")
    if exchanges < 0:
        raise ValueError(f"exchanges must be at least 0, not {exchanges}")
    found: list[Found] = []
    order: tuple[int, ...] = ()
    for size in range(1, count + 1):
        order, score = _add(scores, candidates, order)
        for _ in range(exchanges if size > 1 else 0):
            dropped = _drop(scores, order)
            other, changed = _add(scores, candidates, dropped)
            if changed <= score:
                break
            order, score = other, changed
        found.append(Found(layers=tuple(sorted(order)), order=order, score=score))
    return found


def _add(
    scores: Scores, candidates: Sequence[int], order: tuple[int, ...]
) -> tuple[tuple[int, ...], float]:
    layer, score = restore_one(scores, candidates, tuple(sorted(order)))[0]
    return (*order, layer), score


def _drop(scores: Scores, order: tuple[int, ...]) -> tuple[int, ...]:
    """Without the layer whose loss costs least; the last one has just been chosen and stays."""
    rest = [tuple(x for x in order if x != layer) for layer in order[:-1]]
    found = _scored(scores, [tuple(sorted(x)) for x in rest])
    return rest[max(range(len(rest)), key=found.__getitem__)]


def _with(start: LayerSet, layer: int) -> LayerSet:
    return tuple(sorted((*start, layer)))


def _ranked(layers: Sequence[int], values: Sequence[float]) -> Ranking:
    return sorted(zip(layers, values, strict=True), key=lambda pair: (-pair[1], pair[0]))


def _scored(scores: Scores, sets: Sequence[LayerSet]) -> Sequence[float]:
    found = scores(sets)
    for layers, score in zip(sets, found, strict=True):
        if math.isnan(score):
            raise ValueError(f"the score of layers {list(layers)} is not a number")
    return found
