"""Mixture: which source each row of an endless run is from, by weights, without a memory."""

from collections.abc import Mapping, Sequence

import numpy as np

# Rows of a block, in which every source has the same number of rows at the same places.
_BLOCK = 1000


class Mixture:
    """Sources whose rows stand evenly among each other.

    Args:
        names: of the sources that there are.
        weights: a number for each, of any sum, kept to a thousandth of it; 0 leaves one out.

    Attributes:
        names: of the sources that have a weight.
        shares: their rows of every thousand.

    Raises:
        ValueError: one line: other names, or weights that are no weights.
    """

    def __init__(self, names: Sequence[str], weights: Mapping[str, float]) -> None:
        if set(names) != set(weights):
            raise ValueError(
                f"weights (--share) must name the sources {', '.join(names)} (0 leaves one out), "
                f"not {', '.join(weights) or 'none'}"
            )
        total = sum(weights.values())
        if not 0 < total < float("inf") or min(weights.values()) < 0:
            raise ValueError(f"weights must be at least 0 and not all 0, not {dict(weights)}")
        self.names = [name for name in names if weights[name] > 0]
        if len(self.names) > _BLOCK:
            raise ValueError(f"at most {_BLOCK} sources can have weights, not {len(self.names)}")
        shares = np.array([weights[name] / total for name in self.names])
        self._sizes = _apportion(shares)
        self.shares = dict(zip(self.names, map(int, self._sizes), strict=True))
        # Row j of n is at (j + 1/2) / n of the block.
        sources = np.repeat(np.arange(len(shares)), self._sizes)
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in self._sizes])
        self._pattern = sources[np.argsort(places, kind="stable")]
        one_hot = self._pattern[:, None] == np.arange(len(shares))
        self._before = np.concatenate([np.zeros((1, len(shares)), int), one_hot.cumsum(0)])

    def locate(self, row: int) -> tuple[int, int]:
        """The source of a row, by its place in `names`, and its number among that one's rows."""
        source = int(self._pattern[row % _BLOCK])
        return source, self.counts(row)[source]

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source has."""
        blocks, rest = divmod(rows, _BLOCK)
        return [
            blocks * int(n) + int(k) for n, k in zip(self._sizes, self._before[rest], strict=True)
        ]


def _apportion(shares: np.ndarray) -> np.ndarray:
    """Whole numbers of the sum _BLOCK, at least 1 each, nearest to the shares of it."""
    exact = shares * _BLOCK
    sizes = np.maximum(np.floor(exact + 1e-9).astype(int), 1)  # 0.29 * 1000 is not quite 290
    while missing := _BLOCK - sizes.sum():
        lost = exact - sizes
        if missing > 0:
            sizes[lost.argmax()] += 1
        else:  # what small sources got above their share comes from those that lost least
            sizes[np.where(sizes > 1, lost, np.inf).argmin()] -= 1
    return sizes
