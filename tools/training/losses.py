"""head_losses: cross entropy and KL to a teacher, without the logits of a whole batch.

With logits s = h W^T + b of the student and t of the teacher, labels y and temperature c, of each
token whose label is not -100:

    cross_entropy = logsumexp(s) - s_y
    logit_kl      = c^2 sum_v q_v (log q_v - log p_v),   q = softmax(t / c), p = softmax(s / c)

Logits of all tokens in float32 would be the largest tensor of a training step: 6.4 GB for 16 rows
of 2,048 tokens and a vocabulary of 49,152. So tokens come in pieces. Each piece's gradient,

    d cross_entropy / ds = softmax(s) - onehot(y),   d logit_kl / ds = c (p - q),

goes into those of h, W and b while its logits exist: nothing is computed twice, and the gradients
wait for `backward`, which only scales them.

`torch.compile` takes it whole; with a `backend` a piece is compiled, and the loop is not. Under
FSDP2 the head's weight must be gathered: see `head_losses`.

Under autocast the products run in its dtype. Softmax, sums and the sum of the pieces' gradients
are float32 at least.

Dims: B rows, T tokens, N = B T, E hidden, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes import LossName
from zoo.compile_apart import Backend, compile_apart

IGNORED = -100  # the label of tokens that do not count
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
    settings = _Settings(
        cross_entropy=weights.get("cross_entropy", 0.0),
        logit_kl=weights.get("logit_kl", 0.0),
        temperature=temperature,
        piece=piece or 1 << (max(PIECE // V, 1).bit_length() - 1),
        dtype=_dtype_of(hidden),
        needs_gradient=torch.is_grad_enabled(),
    )
    total, cross_entropy, kl = _HeadLosses.apply(  # type: ignore[no-untyped-call]
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


class _Settings(NamedTuple):
    cross_entropy: float  # the weight, as the next one
    logit_kl: float
    temperature: float
    piece: int
    dtype: torch.dtype  # of the products
    needs_gradient: bool  # inside an autograd function, nobody can ask


class _HeadLosses(torch.autograd.Function):
    """The objective, cross entropy and KL; only the first one has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # the context of autograd has no type
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        settings: _Settings,
        backend: Backend | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = _piece_in_a_graph if backend is None else _compiled_piece(settings, backend)
        wide = torch.promote_types(settings.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = (
            settings.needs_gradient and need for need in ctx.needs_input_grad[:3]
        )
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums over pieces are wide even where the weights are not.
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        sums = hidden.new_zeros(2, dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(settings.dtype), None if bias is None else bias.to(settings.dtype)
            if teacher_weight is not None:
                teacher_weight = teacher_weight.to(settings.dtype)
            if teacher_bias is not None:
                teacher_bias = teacher_bias.to(settings.dtype)
            for first in range(0, len(hidden), settings.piece):
                part = slice(first, first + settings.piece)
                t = None if teacher_hidden is None else teacher_hidden[part]
                losses, *rest = run(
                    *(hidden[part], w, b, labels[part], t, teacher_weight, teacher_bias),
                    d_weight,
                    d_bias,
                    settings,
                    needs_hidden,
                )
                sums += losses
                gradients = iter(rest)
                if d_hidden is not None:
                    d_hidden[part] = next(gradients)
                if d_weight is not None:
                    d_weight = next(gradients)
                if d_bias is not None:
                    d_bias = next(gradients)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        if d_bias is not None and bias is not None:
            d_bias = d_bias.to(bias.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        cross_entropy, kl = sums.unbind()
        cross_entropy, kl = cross_entropy.clone(), kl.clone()
        ctx.mark_non_differentiable(cross_entropy, kl)
        total = settings.cross_entropy * cross_entropy + settings.logit_kl * kl
        return total, cross_entropy, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        d_total: Tensor,
        d_cross_entropy: Tensor,
        d_kl: Tensor,
    ) -> tuple[Tensor | None, ...]:
        del d_cross_entropy, d_kl
        # Rounded once: a factor in bfloat16 would be off by up to 0.4%.
        factor = d_total[None]  # not a scalar, which would take the dtype of x
        scaled = [None if x is None else (x * factor).to(x.dtype) for x in ctx.saved_tensors]
        return (*scaled, *[None] * 6)


def _piece(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    settings: _Settings,
    needs_hidden: bool,
) -> tuple[Tensor, ...]:
    """Sums of both losses [2], then the gradients that are needed of hidden, weight and bias.

    Weights are in the dtype of the products. `d_weight` and `d_bias` are the sums over the pieces
    before, and are returned with this one in them: were they added behind it, a compiled graph
    would have those of all pieces at once. It writes into none of its arguments.
    """
    wide = torch.promote_types(settings.dtype, torch.float32)
    # What does not count is 0 here too: 0 times a NaN would be a NaN in the weight's gradient.
    h = hidden.to(settings.dtype).masked_fill((labels == IGNORED)[:, None], 0)
    t = None
    if teacher_hidden is not None and teacher_weight is not None:
        t = F.linear(teacher_hidden.to(settings.dtype), teacher_weight, teacher_bias).to(wide)
    s = F.linear(h, weight, bias).to(wide)
    needs = needs_hidden or d_weight is not None or d_bias is not None
    losses, d_logits = _logit_losses(s, labels, t, settings, needs)
    found = [losses]
    if d_logits is not None:
        low = d_logits.to(settings.dtype)
        if needs_hidden:
            found.append(low @ weight)
        if d_weight is not None and low.dtype == d_weight.dtype:
            found.append(torch.addmm(d_weight, low.T, h))
        elif d_weight is not None:
            found.append(d_weight + low.T @ h)
        if d_bias is not None:
            found.append(d_bias + d_logits.sum(0))
    return tuple(found)


# In a graph of everything it is compiled once, not unrolled: docs/decisions.md.
_piece_in_a_graph = torch.compiler.nested_compile_region(_piece)


@functools.cache
def _compiled_piece(settings: _Settings, backend: Backend) -> Callable[..., tuple[Tensor, ...]]:
    """A handle for each setting: one has at most 8 graphs, such as of the last, shorter piece."""
    return compile_apart(_piece, dynamic=False, backend=backend)


def _logit_losses(
    s: Tensor, labels: Tensor, t: Tensor | None, settings: _Settings, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums of both losses [2], and the objective's gradient of the logits s [n, V].

    It writes into s and t: every tensor of this size counts.
    """
    c = settings.temperature
    ignored = labels == IGNORED
    labels = labels.masked_fill(ignored, 0)[:, None]
    zero = s.new_zeros(())
    cross_entropy, kl, gradient = zero, zero, None
    if settings.cross_entropy:
        log_p = s.log_softmax(-1)
        cross_entropy = -log_p.gather(1, labels).squeeze(1).masked_fill(ignored, 0).sum()
        if needs_gradient:
            gradient = log_p.exp_().scatter_add_(1, labels, log_p.new_full(labels.shape, -1))
            gradient *= settings.cross_entropy
        del log_p
    if settings.logit_kl and t is not None:
        if c != 1:
            s, t = s.div_(c), t.div_(c)
        log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
        q = log_q.exp()
        # Where q is 0, log q may be -inf.
        terms = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0).sum(-1)
        kl = c**2 * terms.masked_fill(ignored, 0).sum()
        del log_q
        if needs_gradient:
            difference = log_p.exp_().sub_(q).mul_(c * settings.logit_kl)
            gradient = difference if gradient is None else gradient.add_(difference)
    if gradient is not None:
        gradient = gradient.masked_fill_(ignored[:, None], 0)
    return torch.stack((cross_entropy, kl)), gradient


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
