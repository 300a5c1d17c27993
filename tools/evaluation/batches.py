"""batches: rows that are computed together, of much the same length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How much is computed at once.

    Attributes:
        rows: at most so many.
        tokens: at most so many of all rows together, padding included, but at least one row;
            None: as many as the rows have.
        prefill_tokens: of all rows together that are read onto a cache at a time; None: what
            `zoo.generate` does.

    Raises:
        ValueError: a number is not positive.
    """

    rows: int = 1
    tokens: int | None = None
    prefill_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, number in (
            ("batch_size", self.rows),
            ("batch_tokens", self.tokens),
            ("prefill_tokens", self.prefill_tokens),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}")

    def most_rows(self, length: int) -> int:
        """Of this length."""
        if self.tokens is None:
            return self.rows
        return min(self.rows, max(1, self.tokens // max(1, length)))

    def batches(
        self, items: Sequence[Item], length: Callable[[Item], int]
    ) -> Iterator[list[Item]]:
        """Longest first, so that memory runs out at once; equally long ones as they came.

        Batches of one length are of much the same size: of a small last one too, a GPU kernel
        would have to be compiled.
        """
        left = sorted(items, key=length, reverse=True)
        start = 0
        while start < len(left):
            most = self.most_rows(length(left[start]))
            parts = -(-(len(left) - start) // most)
            size = -(-(len(left) - start) // parts)
            yield left[start : start + size]
            start += size


ONE_ROW = BatchLimits()
