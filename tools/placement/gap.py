"""GapScorer: several objectives as one, each by how much of its gap a placement closes."""

from collections.abc import Iterator, Sequence

from recipes.placement import LayerSet
from tools.placement.candidates import Candidates
from tools.placement.scoring import Advance, Scored, Scorer


class GapScorer:
    """The mean, over objectives, of (score - none) / (all - none).

    0 is what no exact layer is worth and 1 what all of them are, so that objectives in different
    units count alike. Its cells are those of the objectives.

    Args:
        name: in records.
        parts: the objectives.
        candidates: remembers their scores.
        layers: all that may be exact.
    """

    def __init__(
        self, name: str, parts: Sequence[Scorer], candidates: Candidates, layers: LayerSet
    ) -> None:
        self.name = name
        self._parts, self._candidates, self._layers = parts, candidates, layers

    def steps(self, placements: int) -> int:
        return sum(part.steps(placements) for part in self._parts)

    def __call__(self, placements: Sequence[LayerSet], advance: Advance) -> Iterator[Scored]:
        """See `Scorer`.

        Raises:
            ValueError: an objective is worth no more with all layers exact than with none.
        """
        closed = [0.0] * len(placements)
        found: list[list[Scored]] = [[] for _ in placements]
        for part in self._parts:
            none, all_ = self._candidates.score(part, [(), self._layers], lambda steps: None)
            gap = all_.score - none.score
            if gap <= 0.0:
                raise ValueError(
                    f"exact layers do not help {part.name}: {none.score:.4g} with none of them, "
                    f"{all_.score:.4g} with all; search with longer texts, or by one objective"
                )
            for index, x in enumerate(self._candidates.score(part, placements, advance)):
                closed[index] += (x.score - none.score) / gap / len(self._parts)
                found[index].append(x)
        for layers, score, parts in zip(placements, closed, found, strict=True):
            cells = {
                f"{part.name}, {cell}": values
                for part, x in zip(self._parts, parts, strict=True)
                for cell, values in x.cells.items()
            }
            n = sum(x.n for x in parts)
            yield Scored(layers=layers, score=score, error=None, n=n, cells=cells)
