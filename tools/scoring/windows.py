"""window_outcomes: a text's windows as items, which `zoo compare` pairs between models."""

import zlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from tools.evaluation.outcome import Outcome
from tools.scoring.perplexity import PerplexityResult


def window_outcomes(
    result: PerplexityResult, windows: Tensor, cell: Mapping[str, object]
) -> Iterator[Outcome]:
    """Two of each window: of all positions, and of those from its middle on.

    Items have a checksum of their tokens: windows of two tokenizers hold other words, and are
    no pairs.

    Args:
        result: of a text.
        windows: int64 [N, W], on the CPU; what it was measured on.
        cell: which text and windows these are.
    """
    items = [f"{i}-{zlib.crc32(ids.numpy().tobytes()):08x}" for i, ids in enumerate(windows)]
    for metric, losses in (
        ("perplexity", result.losses),
        ("second_half_perplexity", result.second_half_losses),
    ):
        for item, row in zip(items, losses.double(), strict=True):
            yield Outcome(
                task="perplexity",
                cell=cell,
                item=item,
                metric=metric,
                value=row.sum().item(),
                weight=len(row),
            )
