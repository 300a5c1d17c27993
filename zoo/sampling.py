"""Sampling: from the logits of a batch to its next tokens, without a host sync."""

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.arguments import as_float, as_int, shown

# Dividing by less overflows float32; above it, other tokens have no chance already.
_COLD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; names, meanings and order as in transformers' `generate`.

    Attributes:
        temperature: 0 (the default) takes the most likely token; otherwise logits are divided
            by it.
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens that together reach this probability.
        min_p: keep tokens with at least this fraction of the best one's probability.
        repetition_penalty: above 1, tokens of the prompt and of the text so far lose.
        seed: of the random numbers; None draws a new one.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        top_k, seed = as_int(self.top_k), as_int(self.seed)
        temperature, penalty = as_float(self.temperature), as_float(self.repetition_penalty)
        top_p, min_p = as_float(self.top_p), as_float(self.min_p)
        for name, good, what in (
            ("temperature", temperature is not None and temperature >= 0, "at least 0"),
            (
                "top_k",
                self.top_k is None or (top_k is not None and top_k >= 1),
                "an int of at least 1",
            ),
            (
                "top_p",
                self.top_p is None or (top_p is not None and 0 < top_p <= 1),
                "above 0 and at most 1",
            ),
            (
                "min_p",
                self.min_p is None or (min_p is not None and 0 <= min_p <= 1),
                "between 0 and 1",
            ),
            ("repetition_penalty", penalty is not None and penalty > 0, "above 0"),
            (
                "seed",
                self.seed is None or (seed is not None and 0 <= seed < 2**63),
                "an int between 0 and 2**63 - 1",
            ),
        ):
            if not good:
                raise ValueError(f"{name} must be {what}, not {shown(getattr(self, name))}")
        # Plain numbers of NumPy's: what is equal is compiled once, and torch.compile takes a
        # float of NumPy's for a tensor, whose values it cannot branch on.
        for name, value in (
            *(("top_k", top_k), ("seed", seed), ("temperature", temperature)),
            *(("top_p", top_p), ("min_p", min_p), ("repetition_penalty", penalty)),
        ):
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _COLD

    def generator(self, device: torch.device) -> torch.Generator:
        """The stream of random numbers for one call."""
        generator = torch.Generator(device=device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def noise(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor | None:
    """The random numbers of one choice, float32 [B, V]; None where nothing is left to chance."""
    if sampling.greedy:
        return None
    return _exponential(torch.empty_like(logits, dtype=torch.float32), generator)


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, random: Tensor | None) -> Tensor:
    """Chooses one token per row; without a generator, which torch.compile cannot trace.

    Args:
        logits: [B, V].
        seen: bool [B, V], tokens of the row's prompt and text so far.
        sampling: how.
        random: from `noise`.

    Returns:
        int64 [B].
    """
    if random is None:
        return _penalised(logits, seen, sampling).argmax(-1)
    return _race(probabilities(logits, seen, sampling), random)


def probabilities(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """What `choose` draws from: float32 [B, V], rows that sum to 1."""
    logits = _penalised(logits, seen, sampling)
    if sampling.greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    return keep(logits / sampling.temperature, sampling).softmax(-1)


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [B], drawn from rows of weights [B, V], which need not sum to 1."""
    return _race(weights, _exponential(torch.empty_like(weights), generator))


def _exponential(empty: Tensor, generator: torch.Generator) -> Tensor:
    return empty.exponential_(1, generator=generator)


def _race(weights: Tensor, noise: Tensor) -> Tensor:
    # The largest of p / e with e ~ Exp(1) is a draw from p (the exponential race), without the
    # host sync of torch.multinomial.
    return (weights / noise).argmax(-1)


def _penalised(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """float32, with the repetition penalty."""
    logits = logits.float()
    if sampling.repetition_penalty == 1.0:
        return logits
    penalty = sampling.repetition_penalty
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def keep(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sets the logits [B, V] that top_k, top_p and min_p rule out to minus infinity.

    Tokens that are as likely as the last one kept are kept too.
    """
    lowest = float("-inf")
    best = None  # in descending order
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        best = logits.topk(sampling.top_k, dim=-1).values
        logits = logits.masked_fill(logits < best[:, -1:], lowest)
    if sampling.top_p is not None and sampling.top_p < 1:
        if best is None:  # of the whole vocabulary, which takes many times as long as topk
            best = logits.sort(dim=-1, descending=True).values
        top = best[:, :1]  # taken off first: a sum of large logits would round small differences
        total = (logits - top).exp().sum(-1, keepdim=True)
        probabilities = (best - top).exp() / total
        # A token goes when those before it reach top_p already; the first one never goes.
        # Not even for a top_p that float32 would round to 0.
        top_p = max(sampling.top_p, torch.finfo(torch.float32).tiny)
        surplus = probabilities.cumsum(-1) - probabilities >= top_p
        last = best.masked_fill(surplus, float("inf")).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < last, lowest)
    if sampling.min_p is not None:
        probabilities = logits.softmax(-1)
        floor = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < floor, lowest)
    return logits
