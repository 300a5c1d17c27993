"""measure_perplexity: of a text in windows that are scored alone, without what came before.

perplexity = exp(-mean log p(token n + 1 | tokens of the window up to n)), over every position n
of a window but the last, and once more over the second half, n >= W / 2, where the model can
make use of a longer past.

Dims: N windows, W tokens of a window.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.scoring.tokens import Scorable, score_tokens


@dataclass(frozen=True)
class Perplexity:
    """Over one set of positions.

    Attributes:
        value: the perplexity.
        standard_error: from the scatter of the windows' mean losses; None for a single window.
        tokens: how many were predicted.
    """

    value: float
    standard_error: float | None
    tokens: int

    @classmethod
    def of(cls, losses: Tensor) -> "Perplexity":
        """From the losses [N, positions] of all windows."""
        means = losses.double().mean(1)
        value = math.exp(means.mean().item())
        # exp turns an error e of the mean into a relative error e of the perplexity.
        error = value * means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
        return cls(value, error, losses.numel())


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Perplexity over all positions, and over those from the middle of each window on.

    Attributes:
        losses: float [N, W - 1], of all positions.
    """

    losses: Tensor

    @property
    def all(self) -> Perplexity:
        """Over all positions."""
        return Perplexity.of(self.losses)

    @property
    def second_half(self) -> Perplexity:
        """Over those from the middle of each window on."""
        return Perplexity.of(self.second_half_losses)

    @property
    def second_half_losses(self) -> Tensor:
        """Float [N, W - 1 - W // 2]."""
        return self.losses[:, (self.losses.shape[1] + 1) // 2 :]


def cut_windows(ids: Sequence[int], window: int, count: int | None = None) -> Tensor:
    """Cuts a text into windows that do not overlap; an incomplete last one is left out.

    Args:
        ids: the whole text as one sequence, without a bos.
        window: W, at least 4, so that the second half predicts something.
        count: only the first so many windows; None: all.

    Returns:
        int64 [N, W].

    Raises:
        ValueError: the text has fewer windows than asked for, or not one.
    """
    if window < 4:
        raise ValueError(f"window must be at least 4 tokens, not {window}")
    if count is not None and count < 1:
        raise ValueError(f"the number of windows must be at least 1, not {count}")
    there = len(ids) // window
    wanted = there if count is None else count
    if there < max(wanted, 1):
        raise ValueError(
            f"the text of {len(ids)} tokens has {there} windows of {window} tokens, fewer than "
            f"{max(wanted, 1)}; ask for fewer or shorter ones, or give a longer text"
        )
    return torch.tensor(ids[: wanted * window]).view(wanted, window)


def measure_perplexity(
    model: Scorable,
    windows: Tensor,
    *,
    batch_size: int = 1,
    advance: Callable[[int], None] = lambda steps: None,
) -> PerplexityResult:
    """Scores each window alone.

    Args:
        model: from `zoo.load`.
        windows: int [N, W], from `cut_windows`.
        batch_size: windows that are computed at once.
        advance: called with the number of windows that were just scored.

    Raises:
        ValueError: `batch_size` is not positive, or a loss is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    losses = []
    for batch in windows.split(batch_size):
        losses.append(-score_tokens(model, batch).log_likelihood.cpu())
        advance(len(batch))
    every = torch.cat(losses)  # [N, W - 1]; entry n is the loss of predicting from position n
    if not every.isfinite().all():
        raise ValueError(
            "the model's logits are not finite numbers; try another dtype, such as float32"
        )
    return PerplexityResult(losses=every)
