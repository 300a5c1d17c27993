"""Chunk summaries: one key and one value that stand for the P tokens of a chunk.

With `qbar_c`, `kbar_c` the means over chunk `c` (`qbar_c` also over the query heads of a group),
EVA with one random feature per chunk (FlashEVA, section 3; EVA, section 4) is

    k_rfa_c = f_k(kbar_c)
    omega_c = f_q(qbar_c) + k_rfa_c  (+ noise)
    v_rfa_c = sum_m softmax_m(s * omega_c . k_m - s/2 * |k_m|^2) v_m

The softmax is computed in the centred form `s * (omega_c - kbar_c) . d_m - s/2 * |d_m|^2` with
`d_m = k_m - kbar_c`: the difference is constant in `m`, and large keys cancel nothing.

Dims: B batch, H query heads, G key/value heads, D head dim, C chunks, P chunk_size.
All of it runs in float32 (float64 for float64 inputs); results are rounded once, to k's dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flasheva.config import EvaConfig

_LAYERNORM_EPS = 1e-5


class AffineMap(NamedTuple):
    """`f(x) = x @ weight.T + bias`, then LayerNorm if it has norm parameters.

    `weight` is [D, D]; `bias`, `norm_weight` and `norm_bias` are [D].
    """

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


class AffineMaps(NamedTuple):
    """f_q and f_k of a layer, shared by its heads (`summary_map` "linear" and "layernorm")."""

    q: AffineMap
    k: AffineMap


class PooledMaps(NamedTuple):
    """EvaByte's query-free form: learned vectors per key/value head, [G, D] each.

    `k_rfa_c = sum_m softmax_m(s * mu . k_m) k_m` and `omega_c = phi`.
    """

    mu: Tensor
    phi: Tensor


SummaryMaps = AffineMaps | PooledMaps


def summary_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that summaries of `dtype` inputs are computed in: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def query_sums(q: Tensor, num_key_value_heads: int) -> Tensor:
    """Sums queries over the heads of each group.

    Args:
        q: [B, H, ..., D].
        num_key_value_heads: G, a divisor of H.

    Returns:
        [B, G, ..., D], float32 or float64.
    """
    grouped = q.unflatten(1, (num_key_value_heads, q.shape[1] // num_key_value_heads))
    return grouped.to(summary_dtype(q.dtype)).sum(2)


def summarize(
    k: Tensor,
    v: Tensor,
    q_mean: Tensor,
    maps: SummaryMaps,
    *,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summarises chunks whose tokens are laid out chunk by chunk.

    Args:
        k, v: [B, G, C, P, D], any floating dtype.
        q_mean: [B, G, C, D], the mean over chunk and group, float32 or float64.
        maps: the layer's maps.
        noise: [B, G, C, D], added to omega; None in evaluation and for pooled maps.

    Returns:
        k_rfa, v_rfa: [B, G, C, D] in the dtype of k.
    """
    dtype = summary_dtype(k.dtype)
    k_BGCPD, v_BGCPD = k.to(dtype), v.to(dtype)
    scale = k.shape[-1] ** -0.5
    k_mean = k_BGCPD.mean(-2)
    centred = k_BGCPD - k_mean.unsqueeze(-2)
    if isinstance(maps, PooledMaps):
        mu, phi = maps.mu.to(dtype), maps.phi.to(dtype)
        pool = (scale * (centred * mu[:, None, None]).sum(-1)).softmax(-1)
        k_rfa = k_mean + (pool.unsqueeze(-1) * centred).sum(-2)
        omega = phi[:, None].expand_as(k_mean)
    else:
        k_rfa = _apply(maps.k, k_mean)
        omega = _apply(maps.q, q_mean.to(dtype)) + k_rfa
    if noise is not None:
        omega = omega + noise.to(dtype)
    projected = (centred * (omega - k_mean).unsqueeze(-2)).sum(-1)
    weights = (scale * (projected - 0.5 * centred.square().sum(-1))).softmax(-1)
    v_rfa = (weights.unsqueeze(-1) * v_BGCPD).sum(-2)
    return k_rfa.to(k.dtype), v_rfa.to(k.dtype)


def chunk_summaries(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: SummaryMaps,
    *,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summarises every complete chunk of a row.

    Args:
        config: for the chunk size P.
        q: [B, H, T, D]; k, v: [B, G, T, D]; position t of the row belongs to chunk t // P.
        maps, noise: see `summarize`.

    Returns:
        k_rfa, v_rfa: [B, G, T // P, D] in the dtype of k; an incomplete last chunk has none.
    """
    P = config.chunk_size
    C = k.shape[2] // P
    # The incomplete chunk, or one of padding, is summarised too and dropped in the end: of the
    # complete ones alone, whether a slice of tokens is contiguous depends on T % P == 0, on which
    # torch.compile specialises, in casts and in gradients of slices.
    behind = (C + 1) * P - k.shape[2]
    q, k, v = (F.pad(x, (0, 0, 0, behind)) for x in (q, k, v))
    k_BGCPD, v_BGCPD = (x.unflatten(2, (C + 1, P)) for x in (k, v))
    sums = query_sums(q, k.shape[1]).unflatten(2, (C + 1, P)).sum(3)
    q_mean = sums / (P * (q.shape[1] // k.shape[1]))
    if noise is not None:
        noise = F.pad(noise, (0, 0, 0, 1))
    k_rfa, v_rfa = summarize(k_BGCPD, v_BGCPD, q_mean, maps, noise=noise)
    return k_rfa[:, :, :C], v_rfa[:, :, :C].to(v.dtype)


def _apply(f: AffineMap, x: Tensor) -> Tensor:
    # A D x D product on 1/P of the tokens. In float64, because PyTorch may run float32 products
    # in TF32 by a global setting that no caller should have to know about.
    y = F.linear(x.double(), f.weight.double(), f.bias.double()).to(x.dtype)
    if f.norm_weight is None or f.norm_bias is None:
        return y
    norm_weight, norm_bias = f.norm_weight.to(x.dtype), f.norm_bias.to(x.dtype)
    return F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, _LAYERNORM_EPS)
