"""Pool: the packed rows of one or more sources, pass after pass, each in an order of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tools.training.data.packing import Documents, Int64s, Layout


class PassSize(NamedTuple):
    """One pass over a source, or over all of them together.

    Attributes:
        padding: the share of its positions that is padding.
    """

    documents: int
    tokens: int
    rows: int
    padding: float


class Pool:
    """An endless row of rows.

    In every pass the documents are put in another order, packed, and the rows shuffled: long
    documents have many rows, which would else come one after the other.

    Args:
        sources: read as one.
        row_size, chunk_size, borders: see `Layout`.
        seed: of the orders; None: as the sources have it, in every pass.

    Attributes:
        size: of one pass.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        *,
        row_size: int,
        chunk_size: int,
        borders: bool,
        seed: tuple[int, int] | None,
    ) -> None:
        self._documents = sources[0] if len(sources) == 1 else _Joined(sources)
        self._row_size, self._chunk_size, self._borders = row_size, chunk_size, borders
        self._seed = seed
        lengths = self._documents.lengths
        layout = self._layout(None)
        self.size = PassSize(len(lengths), int(lengths.sum()), layout.rows, layout.padding)
        # Replaced as a whole: batches are made by a thread, and by `batch` at the same time.
        self._latest = (-1, layout, np.arange(layout.rows))

    def fill(self, index: int, *arrays: np.ndarray) -> None:
        """Writes the row with this number, counted over all passes; see `Layout.fill`."""
        number, index = divmod(index, self.size.rows)
        latest = self._latest
        if self._seed is not None and latest[0] != number:
            order = _order(len(self._documents.lengths), *self._seed, number, 0)
            rows = _order(self.size.rows, *self._seed, number, 1)
            self._latest = latest = (number, self._layout(order), rows)
        _, layout, rows = latest
        layout.fill(int(rows[index]), self._documents, *arrays)

    def _layout(self, order: Int64s | None) -> Layout:
        return Layout(
            self._documents.lengths,
            row_size=self._row_size,
            chunk_size=self._chunk_size,
            borders=self._borders,
            order=order,
        )


class _Joined:
    """The documents of several sources under numbers of their own."""

    def __init__(self, sources: Sequence[Documents]) -> None:
        self._sources = sources
        self._first = np.cumsum([0, *(len(source.lengths) for source in sources)])
        self.lengths = np.concatenate([source.lengths for source in sources])

    def read(self, document: int, start: int, stop: int) -> Int64s:
        source = int(np.searchsorted(self._first, document, side="right")) - 1
        return self._sources[source].read(document - int(self._first[source]), start, stop)


def _order(size: int, *seed: int) -> Int64s:
    # Not a Generator: only RandomState promises the same numbers in every version of numpy.
    return np.random.RandomState(seed).permutation(size).astype(np.int64)
