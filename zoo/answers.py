"""answer_log_likelihoods: how likely given texts are behind prompts that a cache holds.

They are read onto the cache as one piece and taken back, so that a prompt is read once for what
the model writes and for what it should have written.

Dims: B rows, V vocabulary, N tokens that are scored behind the first of each row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layers import ModelCache
from zoo.causal_lm import Block, CausalLM

# Positions whose logits exist at a time: 512 of a vocabulary of 128,256 are 263 MB in float32.
_POSITIONS = 512
# Kernels are compiled for what can be taken back, and for pieces of 16 tokens and more.
_ROUND_ROOM, _ROUND_PIECE = 32, 16


def answer_room(answers: Sequence[Sequence[int]]) -> int:
    """The `max_rollback` that a cache needs for these answers, some of which may be empty."""
    read = max(max(map(len, answers)) - 1, 0)
    return -(-read // _ROUND_ROOM) * _ROUND_ROOM


def answer_log_likelihoods(
    model: CausalLM,
    cache: ModelCache,
    logits: Tensor,
    answers: Sequence[Sequence[int]],
    blocks: Sequence[Block] | None = None,
) -> list[float]:
    """Of each answer as a whole, in nats; the cache is left as it was.

    Args:
        model: of the cache.
        cache: holds the prompts; from `new_cache` with a `max_rollback` of `answer_room`.
        logits: [B, V], behind the prompts.
        answers: B lists of at least one token.
        blocks: see `CausalLM.hidden_states`.
    """
    device = logits.device
    first = torch.tensor([answer[0] for answer in answers], device=device)
    total = _of(logits, first).cpu().double()
    lengths = torch.tensor([len(answer) - 1 for answer in answers])
    longest = int(lengths.max())
    if longest:
        ids = torch.zeros(len(answers), -(-longest // _ROUND_PIECE) * _ROUND_PIECE).long()
        for number, answer in enumerate(answers):
            ids[number, : len(answer) - 1] = torch.tensor(answer[:-1])
        hidden = model.hidden_states(
            ids.to(device), cache, lengths=lengths.to(device), blocks=blocks
        )
        cache.rollback(lengths.to(device))
        row = torch.repeat_interleave(torch.arange(len(answers)), lengths)
        position = torch.cat([torch.arange(int(length)) for length in lengths])
        targets = torch.tensor([token for answer in answers for token in answer[1:]])
        states = hidden[row.to(device), position.to(device)]  # [N, E]
        parts = zip(states.split(_POSITIONS), targets.to(device).split(_POSITIONS), strict=True)
        rest = torch.cat([_of(model.lm_head(part), target) for part, target in parts])
        total.index_add_(0, row, rest.cpu().double())
    return total.tolist()


def _of(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of one token for each row of logits [N, V], at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
