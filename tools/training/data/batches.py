"""Batches: packed rows of shards, for ever, in an order that the seed and a step number give.

Row g of a run (g = step * batch_size + i) is computed and not remembered: which source it is from
follows from g and the weights, which pass over the source from the rows that it has given before,
and the order of documents and of rows from (seed, pass, source). So a run goes on at any step, on
any number of ranks, with the rows that it would have had.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypedDict

import torch

from recipes.stages import MAX_SEED
from tools.training.data.mixture import Mixture
from tools.training.data.packing import Batch, Documents, empty_rows
from tools.training.data.pools import PassSize, Pool
from tools.training.data.shards import Shards


class BatchesState(TypedDict):
    """Where a run is, and what it must go on with.

    Attributes:
        step: of the next batch.
        plan: a checksum of texts, tokenizer, sizes, seed and weights.
    """

    step: int
    plan: str


class Batches(Iterator[Batch]):
    """An endless iterator of batches of this rank.

    Args:
        shards: from `open_shards`.
        row_size: T, tokens of a row; a multiple of P.
        chunk_size: P, of the model's EVA layers.
        batch_size: rows of a step on all ranks together; a multiple of `ranks`.
        seed: of the order; None: as the files have it.
        weights: share of the rows for each source, of any sum, kept to a thousandth; 0 leaves one
            out. None: all documents of all sources once in a pass.
        rank, ranks: this process gets rows rank, rank + ranks, ... of each batch.
        borders: see `Layout`.
        prefetch: batches that a thread prepares ahead.

    Raises:
        ValueError: one line: numbers out of range, or weights that do not name the sources.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        row_size: int,
        chunk_size: int,
        batch_size: int,
        seed: int | None = 0,
        weights: Mapping[str, float] | None = None,
        rank: int = 0,
        ranks: int = 1,
        borders: bool = True,
        prefetch: int = 0,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < ranks or batch_size % ranks:
            raise ValueError(
                f"batch_size must be a multiple of the {ranks} ranks, at least 1, not {batch_size}"
            )
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed must be 0 to {MAX_SEED}, not {seed}")
        if prefetch < 0:
            raise ValueError(f"prefetch must be at least 0, not {prefetch}")
        names = [source.name for source in shards.sources]
        self._mixture = None if weights is None else Mixture(names, weights)
        groups: list[tuple[str, Sequence[Documents]]]
        if self._mixture is None:
            groups = [("all", shards.sources)]
        else:
            by_name = {source.name: source for source in shards.sources}
            groups = [(name, [by_name[name]]) for name in self._mixture.names]
        self._pools = {
            name: Pool(
                sources,
                row_size=row_size,
                chunk_size=chunk_size,
                borders=borders,
                seed=None if seed is None else (seed, index),
            )
            for index, (name, sources) in enumerate(groups)
        }
        self._row_size, self._batch_size = row_size, batch_size
        self._rank, self._ranks = rank, ranks
        self._pad_id = shards.manifest["tokenizer"]["pad_id"]
        plan = {
            "manifest": shards.manifest,
            "row_size": row_size,
            "chunk_size": chunk_size,
            "batch_size": batch_size,
            "seed": seed,
            # What weights come to: 1 and 1.0 are the same, and so are 1 : 1 and 2 : 2.
            "weights": None if self._mixture is None else self._mixture.shares,
            "borders": borders,
        }
        text = json.dumps(plan, sort_keys=True)
        self._plan = hashlib.sha256(text.encode()).hexdigest()
        self._step, self._prefetch = 0, prefetch
        self._ahead: deque[Future[Batch]] = deque()
        self._thread = ThreadPoolExecutor(1, "batches") if prefetch else None

    @property
    def step(self) -> int:
        """Of the next batch."""
        return self._step

    @property
    def passes(self) -> dict[str, PassSize]:
        """One pass over each source; over "all" together, if there are no weights."""
        return {name: pool.size for name, pool in self._pools.items()}

    def passes_done(self, step: int) -> dict[str, float]:
        """How many passes over each source `step` steps make: above 1, texts come again."""
        rows = step * self._batch_size
        counts = [rows] if self._mixture is None else self._mixture.counts(rows)
        pools = self._pools.items()
        return {n: c / pool.size.rows for (n, pool), c in zip(pools, counts, strict=True)}

    def batch(self, step: int) -> Batch:
        """The batch of any step, [batch_size / ranks, T]; changes nothing."""
        first = step * self._batch_size
        rows = range(first + self._rank, first + self._batch_size, self._ranks)
        arrays = empty_rows(len(rows), self._row_size, self._pad_id)
        pools = list(self._pools.values())
        for i, row in enumerate(rows):
            source, index = (0, row) if self._mixture is None else self._mixture.locate(row)
            pools[source].fill(index, *(array[i] for array in arrays))
        return Batch(*map(torch.from_numpy, arrays))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            batch = self.batch(self._step)
        else:
            while len(self._ahead) <= self._prefetch:
                step = self._step + len(self._ahead)
                self._ahead.append(self._thread.submit(self.batch, step))
            batch = self._ahead.popleft().result()
        self._step += 1
        return batch

    def state_dict(self) -> BatchesState:
        """What `load_state_dict` takes; the same on every rank and for any number of them."""
        return BatchesState(step=self._step, plan=self._plan)

    def load_state_dict(self, state: BatchesState) -> None:
        """Goes on where another object was.

        Raises:
            ValueError: that one was made of other texts or with other arguments than rank, ranks
                and prefetch.
        """
        if state["plan"] != self._plan:
            raise ValueError(
                "the run to go on with had other texts, tokenizer, row_size, chunk_size, "
                "batch_size, seed, weights or borders; go on with the same, or begin a new run"
            )
        self._step = state["step"]
        self._ahead.clear()

    def close(self) -> None:
        """Ends the thread of `prefetch`."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
