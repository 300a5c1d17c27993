"""measure_passkey: does a model find a number that stood somewhere in its prompt?

Scored under teacher forcing: a prompt counts when every token of the answer is the model's most
likely one given the true tokens before it. That is the same as greedy generation reproducing the
answer, because up to the first wrong token both read the same text; and it takes one pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.scoring.passkey_prompts import Prompt
from tools.scoring.tokens import Scorable, score_tokens


@dataclass(frozen=True, kw_only=True)
class PasskeyResult:
    """Over `n` prompts; standard errors are those of a mean of `n` draws.

    Attributes:
        n: prompts.
        accuracy: the part of them whose answer is right as a whole.
        accuracy_error: its standard error, sqrt(p (1 - p) / n).
        log_likelihood: of the whole answer, mean over the prompts; it moves before any answer
            becomes right.
        log_likelihood_error: its standard error; None for a single prompt.
    """

    n: int
    accuracy: float
    accuracy_error: float
    log_likelihood: float
    log_likelihood_error: float | None


def measure_passkey(
    model: Scorable,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 1,
    advance: Callable[[int], None] = lambda steps: None,
) -> PasskeyResult:
    """Scores the answers of prompts of one length.

    Args:
        model: from `zoo.load`.
        prompts: from `PasskeyPrompts.draw`.
        batch_size: prompts that are computed at once.
        advance: called with the number of prompts that were just scored.

    Raises:
        ValueError: `batch_size` is not positive, or the log-likelihoods are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    right: list[bool] = []
    log_likelihoods: list[float] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids = torch.tensor([prompt.ids for prompt in batch])
        longest = max(prompt.answer_size for prompt in batch)
        scores = score_tokens(model, ids, first=ids.shape[1] - longest)
        # Where a tokenizer merges digits, answers differ in length: all end with the row.
        sizes = torch.tensor([prompt.answer_size for prompt in batch])
        in_answer = torch.arange(longest) >= longest - sizes[:, None]
        right += (scores.greedy.cpu() | ~in_answer).all(1).tolist()
        log_likelihoods += (scores.log_likelihood.cpu().double() * in_answer).sum(1).tolist()
        advance(len(batch))
    return _result(torch.tensor(right), torch.tensor(log_likelihoods, dtype=torch.float64))


def _result(right: Tensor, log_likelihoods: Tensor) -> PasskeyResult:
    if not log_likelihoods.isfinite().all():
        raise ValueError(
            "the model's logits are not finite numbers; try another dtype, such as float32"
        )
    n, accuracy = len(right), right.double().mean().item()
    root = math.sqrt(n)
    return PasskeyResult(
        n=n,
        accuracy=accuracy,
        accuracy_error=math.sqrt(accuracy * (1 - accuracy)) / root,
        log_likelihood=log_likelihoods.mean().item(),
        log_likelihood_error=log_likelihoods.std().item() / root if n > 1 else None,
    )
