"""Layout: which tokens of which documents are in which row; pack: rows of documents in memory.

All documents of a pass stand one after the other, each beginning on a multiple of P, and this
line is cut into rows of T:

    documents   aaaaaaaaaaaaaaa-bbb-cccccccc
    rows        [aaaaaaaaaaaa] [aaa-bbb-cccc] [cccc--------]        P = 4, T = 12, - is padding

So a document that is longer than what is left of its row goes on in the next one, where it is
read as if it began there, and every token is in one row. The label of a token is the token behind
it in its document, also across a cut, where it is the first of the next row; padding and the last
token of a document have none (-100).

Dims: B rows, T tokens of a row, P chunk size, D documents.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NO_LABEL = -100  # what torch's cross entropy ignores

Int64s = npt.NDArray[np.int64]


class Documents(Protocol):
    """Documents by number; `shards.TokenSource` is one.

    Attributes:
        lengths: int64 [D], tokens of each.
    """

    @property
    def lengths(self) -> Int64s: ...

    def read(self, document: int, start: int, stop: int) -> Int64s:
        """Tokens `start` to `stop` of a document, fewer if it ends before."""
        ...


class Batch(NamedTuple):
    """Packed rows.

    Attributes:
        ids: int64 [B, T].
        labels: int64 [B, T], the token behind each; -100: no loss.
        seq_start: int32 [B, T], where each token's document begins in its row; padding has that
            of the document before it.
    """

    ids: Tensor
    labels: Tensor
    seq_start: Tensor


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a document, from `at` in a row."""

    at: int
    document: int
    start: int
    stop: int


class Layout:
    """Where every token of one pass over the documents stands.

    Args:
        lengths: int64 [D].
        row_size: T, a multiple of P.
        chunk_size: P.
        borders: False: documents without padding between them, as if all were one; a baseline.
        order: int64 [D], in which the documents stand; None: that of `lengths`.

    Attributes:
        rows: how many there are; padding fills the last one.
        padding: the share of all positions that is padding.

    Raises:
        ValueError: sizes that do not fit each other, or no token at all.
    """

    def __init__(
        self,
        lengths: Int64s,
        *,
        row_size: int,
        chunk_size: int,
        borders: bool = True,
        order: Int64s | None = None,
    ) -> None:
        if chunk_size < 1 or row_size < 1 or row_size % chunk_size:
            raise ValueError(
                f"rows must have a multiple of chunk_size ({chunk_size}) tokens, not {row_size}"
            )
        self.row_size, self.borders = row_size, borders
        self._order = np.arange(len(lengths)) if order is None else order
        self._lengths = lengths
        placed = lengths[self._order]
        if borders:
            placed = -(-placed // chunk_size) * chunk_size
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(placed)])
        self.rows = -(-int(self._starts[-1]) // row_size)
        if self.rows == 0:
            raise ValueError("there is no document with a token in it")
        self.padding = 1 - int(lengths.sum()) / (self.rows * row_size)

    def pieces(self, row: int) -> Iterator[Piece]:
        """What a row holds, from left to right."""
        return self._between(row * self.row_size, (row + 1) * self.row_size)

    def fill(
        self,
        row: int,
        documents: Documents,
        ids: Int64s,
        labels: Int64s,
        seq_start: npt.NDArray[np.int32],
    ) -> None:
        """Writes a row, [T] each, over padding: the rest of `ids` is left as it is."""
        if not self.borders:
            self._fill_without_borders(row, documents, ids, labels)
            return
        for at, document, start, stop in self.pieces(row):
            tokens = documents.read(document, start, stop + 1)  # and the label of the last
            ids[at : at + stop - start] = tokens[: stop - start]
            labels[at : at + len(tokens) - 1] = tokens[1:]
            seq_start[at:] = at

    def _fill_without_borders(
        self, row: int, documents: Documents, ids: Int64s, labels: Int64s
    ) -> None:
        first = row * self.row_size
        pieces = self._between(first, first + self.row_size + 1)
        tokens = np.concatenate([documents.read(*piece[1:]) for piece in pieces])
        size = min(len(tokens), self.row_size)
        ids[:size] = tokens[:size]
        labels[: len(tokens) - 1] = tokens[1:]

    def _between(self, first: int, last: int) -> Iterator[Piece]:
        """What stands from `first` to `last` on the line of all documents."""
        index = int(np.searchsorted(self._starts, first, side="right")) - 1
        while index < len(self._order) and (begin := int(self._starts[index])) < last:
            document = int(self._order[index])
            start = max(first - begin, 0)
            stop = min(last - begin, int(self._lengths[document]))
            if start < stop:
                yield Piece(begin + start - first, document, start, stop)
            index += 1


def empty_rows(
    rows: int, row_size: int, pad_id: int
) -> tuple[Int64s, Int64s, npt.NDArray[np.int32]]:
    """ids, labels and seq_start, [rows, row_size] each, of padding only."""
    shape = (rows, row_size)
    return np.full(shape, pad_id), np.full(shape, NO_LABEL), np.zeros(shape, np.int32)


def pack(
    documents: Sequence[Sequence[int]],
    *,
    row_size: int,
    chunk_size: int,
    pad_id: int = 0,
    borders: bool = True,
) -> Batch:
    """All rows of documents that are in memory, in their order; see `Layout`."""
    held = _Held(documents)
    layout = Layout(held.lengths, row_size=row_size, chunk_size=chunk_size, borders=borders)
    arrays = empty_rows(layout.rows, row_size, pad_id)
    for row in range(layout.rows):
        layout.fill(row, held, *(array[row] for array in arrays))
    return Batch(*map(torch.from_numpy, arrays))


class _Held:
    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self._tokens = [np.array(document, np.int64) for document in documents]
        self.lengths = np.array([len(tokens) for tokens in self._tokens], np.int64)

    def read(self, document: int, start: int, stop: int) -> Int64s:
        return self._tokens[document][start:stop]
