"""window_outcomes: a text's windows as items, which `zoo compare` pairs between models."""

from collections.abc import Iterator, Mapping

from tools.evaluation.outcome import Outcome
from tools.scoring.perplexity import PerplexityResult


def window_outcomes(result: PerplexityResult, cell: Mapping[str, object]) -> Iterator[Outcome]:
    """Two of each window: of all positions, and of those from its middle on.

    Args:
        result: of a text.
        cell: which text and windows these are.
    """
    for metric, losses in (
        ("perplexity", result.losses),
        ("second_half_perplexity", result.second_half_losses),
    ):
        for window, row in enumerate(losses.double()):
            yield Outcome(
                task="perplexity",
                cell=cell,
                item=str(window),
                metric=metric,
                value=row.sum().item(),
                weight=len(row),
            )
