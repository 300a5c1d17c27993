"""score_tokens: how likely a model finds the tokens of given rows, and which it would write.

Dims: B rows, T tokens, A scored tokens, E hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Positions whose logits exist at a time: 512 of a vocabulary of 128,256 are 263 MB in float32,
# where those of a whole window of 8,192 would be 4.2 GB.
_POSITIONS = 512


class Scorable(Protocol):
    """What is needed of a model: every `zoo.CausalLM` has it."""

    @property
    def device(self) -> torch.device: ...
    @property
    def lm_head(self) -> Callable[[Tensor], Tensor]: ...
    def hidden_states(self, ids: Tensor, /) -> Tensor: ...


class TokenScores(NamedTuple):
    """Of each scored token, on the model's device.

    Attributes:
        log_likelihood: float [B, A], at least float32.
        greedy: bool [B, A], whether it is the most likely one.
    """

    log_likelihood: Tensor
    greedy: Tensor


@torch.inference_mode()
def score_tokens(model: Scorable, ids: Tensor, *, first: int = 1) -> TokenScores:
    """Scores the tokens `ids[:, first:]`, each given all that stand before it in its row.

    Args:
        model: from `zoo.load`.
        ids: int [B, T], on any device.
        first: index of the first scored token, at least 1: nothing predicts token 0.

    Returns:
        Scores of A = T - first tokens a row.
    """
    assert 1 <= first < ids.shape[1]
    ids = ids.to(model.device)
    hidden = model.hidden_states(ids)[:, first - 1 : -1]
    targets = ids[:, first:]
    log_likelihood, greedy = [], []
    for states, target in zip(
        hidden.flatten(0, 1).split(_POSITIONS), targets.flatten().split(_POSITIONS), strict=True
    ):
        logits = model.lm_head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.gather(1, target[:, None]).squeeze(1)
        log_likelihood.append(chosen - logits.logsumexp(1))
        greedy.append(logits.argmax(1) == target)
    return TokenScores(
        torch.cat(log_likelihood).view_as(targets), torch.cat(greedy).view_as(targets)
    )
