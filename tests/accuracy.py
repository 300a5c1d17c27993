"""What a fast path may err: at most twice as much as eager attention at the same precision.

Eager attention runs over the same augmented keys; errors are in the norm of the whole tensor.
"""

import torch

from flasheva import EvaConfig, Impl, chunk_summaries, eva_attention
from flasheva.reference import reference_attention
from flasheva.visibility import Positions, visible
from tests.inputs import Inputs

UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}


def attend(config: EvaConfig, x: Inputs, impl: Impl) -> torch.Tensor:
    return eva_attention(
        *(x.q, x.k, x.v, config, x.maps), bias=x.bias, seq_start=x.seq_start, impl=impl
    )


def eager(config: EvaConfig, x: Inputs) -> torch.Tensor:
    """Softmax attention over the augmented keys, every step in the inputs' own dtype."""
    k_rfa, v_rfa = chunk_summaries(config, x.q, x.k, x.v, x.maps)
    T, C = x.q.shape[2], k_rfa.shape[2]
    group = x.q.shape[1] // x.k.shape[1]
    keys = torch.cat([x.k, k_rfa], 2).repeat_interleave(group, 1)
    values = torch.cat([x.v, v_rfa], 2).repeat_interleave(group, 1)
    logits = x.q @ keys.transpose(-1, -2) * x.q.shape[3] ** -0.5
    logits[..., T:] += x.bias.to(x.q.dtype)[:, None, None]
    mask = visible(config, Positions(seq_start=x.seq_start), T, T, C, x.q.device)[:, None]
    return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ values


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    assert torch.isfinite(value).all()
    return float((value.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30))


def assert_as_good_as_eager(
    name: str,
    value: torch.Tensor,
    low: torch.Tensor,
    exact: torch.Tensor,
    unit: float,
    condition: float = 1.0,
    exponential: float = 0.0,
) -> None:
    """`condition` is the size of the summands of `exact` over its own size; `exponential` the
    error of the exponentials."""
    if exact.norm() < 1e-9:  # T = 1: nothing depends on the logits
        assert value.double().cpu().norm() < 1e-3, name
        return
    # Eager may happen to be exact (one key); one rounding of each summand is always allowed.
    allowed = 2 * max(error(low, exact), condition * unit) + condition * exponential
    assert error(value, exact) <= allowed, (name, error(value, exact), allowed)


def condition_of_bias(config: EvaConfig, exact: Inputs, do: torch.Tensor) -> float:
    """The gradient of the bias sums one number per query, of both signs, and every fused backward
    takes that number from an output rounded to the low precision: the error of the sum is that
    of its summands, however much they cancel."""
    B, H, T, D = exact.q.shape
    x = exact.to(torch.float64)
    k_rfa, v_rfa = chunk_summaries(config, x.q, x.k, x.v, x.maps)
    C = k_rfa.shape[2]
    if C == 0:
        return 1.0
    group = H // x.k.shape[1]
    keys = torch.cat([x.k, k_rfa], 2).repeat_interleave(group, 1)
    values = torch.cat([x.v, v_rfa], 2).repeat_interleave(group, 1)
    logits = x.q @ keys.transpose(-1, -2) * D**-0.5
    per_query = x.bias[:, None].expand(B, H, T).clone().requires_grad_()
    logits = torch.cat([logits[..., :T], logits[..., T:] + per_query[..., None]], -1)
    mask = visible(config, Positions(seq_start=x.seq_start), T, T, C, x.q.device)[:, None]
    out = logits.masked_fill(~mask, float("-inf")).softmax(-1) @ values
    (grad,) = torch.autograd.grad(out, per_query, do.double())
    return float(grad.abs().sum((0, 2)).norm() / grad.sum((0, 2)).norm().clamp(min=1e-30))


def condition_of_omega(config: EvaConfig, exact: Inputs, do: torch.Tensor) -> float:
    """The gradients of phi and of a linear q map's bias sum that of omega over chunks (the bias
    over heads, too), in all directions; see condition_of_bias."""
    x = exact.to(torch.float64)
    B, G, T, D = x.k.shape
    if config.chunk_size > T:
        return 1.0
    shift = torch.zeros(B, G, T // config.chunk_size, D, dtype=torch.float64)
    shift.requires_grad_()
    summaries = chunk_summaries(config, x.q, x.k, x.v, x.maps, noise=shift)  # added to omega
    positions = Positions(seq_start=x.seq_start)
    out = reference_attention(config, x.q, x.k, x.v, *summaries, x.bias, positions)
    (grad,) = torch.autograd.grad(out, shift, do.double())
    dims = (0, 2) if config.summary_map == "pooled" else (0, 1, 2)
    return float(grad.abs().sum(dims).norm() / grad.sum(dims).norm().clamp(min=1e-30))


def assert_all_as_good_as_eager(
    config: EvaConfig,
    exact: Inputs,
    dtype: torch.dtype,
    device: str,
    impl: Impl,
    *,
    of_output: float,
    of_gradients: float,
    sums: tuple[str, ...] = ("bias",),
) -> None:
    """Output and every gradient.

    `of_output` and `of_gradients` are what is allowed on top, relative; `sums` names gradients
    whose summands may err and not only the sum, see `condition_of_bias`.
    """
    do = torch.randn(exact.q.shape, generator=torch.Generator().manual_seed(1))
    runs = {}
    for name, x, f in (
        ("exact", exact, lambda x: attend(config, x, "reference")),
        ("eager", exact.to(dtype, device), lambda x: eager(config, x)),
        ("fast", exact.to(dtype, device), lambda x: attend(config, x, impl)),
    ):
        out = f(x.requires_grad())
        out.backward(do.to(device=out.device, dtype=out.dtype))
        runs[name] = {"o": out.detach()} | {
            key: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for key, tensor in x.tensors().items()
        }
    conditions = {"bias": condition_of_bias, "phi": condition_of_omega}
    if config.summary_map == "linear":
        conditions["q.bias"] = condition_of_omega
    for key, value in runs["exact"].items():
        sums_up = key in sums and key in conditions
        condition = conditions[key](config, exact, do) if sums_up else 1.0
        assert_as_good_as_eager(
            f"T={exact.q.shape[2]} {key}",
            *(runs["fast"][key], runs["eager"][key], value),
            UNIT_ROUNDOFF[dtype],
            condition,
            of_output if key == "o" else of_gradients,
        )
