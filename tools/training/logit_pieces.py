"""LogitLosses: the losses of a head and their gradients, a piece of the tokens at a time.

Logits of all tokens in float32 would be the largest tensor of a training step: 6.4 GB for 16 rows
of 2,048 tokens and a vocabulary of 49,152. So tokens come in pieces. Each piece's gradient,

    d cross_entropy / ds = softmax(s) - onehot(y),   d logit_kl / ds = c (p - q),

goes into those of h, W and b while its logits exist: nothing is computed twice, and the gradients
wait for `backward`, which only scales them. Formulas of the losses: losses.py.

Under autocast the products run in its dtype. Softmax, sums and the sum of the pieces' gradients
are float32 at least.

Dims: N tokens, n of a piece, E hidden, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.compile_apart import Backend, compile_apart

IGNORED = -100  # the label of tokens that do not count


class Settings(NamedTuple):
    """Of one call, and of the graph of its pieces."""

    cross_entropy: float  # the weight, as the next one
    logit_kl: float
    temperature: float
    piece: int
    dtype: torch.dtype  # of the products
    needs_gradient: bool  # inside an autograd function, nobody can ask


class LogitLosses(torch.autograd.Function):
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
        settings: Settings,
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
    settings: Settings,
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
def _compiled_piece(settings: Settings, backend: Backend) -> Callable[..., tuple[Tensor, ...]]:
    """A handle for each setting: one has at most 8 graphs, such as of the last, shorter piece."""
    return compile_apart(_piece, dynamic=False, backend=backend)


def _logit_losses(
    s: Tensor, labels: Tensor, t: Tensor | None, settings: Settings, needs_gradient: bool
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
