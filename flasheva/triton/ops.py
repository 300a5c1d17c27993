"""The op of whole rows, `flasheva::attention`: summaries included, with a backward.

Its fake kernels are for tracing. Ops over a cache: cache_ops.py. Launches: forward.py.

Dims: B batch, H query heads, G key/value heads, R = H / G, D head dim, T tokens, N keys,
C chunks whose summary somebody sees.
"""

import os
from typing import Any

import torch
from torch import Tensor

from flasheva.config import EvaConfig
from flasheva.summary import SummaryMaps
from flasheva.triton import backward, forward
from flasheva.triton.arguments import alike, int32, read_maps, rows_apart, sizes
from flasheva.triton.call import Maps, call_of, like_projection, num_summaries

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_attention(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: SummaryMaps | None,
    bias: Tensor | None,
    seq_start: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """Attention over whole rows, summaries included; arguments as `flasheva.eva_attention`."""
    kind, tensors = read_maps(maps, k)
    dtype, (q, k, v) = q.dtype, alike(q, k, v)
    differentiable = [q, k, v, *tensors, *([] if bias is None else [bias])]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    out: Tensor = _attention(
        *(q, k, v, tensors, bias, seq_start, noise),
        *(config.window_size, config.chunk_size, config.sink_size, config.window, kind, save),
    )[0]
    return out.to(dtype)


@torch.library.custom_op("flasheva::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: list[Tensor],
    bias: Tensor | None,
    seq_start: Tensor | None,
    noise: Tensor | None,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    summary_map: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, then what the backward needs: lse, k_rfa, v_rfa, q_mean, k_mean, omega.

    What only the backward needs is [0] unless `save`.
    """
    q, k, v = (rows_apart(x) for x in (q, k, v))
    seq_start = int32(seq_start)
    c = call_of(q, k, seq_start, window_size, chunk_size, sink_size, window)
    if summary_map == "none":
        k_rfa, v_rfa = (k.new_empty((c.B, c.G, 0, c.D)) for _ in range(2))
        norms = None
        q_mean, k_mean, omega = (k.new_empty(0, dtype=torch.float32) for _ in range(3))
    else:
        k_rfa, v_rfa, norms, q_mean, k_mean, omega = forward.summaries(
            c, q, k, v, summary_map, Maps.of(summary_map, maps), noise, save
        )
    out, lse = forward.attend(c, q, k, v, k_rfa, v_rfa, norms, bias, seq_start, None, 0, save)
    return out, lse, k_rfa, v_rfa, q_mean, k_mean, omega


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: list[Tensor],
    bias: Tensor | None,
    seq_start: Tensor | None,
    noise: Tensor | None,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    summary_map: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    C = 0
    if summary_map != "none":
        packed = seq_start is not None
        C = num_summaries(T, window_size, chunk_size, window == "sliding", packed)
    lse = q.new_empty((B, H, T) if save else (0,), dtype=torch.float32)
    k_rfa, v_rfa = (k.new_empty((B, k.shape[1], C, D)) for _ in range(2))
    q_mean, k_mean, omega = (
        k.new_empty(shape, dtype=torch.float32)
        for shape in forward.saved_shapes(k, C, summary_map, save)
    )
    return like_projection(B, H, T, D, q), lse, k_rfa, v_rfa, q_mean, k_mean, omega


@torch.library.custom_op("flasheva::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: list[Tensor],
    bias: Tensor | None,
    seq_start: Tensor | None,
    out: Tensor,
    lse: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    q_mean: Tensor,
    k_mean: Tensor,
    omega: Tensor,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    summary_map: str,
) -> list[Tensor]:
    """Gradients of q, k, v, then of the bias if there is one, then what `_split_maps` splits."""
    do, q, k, v = (rows_apart(x) for x in (do, q, k, v))
    seq_start = int32(seq_start)
    c = call_of(q, k, seq_start, window_size, chunk_size, sink_size, window)
    inputs = backward.Inputs(
        do=do,
        q=q,
        k=k,
        v=v,
        bias=None if bias is None else bias.contiguous(),
        seq_start=seq_start,
        lse=lse,
        delta=backward.output_dot(c, out, do),
        k_rfa=k_rfa,
        v_rfa=v_rfa,
        q_mean=q_mean,
        k_mean=k_mean,
        omega=omega,
        maps=Maps.of(summary_map, maps),
        kind=summary_map,
    )
    return backward.gradients(c, inputs)


def _split_maps(grads: list[Tensor], num_maps: int) -> list[Tensor]:
    """Views of what `map_grad_shapes` describes, in the order of `flatten`."""
    if num_maps == 2:
        return list(grads[0].unbind(1))
    if num_maps == 0:
        return []
    products = [part for grad in grads[0] for part in (grad[:-1], grad[-1])]
    return products + [vector for grad in grads[1:] for vector in grad]


@_attention_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: list[Tensor],
    bias: Tensor | None,
    seq_start: Tensor | None,
    out: Tensor,
    lse: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    q_mean: Tensor,
    k_mean: Tensor,
    omega: Tensor,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    summary_map: str,
) -> list[Tensor]:
    grads = [like_projection(*sizes(x), x) for x in (q, k, v)]
    if bias is not None:
        grads.append(torch.empty_like(bias, dtype=torch.float32))
    shapes = backward.map_grad_shapes(summary_map, k.shape[1], k.shape[3])
    return grads + [k.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, maps, bias, seq_start, _noise, *static, _save = inputs
    ctx.static = static
    ctx.num_maps = len(maps)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *maps, bias, seq_start, *output)


def _backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Any, ...]:
    q, k, v, *rest = ctx.saved_tensors
    maps, (bias, seq_start, *saved) = rest[: ctx.num_maps], rest[ctx.num_maps :]
    dq, dk, dv, *others = _attention_backward(
        *(do, q, k, v, maps, bias, seq_start, *saved, *ctx.static)
    )
    dbias = None if bias is None else others.pop(0).to(bias.dtype)
    if len({x.dtype for x in maps}) == 1:  # all at once
        others = [grad.to(maps[0].dtype) for grad in others]
    dmaps = [
        grad.to(x.dtype) for grad, x in zip(_split_maps(others, len(maps)), maps, strict=True)
    ]
    return (dq, dk, dv, dmaps, dbias, *([None] * (3 + len(ctx.static))))


_attention.register_autograd(_backward, setup_context=_setup_context)
