"""head_losses: cross entropy and KL to a teacher, without the logits of a whole batch.

With logits s = h W^T + b of the student and t of the teacher, labels y and temperature c, of each
token whose label is not -100:

    cross_entropy = logsumexp(s) - s_y
    logit_kl      = c^2 sum_v q_v (log q_v - log p_v),   q = softmax(t / c), p = softmax(s / c)

Logits come in pieces (logit_pieces.py). `torch.compile` takes all of it; with a `backend` a piece
is compiled, and the loop is not. Under FSDP2 the head's weight must be gathered: see
`head_losses`.

Dims: B rows, T tokens, E hidden, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes import LossName
from tools.training.logit_pieces import IGNORED, LogitLosses, Settings
from zoo.compile_apart import Backend

PIECE = 2**26  # logits at a time: 256 MiB in float32


@dataclass(frozen=True)
class TokenSum:
    """A sum over tokens and their number, so that means over several batches and ranks are right.

    Attributes:
        total: a scalar, float32 at least.
        count: int64, a scalar on the same device.
    """

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """`total / count`, 0 of no tokens."""
        return self.total / self.count.clamp(min=1)


@dataclass(frozen=True)
class Teacher:
    """What the teacher's logits are made of.

    Attributes:
        hidden: [B, T, E'], what its `lm_head` takes; gets no gradient.
        head: its `lm_head`.
    """

    hidden: Tensor
    head: nn.Linear


@dataclass(frozen=True)
class HeadLosses:
    """What `head_losses` returns.

    Attributes:
        objective: the weighted sum of the losses; its total has a gradient.
        losses: each of them, unweighted and without a gradient.
    """

    objective: TokenSum
    losses: dict[LossName, TokenSum]


def head_losses(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    *,
    weights: Mapping[LossName, float],
    teacher: Teacher | None = None,
    temperature: float = 1.0,
    piece: int | None = None,
    backend: Backend | None = None,
) -> HeadLosses:
    """Sums of cross entropy and KL over the tokens that have a label.

    Divide by the number of tokens of the whole step, all micro-batches and ranks, before
    `backward`. It works once: gradients of gradients are refused.

    It reads the head's weight and does not call the head, so FSDP2 does not gather it for this.
    Call it, `hidden_states` and the teacher in the `forward` of a module that holds the models,
    and make that one the root: `fully_shard(module)`, behind `fully_shard(block)` of the blocks.
    The root's weights, those of embedding, norm and head, then are there in all of `forward`.

    Args:
        hidden: [B, T, E], what `lm_head` takes.
        head: `lm_head`; its weight may be that of the embedding.
        labels: int64 [B, T], the token that follows each one; -100 where none counts.
        weights: of "cross_entropy", "logit_kl" or both.
        teacher: for "logit_kl".
        temperature: c, of "logit_kl".
        piece: tokens at a time; None: the power of 2 that has at most 2^26 logits, so that those
            of a batch are mostly of one size.
        backend: of torch.compile, which then makes a graph of a piece; None: it is not asked.

    Raises:
        ValueError: another loss, a teacher that is missing or has another vocabulary, shapes that
            do not fit, a temperature or piece out of range.
    """
    _check(hidden, head, labels, weights, teacher, temperature, piece)
    V = head.out_features
    names = tuple(weights)
    settings = Settings(
        cross_entropy=weights.get("cross_entropy", 0.0),
        logit_kl=weights.get("logit_kl", 0.0),
        temperature=temperature,
        piece=piece or 1 << (max(PIECE // V, 1).bit_length() - 1),
        dtype=_dtype_of(hidden),
        needs_gradient=torch.is_grad_enabled(),
    )
    total, cross_entropy, kl = LogitLosses.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1),
        head.weight,
        head.bias,
        labels.flatten(),
        None if teacher is None else teacher.hidden.detach().flatten(0, 1),
        None if teacher is None else teacher.head.weight.detach(),
        None if teacher is None or teacher.head.bias is None else teacher.head.bias.detach(),
        settings,
        backend,
    )
    count = (labels != IGNORED).sum()
    sums = {"cross_entropy": TokenSum(cross_entropy, count), "logit_kl": TokenSum(kl, count)}
    return HeadLosses(TokenSum(total, count), {name: sums[name] for name in names})


def _dtype_of(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _check(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    weights: Mapping[LossName, float],
    teacher: Teacher | None,
    temperature: float,
    piece: int | None,
) -> None:
    if not weights or not set(weights) <= {"cross_entropy", "logit_kl"}:
        raise ValueError(
            f"weights must be of 'cross_entropy', 'logit_kl' or both, not {list(weights)}"
        )
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden must be [B, T, E] and labels [B, T], not {list(hidden.shape)} and "
            f"{list(labels.shape)}"
        )
    if "logit_kl" in weights:
        if teacher is None:
            raise ValueError("'logit_kl' needs a teacher")
        if teacher.head.out_features != head.out_features:
            raise ValueError(
                f"the teacher has {teacher.head.out_features} logits, the student "
                f"{head.out_features}: distillation needs the same vocabulary"
            )
        if teacher.hidden.shape[:2] != labels.shape:
            raise ValueError(
                f"the teacher's hidden states are {list(teacher.hidden.shape)}, but labels are "
                f"{list(labels.shape)}"
            )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if piece is not None and piece < 1:
        raise ValueError(f"piece must be at least 1 token, not {piece}")
