"""Launches of the backward pass, in the order of what depends on what.

delta, then the gradients of summaries, then what those pass to tokens and maps, then dk and dv,
then dq and the shares of bias and sinks, then the sinks. Dims as in ops.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flasheva.triton import key_gradients as of_keys
from flasheva.triton import query_gradients as of_queries
from flasheva.triton.call import Call, Maps, ceil_div, like_projection, strides
from flasheva.triton.summary_backward import map_gradients, summary_backward

_SINK_ENTRIES = 64  # of the gradient of the sinks, summed by one program
_MAP_SHARES = 128  # programs among which the gradient of a map is split


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the backward pass reads.

    Attributes:
        do, q, k, v: [B, H or G, T, D], entries of a row side by side.
        bias: [H] or None, contiguous.
        seq_start: int32 [B, T] or None, contiguous.
        lse, delta: float32 [B, H, T].
        k_rfa, v_rfa, q_mean, k_mean, omega: what the forward pass saved.
        maps, kind: parameters, and "none", "linear", "layernorm" or "pooled".
    """

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    seq_start: Tensor | None
    lse: Tensor
    delta: Tensor
    k_rfa: Tensor
    v_rfa: Tensor
    q_mean: Tensor
    k_mean: Tensor
    omega: Tensor
    maps: Maps
    kind: str


class ToTokens(NamedTuple):
    """What summaries pass on, float32; see summary_backward.py.

    Per token [B, G, C * P]: weights, logit_grads, pool, pool_grads; per chunk [B, G, C, D] the
    others; vector_shares [B, G, blocks, 4, D].
    """

    weights: Tensor
    logit_grads: Tensor
    pool: Tensor
    pool_grads: Tensor
    q_mean_grad: Tensor
    k_mean_grad: Tensor
    dz_q: Tensor
    dz_k: Tensor
    vector_shares: Tensor


def output_dot(c: Call, out: Tensor, do: Tensor) -> Tensor:
    """delta, float32 [B, H, T]."""
    delta = out.new_empty((c.B, c.H, c.T), dtype=torch.float32)
    block = 64
    num_tiles = ceil_div(c.T, block)
    c.launch(
        of_queries.output_dot,
        (num_tiles * c.B * c.H,),
        *(out, do, delta, *strides(out), *strides(do), c.T, c.H, num_tiles),
        D=c.D,
        BLOCK_D=c.block_d,
        BLOCK_M=block,
    )
    return delta


def summary_gradients(c: Call, x: Inputs) -> tuple[Tensor, Tensor]:
    """dk_rfa, dv_rfa, float32 [B, G, C, D]."""
    dk_rfa, dv_rfa = x.k.new_empty((2, c.B, c.G, c.C, c.D), dtype=torch.float32)
    tile = c.tile("summaries")
    c.launch(
        of_keys.summary_gradients,
        (ceil_div(c.C, tile.block_n) * c.B * c.G,),
        *(x.q, x.k_rfa, x.v_rfa, x.bias, x.seq_start, x.do, x.lse, x.delta, dk_rfa, dv_rfa),
        *(*strides(x.q), *strides(x.k_rfa), *strides(x.do), c.T, c.C, c.H, c.B * c.G, c.scale),
        **_common(c),
        BIAS=x.bias is not None,
        PRECISION=c.precision,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )
    return dk_rfa, dv_rfa


def through_summaries(c: Call, x: Inputs, dk_rfa: Tensor, dv_rfa: Tensor) -> ToTokens:
    """From the gradients of summaries to what their tokens and maps get."""
    num_blocks = ceil_div(c.C, c.summary_tile(x.kind).block_c)
    per_token = x.k.new_empty((4, c.B, c.G, c.C * c.P), dtype=torch.float32)
    per_chunk = x.k.new_empty((4, c.B, c.G, c.C, c.D), dtype=torch.float32)
    vector_shares = x.k.new_empty((c.B, c.G, num_blocks, 4, c.D), dtype=torch.float32)
    to = ToTokens._make((*per_token, *per_chunk, vector_shares))
    m = x.maps
    c.launch(
        summary_backward,
        (num_blocks * c.B * c.G,),
        *(x.k, x.v, m.w_q, m.b_q, m.w_k, m.b_k, m.g_q, m.g_k, x.q_mean, x.k_mean, x.omega),
        *(dk_rfa, dv_rfa, *to, *strides(x.k), *strides(x.v), c.C, num_blocks, c.D**-0.5),
        **c.of_summaries(x.kind),
    )
    return to


def key_gradients(
    c: Call, x: Inputs, dk_rfa: Tensor, dv_rfa: Tensor, to: ToTokens
) -> tuple[Tensor, Tensor]:
    """dk, dv [B, G, T, D], but for the sinks' shares."""
    dk, dv = (like_projection(c.B, c.G, c.T, c.D, x.k) for _ in range(2))
    pooled = x.kind == "pooled"
    tile = c.tile("keys")
    num_tiles = ceil_div(c.T, tile.block_n)
    c.launch(
        of_keys.key_gradients,
        (num_tiles * c.B * c.G,),
        *(x.q, x.k, x.v, x.seq_start, x.do, x.lse, x.delta, x.omega, dv_rfa),
        dk_rfa if pooled else to.k_mean_grad,
        *(to.weights, to.logit_grads, to.pool, to.pool_grads, x.maps.w_k, dk, dv),
        *(*strides(x.q), *strides(x.k), *strides(x.v), *strides(x.do), *strides(dk)),
        *(c.T, c.C, c.H, num_tiles, c.scale),
        **_common(c),
        SUMMARIES=x.k_rfa.shape[2] > 0,
        POOLED=pooled,
        PRECISION=c.precision,
        CHUNKS=c.chunks_of(tile.block_n),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )
    return dk, dv


def query_gradients(c: Call, x: Inputs, to: ToTokens) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, H, T, D], shares of the bias [B, H, tiles], of the sinks [B, H, tiles, 2, S, D]."""
    tile = c.tile("queries")
    num_tiles = ceil_div(c.T, tile.block_m)
    dq = like_projection(c.B, c.H, c.T, c.D, x.q)
    bias_shares = x.q.new_empty((c.B, c.H, num_tiles), dtype=torch.float32)
    sink_shares = x.q.new_empty((c.B, c.H, num_tiles, 2, c.S, c.D))
    summaries = x.k_rfa.shape[2] > 0
    c.launch(
        of_queries.query_gradients,
        (num_tiles * c.B * c.H,),
        *(x.q, x.k, x.v, x.k_rfa, x.v_rfa, x.bias, x.seq_start, x.do, x.lse, x.delta),
        *(to.q_mean_grad, dq, bias_shares, sink_shares),
        *(*strides(x.q), *strides(x.k), *strides(x.v), *strides(x.k_rfa), *strides(x.do)),
        *(*strides(dq), c.T, c.C, c.H, num_tiles, c.scale),
        **_common(c),
        SUMMARIES=summaries,
        QUERY_MEANS=summaries and x.kind != "pooled",
        BIAS=x.bias is not None,
        PRECISION=c.precision,
        CHUNKS=c.chunks_of(tile.block_m),
        BLOCK_S=c.sink_tile,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )
    return dq, bias_shares, sink_shares


def add_sink_gradients(c: Call, x: Inputs, sink_shares: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Adds the shares of the sinks to dk and dv."""
    num_tiles = sink_shares.shape[2]
    documents = num_tiles if c.packed else 1
    c.launch(
        of_queries.add_sink_gradients,
        (ceil_div(c.S * c.D, _SINK_ENTRIES) * documents * c.B * c.G, 2),
        *(sink_shares, x.seq_start, dk, dv, *strides(dk), c.T, c.H, num_tiles),
        **_common(c) | {"BLOCK_D": _SINK_ENTRIES},
        BLOCK_M=c.tile("queries").block_m,
        BLOCK_T=32,
        num_warps=1,
    )


def map_grads(c: Call, x: Inputs, to: ToTokens) -> list[Tensor]:
    """Float32, of the shapes that `map_grad_shapes` gives."""
    if x.kind == "pooled":
        return [to.vector_shares[:, :, :, :2].sum((0, 2))]
    rows = x.q_mean.numel() // c.D
    block = 64 if c.block_d <= 64 else 32
    columns = c.block_d if c.block_d <= 128 else 64
    num_shares = min(_MAP_SHARES, ceil_div(rows, block))
    shares = x.q_mean.new_empty((num_shares, 2, c.D + 1, c.D))
    c.launch(
        map_gradients,
        (num_shares, 2, ceil_div(c.D, columns)),
        *(to.dz_q, x.q_mean, to.dz_k, x.k_mean, shares, rows, num_shares),
        D=c.D,
        PRECISION="ieee" if c.dtype == torch.float32 else "tf32x3",
        BLOCK_D=c.block_d,
        BLOCK_R=block,
        COLUMNS=columns,
        num_warps=8 if c.block_d > 64 else 4,
    )
    grads = [shares.sum(0)]
    if x.kind == "layernorm":
        grads.append(to.vector_shares.sum((0, 1, 2)))
    return grads


def map_grad_shapes(kind: str, G: int, D: int) -> list[tuple[int, ...]]:
    """Of few tensors, because each reduction and each cast is a launch; ops.py splits them.

    Both maps' weights with their biases as a last row; LayerNorm's four vectors; or phi and mu.
    """
    if kind == "pooled":
        return [(G, 2, D)]
    shapes: list[tuple[int, ...]] = [(2, D + 1, D), (4, D)]
    return shapes[: {"none": 0, "linear": 1, "layernorm": 2}[kind]]


def gradients(c: Call, x: Inputs) -> list[Tensor]:
    """dq, dk, dv, then the gradient of the bias if there is one, then those of the maps."""
    if x.k_rfa.shape[2] > 0:
        dk_rfa, dv_rfa = summary_gradients(c, x)
        to = through_summaries(c, x, dk_rfa, dv_rfa)
        of_maps = map_grads(c, x, to)
    else:  # nothing reads what stands for them
        nothing = x.k.new_empty(0, dtype=torch.float32)
        dk_rfa = dv_rfa = nothing
        to = ToTokens(*[nothing] * len(ToTokens._fields))
        shapes = map_grad_shapes(x.kind, c.G, c.D)
        of_maps = [x.k.new_zeros(shape, dtype=torch.float32) for shape in shapes]
    dk, dv = key_gradients(c, x, dk_rfa, dv_rfa, to)
    dq, bias_shares, sink_shares = query_gradients(c, x, to)
    if c.S > 0:
        add_sink_gradients(c, x, sink_shares, dk, dv)
    grads = [dq, dk, dv]
    if x.bias is not None:
        seen = x.k_rfa.shape[2] > 0
        grads.append(bias_shares.sum((0, 2)) if seen else torch.zeros_like(x.bias).float())
    return grads + of_maps


def _common(c: Call) -> dict[str, object]:
    return {
        "R": c.H // c.G,
        "D": c.D,
        "PACKED": c.packed,
        "BLOCK_D": c.block_d,
        **c.rule,
    }
