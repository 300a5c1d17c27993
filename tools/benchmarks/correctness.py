"""Is a kernel right? Its answers against float64, on the tensors that are timed.

The tolerance is not a chosen number but the error of eager attention in the kernel's own dtype
over the same augmented keys `[k ; k_rfa]`, whose summaries are rounded once: a kernel may err at
most twice as much. Every check returns None, or what is wrong in a few words.

Dims: as inputs.py; C chunk summaries, R = H / G.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flasheva import AffineMaps, EvaConfig, chunk_summaries, eva_attention
from flasheva.visibility import Positions, visible
from tools.benchmarks.implementations import Call
from tools.benchmarks.inputs import Inputs

UNIT_ROUNDOFF = {torch.bfloat16: 2**-9, torch.float16: 2**-11, torch.float32: 2**-24}
RIVAL_TOLERANCE = 0.02  # between the full-size gradients of two kernels
_HEADS, _ROWS = 8, 64  # at most so many heads, and at least so many rows in all
_NOTHING = 1e-9  # the norm of a gradient that is zero but for rounding in float64


# Outputs, by a sample of rows


def check_rows(config: EvaConfig, x: Inputs, out: Tensor) -> str | None:
    """Compares a sample of queries of several rows and heads.

    Args:
        config: the rule; summaries are computed here, from x.
        x: what the kernel got.
        out: [B, H, T, D], what it gave.
    """
    if out.shape != x.q.shape or out.dtype != x.q.dtype:
        return f"the output is {out.dtype} {list(out.shape)}, not {x.q.dtype} {list(x.q.shape)}"
    if not out.isfinite().all():
        return "the output has numbers that are not finite"
    exact, low, found = [], [], []
    for sample in _samples(x):
        one_head = _one_key_head(x, sample)
        exact.append(_attend_rows(config, one_head.to(torch.float64), sample))
        low.append(_attend_rows(config, one_head, sample))
        found.append(out[sample.b, sample.h, sample.rows])
    error, allowed = (_row_error(torch.cat(part), torch.cat(exact)) for part in (found, low))
    return _verdict("output", error, 2 * max(allowed, UNIT_ROUNDOFF[x.q.dtype]))


class _Sample(NamedTuple):
    """Queries `rows` (int64 [n]) of one batch row and query head; R query heads share a key."""

    b: int
    h: int
    rows: Tensor
    R: int


def _samples(x: Inputs) -> Iterator[_Sample]:
    B, H, T, _ = x.q.shape
    rng = torch.Generator().manual_seed(0)
    pairs = torch.randperm(B * H, generator=rng)[:_HEADS].tolist()
    count = -(-_ROWS // len(pairs)) * 2
    for pair in pairs:
        rows = torch.randperm(T, generator=rng)[:count]
        rows[0] = T - 1  # where the last tiles are ragged
        b, h = divmod(pair, H)
        yield _Sample(b, h, rows.unique().to(x.q.device), H // x.k.shape[1])


def _one_key_head(x: Inputs, sample: _Sample) -> Inputs:
    """The inputs of one batch row and of the query heads [1, R, T, D] that share one key head."""
    b, g = slice(sample.b, sample.b + 1), sample.h // sample.R
    heads = slice(g * sample.R, (g + 1) * sample.R)
    k, v = (tensor[b, g : g + 1].detach() for tensor in (x.k, x.v))
    q, do = (tensor[b, heads].detach() for tensor in (x.q, x.do))
    bias = None if x.bias is None else x.bias[heads].detach()
    return Inputs(q, k, v, x.maps, bias, do)


@torch.no_grad()
def _attend_rows(config: EvaConfig, x: Inputs, sample: _Sample) -> Tensor:
    """[n, D]: sampled queries over the augmented keys, every step in the dtype of x."""
    k_rfa, v_rfa = chunk_summaries(config, x.q, x.k, x.v, x.maps)
    keys, values = torch.cat([x.k, k_rfa], 2)[0, 0], torch.cat([x.v, v_rfa], 2)[0, 0]
    T, C, n = x.k.shape[2], k_rfa.shape[2], len(sample.rows)
    head = sample.h % sample.R
    logits = x.q[0, head, sample.rows] @ keys.T * keys.shape[1] ** -0.5
    if x.bias is not None:
        logits[:, T:] += x.bias[head]
    mask = visible(config, Positions(query=sample.rows[None]), n, T, C, keys.device)[0]
    return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ values


def _row_error(found: Tensor, exact: Tensor) -> float:
    """The root mean square over rows of each row's relative error.

    Not the norm over all rows: queries that see few keys have by far the longest outputs.
    """
    relative = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(relative.square().mean().sqrt())


# Gradients


def check_gradients(
    prepare: Callable[[EvaConfig, Inputs], Call], config: EvaConfig, x: Inputs
) -> str | None:
    """Compares the output and every gradient of a small call.

    Args:
        prepare: of the implementation.
        config: the rule.
        x: small inputs, because the masks of the comparison are dense.
    """
    call = prepare(config, x.leaves())
    found = _run(call, x.do)
    low = _run_dense(config, x.leaves())
    wide = x.to(torch.float64).leaves()
    reference = eva_attention(
        *(wide.q, wide.k, wide.v, config, wide.maps), bias=wide.bias, impl="reference"
    )
    exact = {"output": reference.detach()} | gradients(reference, wide.differentiable(), wide.do)
    for name, value in exact.items():
        if not found[name].isfinite().all():
            return f"the gradient of {name} has numbers that are not finite"
        if value.norm() < _NOTHING:  # no query sees a summary
            if found[name].double().norm() > 1e-3:
                return f"the gradient of {name} is not zero"
            continue
        condition = _condition_of_bias(config, wide) if name == "bias" else 1.0
        unit = condition * UNIT_ROUNDOFF[x.q.dtype]
        error, allowed = (relative_error(part[name], value) for part in (found, low))
        label = "output" if name == "output" else f"gradient of {name}"
        wrong = _verdict(f"{label} at T = {x.q.shape[2]}", error, 2 * max(allowed, unit))
        if wrong is not None:
            return wrong
    return None


def check_against_rival(
    found: Mapping[str, Tensor], rival: Mapping[str, Tensor] | None
) -> str | None:
    """Gradients at full size: finite, and near the rival's where there is one."""
    for name, value in found.items():
        if not value.isfinite().all():
            return f"the gradient of {name} has numbers that are not finite"
        if rival is not None and rival[name].norm() > 0:
            error = relative_error(value, rival[name])
            wrong = _verdict(f"gradient of {name} against flex", error, RIVAL_TOLERANCE)
            if wrong is not None:
                return wrong
    return None


def gradients(out: Tensor, differentiable: Mapping[str, Tensor], do: Tensor) -> dict[str, Tensor]:
    """Of every input by name; zeros for one that the output does not depend on."""
    found = torch.autograd.grad(out, tuple(differentiable.values()), do, allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(differentiable.items(), found, strict=True)
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    """In the norm of the whole tensor."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _run(call: Call, do: Tensor) -> dict[str, Tensor]:
    out = call.run()
    return {"output": out.detach()} | gradients(out, call.differentiable, do)


def _run_dense(config: EvaConfig, x: Inputs) -> dict[str, Tensor]:
    out = _dense_attention(config, x, None if x.bias is None else x.bias.unsqueeze(-1))
    return {"output": out.detach()} | gradients(out, x.differentiable(), x.do)


def _dense_attention(config: EvaConfig, x: Inputs, bias: Tensor | None) -> Tensor:
    """Softmax attention over the augmented keys, every step in the dtype of x.

    `bias` has the shape [..., H, T or 1], or is None.
    """
    maps: AffineMaps = x.maps
    k_rfa, v_rfa = chunk_summaries(config, x.q, x.k, x.v, maps)
    T, C, R = x.q.shape[2], k_rfa.shape[2], x.q.shape[1] // x.k.shape[1]
    keys = torch.cat([x.k, k_rfa], 2).repeat_interleave(R, 1)
    values = torch.cat([x.v, v_rfa], 2).repeat_interleave(R, 1)
    logits = x.q @ keys.transpose(-1, -2) * x.q.shape[3] ** -0.5
    if bias is not None:
        logits = torch.cat([logits[..., :T], logits[..., T:] + bias.unsqueeze(-1)], -1)
    mask = visible(config, Positions(), T, T, C, x.q.device).unsqueeze(1)
    return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ values


def _condition_of_bias(config: EvaConfig, exact: Inputs) -> float:
    """How far the summands of the bias' gradient cancel: their size over that of their sum.

    The gradient sums one number per query, of both signs, and every fused backward takes that
    number from an output rounded to the low precision: the error of the sum is that of its
    summands, however much they cancel.
    """
    assert exact.bias is not None
    B, H, T, _ = exact.q.shape
    bias = exact.bias.detach().unsqueeze(-1).expand(B, H, T).clone().requires_grad_()
    out = _dense_attention(config, exact, bias)
    (gradient,) = torch.autograd.grad(out, bias, exact.do)
    return float(gradient.abs().sum((0, 2)).norm() / gradient.sum((0, 2)).norm())


def _verdict(what: str, error: float, allowed: float) -> str | None:
    # Not "error > allowed": NaN must not pass.
    return None if error <= allowed else f"{what}: error {error:.2g}, allowed {allowed:.2g}"
