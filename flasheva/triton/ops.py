"""The kernels as ops of PyTorch: fake kernels for tracing, and autograd. Launches: forward.py.

`flasheva::attention` is whole rows, summaries included, with a backward. Without one:
`flasheva::piece` is new tokens over what a cache holds, which it also writes into the cache,
`flasheva::decode` the same for one token per row, and `flasheva::full_piece` new queries of a
layer with full attention.

Dims: B batch, H query heads, G key/value heads, R = H / G, D head dim, T tokens, N keys,
C chunks whose summary somebody sees.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from flasheva.config import EvaConfig
from flasheva.summary import AffineMaps, PooledMaps, SummaryMaps
from flasheva.triton import backward, decode, forward, piece
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
    kind, tensors = _flatten(maps)
    _check_maps(kind, tensors, k.shape[1], k.shape[3])
    dtype, (q, k, v) = q.dtype, _alike(q, k, v)
    differentiable = [q, k, v, *tensors, *([] if bias is None else [bias])]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    out: Tensor = _attention(
        *(q, k, v, tensors, bias, seq_start, noise),
        *(config.window_size, config.chunk_size, config.sink_size, config.window, kind, save),
    )[0]
    return out.to(dtype)


def triton_full_piece(q: Tensor, k: Tensor, v: Tensor, q_start: Tensor) -> Tensor:
    """Exact attention of T new queries per row to all tokens before them; no backward.

    Args:
        q: [B, H, T, D].
        k, v: [B, G, N, D], the token at each position of the row, the new ones too, and behind
            them anything finite.
        q_start: int [B], position of the first query in its row.

    Returns:
        [B, H, T, D] in the dtype of q.
    """
    dtype, (q, k, v) = q.dtype, _alike(q, k, v)
    out: Tensor = _full_piece(q, k, v, q_start)
    return out.to(dtype)


def triton_piece(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: SummaryMaps | None,
    bias: Tensor | None,
    length: Tensor,
    count: Tensor,
    *,
    sinks: tuple[Tensor, Tensor],
    ring: tuple[Tensor, Tensor],
    summaries: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """T new tokens per row: attention over the cache and themselves, and their place in there.

    Args:
        q: [B, H, T, D]; k, v: [B, G, T, D].
        count: int [B], how many of the new tokens are real: others are not stored, and their
            outputs mean nothing.
        The rest: as `triton_decode`.

    Returns:
        [B, H, T, D] in the dtype of q.
    """
    kind, tensors = _flatten(maps)
    _check_maps(kind, tensors, k.shape[1], k.shape[3])
    dtype, (q, k, v) = q.dtype, _alike(q, k, v)
    out: Tensor = _piece(
        *(q, k, v, length, count, bias, *sinks, *ring, *(summaries or (None, None, None))),
        *(tensors, kind),
        *(config.window_size, config.chunk_size, config.sink_size, config.window),
    )
    return out.to(dtype)


def triton_decode(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: SummaryMaps | None,
    bias: Tensor | None,
    length: Tensor,
    count: Tensor,
    *,
    sinks: tuple[Tensor, Tensor] | None,
    ring: tuple[Tensor, Tensor],
    summaries: tuple[Tensor, Tensor, Tensor] | None,
    arrived: Tensor,
) -> Tensor:
    """A step of one token per row: attention over the cache and itself, and its place in there.

    Args:
        config: window, chunk, sinks.
        q: [B, H, 1, D]; k, v: [B, G, 1, D].
        maps: of summaries; None for a layer without.
        bias: [H] or None.
        length: int [B], tokens of each row that the cache holds.
        count: int [B], 1, or 0 for a row that takes no token: its output means nothing.
        sinks: keys, values [B, G, S, D], or None.
        ring: keys, values [B, G, slots, D]; a token at p lies in p % slots.
        summaries: k_rfa, v_rfa [B, G, C, D] and q_sum float32 [B, G, K + 1, D], or None.
        arrived: int32 [B * G], zeros; scratch of the kernel, which leaves zeros.

    Returns:
        [B, H, 1, D] in the dtype of q.
    """
    kind, tensors = _flatten(maps)
    _check_maps(kind, tensors, k.shape[1], k.shape[3])
    dtype, (q, k, v) = q.dtype, _alike(q, k, v)
    out: Tensor = _decode(
        *(q, k, v, length, count, bias, *(sinks or (None, None)), *ring),
        *(summaries or (None, None, None)),
        *(arrived, tensors, kind),
        *(config.window_size, config.chunk_size, config.sink_size, config.window),
    )
    return out.to(dtype)


def _alike(*tensors: Tensor) -> list[Tensor]:
    """In one dtype that holds them all: autocast leaves q and k in float32 after RoPE."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(dtype) for x in tensors]


def _flatten(maps: SummaryMaps | None) -> tuple[str, list[Tensor]]:
    """The kind of map, and [w_q, b_q, w_k, b_k(, g_q, s_q, g_k, s_k)], [phi, mu] or []."""
    if maps is None:
        return "none", []
    if isinstance(maps, PooledMaps):
        return "pooled", [maps.phi, maps.mu]
    assert isinstance(maps, AffineMaps)
    tensors = [maps.q.weight, maps.q.bias, maps.k.weight, maps.k.bias]
    norms = (maps.q.norm_weight, maps.q.norm_bias, maps.k.norm_weight, maps.k.norm_bias)
    if all(x is None for x in norms):
        return "linear", tensors
    return "layernorm", tensors + [x for x in norms if x is not None]


def _check_maps(kind: str, tensors: list[Tensor], G: int, D: int) -> None:
    """Kernels read parameters by pointer: nothing is broadcast."""
    shapes = [(D, D), (D,)] * 2 + [(D,)] * 4
    if kind == "pooled":
        shapes = [(G, D)] * 2
    expected = shapes[: {"none": 0, "linear": 4}.get(kind, len(shapes))]
    found = [tuple(x.shape) for x in tensors]
    if found != expected:
        raise ValueError(f"impl='triton' needs {kind} maps of shapes {expected}, not {found}")


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    B, heads, T, D = x.shape
    return B, heads, T, D


def _rows_apart(x: Tensor) -> Tensor:
    """x with the D entries of a row side by side; a copy only if they are not."""
    # Not contiguous(): where a dim has one entry, that may keep the stride.
    return x if x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


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
    q, k, v = (_rows_apart(x) for x in (q, k, v))
    seq_start = _int32(seq_start)
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
    do, q, k, v = (_rows_apart(x) for x in (do, q, k, v))
    seq_start = _int32(seq_start)
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
    """Views of what `map_grad_shapes` describes, in the order of `_flatten`."""
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
    grads = [like_projection(*_sizes(x), x) for x in (q, k, v)]
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


@torch.library.custom_op("flasheva::full_piece", mutates_args=())
def _full_piece(q: Tensor, k: Tensor, v: Tensor, q_start: Tensor) -> Tensor:
    q, k, v = (_rows_apart(x) for x in (q, k, v))
    nothing = k[:, :, :0]
    # Full attention as a window that no row leaves. Queries are counted in int32.
    c = call_of(q, k, None, 2**30, 16, 0, "block")
    out, _ = forward.attend(
        *(c, q, k, v, nothing, nothing, None, None, None, q_start, k.shape[2]),
        save=False,
        in_place=True,
    )
    return out


@_full_piece.register_fake
def _(q: Tensor, *others: object) -> Tensor:
    return like_projection(*_sizes(q), q)


@torch.library.custom_op(
    "flasheva::piece",
    mutates_args=("sink_k", "sink_v", "window_k", "window_v", "k_rfa", "v_rfa", "q_sum"),
)
def _piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    count: Tensor,
    bias: Tensor | None,
    sink_k: Tensor,
    sink_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    k_rfa: Tensor | None,
    v_rfa: Tensor | None,
    q_sum: Tensor | None,
    maps: list[Tensor],
    kind: str,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
) -> Tensor:
    q, k, v = (_rows_apart(x) for x in (q, k, v))
    summaries = None
    if k_rfa is not None and v_rfa is not None and q_sum is not None:
        summaries = (k_rfa, v_rfa, q_sum)
    c = call_of(q, k, None, window_size, chunk_size, sink_size, window)
    return piece.piece(
        *(c, q, k, v, length, count, bias, (sink_k, sink_v), (window_k, window_v), summaries),
        *(kind, Maps.of(kind, maps)),
    )


@_piece.register_fake
def _(q: Tensor, *others: object) -> Tensor:
    return like_projection(*_sizes(q), q)


@torch.library.custom_op(
    "flasheva::decode",
    mutates_args=(
        *("sink_k", "sink_v", "window_k", "window_v", "k_rfa", "v_rfa", "q_sum", "arrived"),
    ),
)
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    count: Tensor,
    bias: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    window_k: Tensor,
    window_v: Tensor,
    k_rfa: Tensor | None,
    v_rfa: Tensor | None,
    q_sum: Tensor | None,
    arrived: Tensor,
    maps: list[Tensor],
    kind: str,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
) -> Tensor:
    q, k, v = (_rows_apart(x) for x in (q, k, v))
    sinks = None if sink_k is None or sink_v is None else (sink_k, sink_v)
    summaries = None
    if k_rfa is not None and v_rfa is not None and q_sum is not None:
        summaries = (k_rfa, v_rfa, q_sum)
    c = call_of(q, k, None, window_size, chunk_size, sink_size, window)
    return decode.decode(
        *(c, q, k, v, length, count, bias, sinks, (window_k, window_v), summaries, arrived),
        *(kind, Maps.of(kind, maps)),
    )


@_decode.register_fake
def _(q: Tensor, *others: object) -> Tensor:
    return like_projection(*_sizes(q), q)


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()
