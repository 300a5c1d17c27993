"""Launches of the forward pass: summaries, then attention over keys and summaries.

Dims as in ops.py.
"""

import torch
from torch import Tensor

from flasheva.triton.attention_forward import attention_forward
from flasheva.triton.call import Call, Maps, ceil_div, like_projection, strides
from flasheva.triton.summary_forward import summary_forward

# Fewer summaries of a row are not worth a launch that clears their norms.
_MANY_SUMMARIES = 256

# k_rfa, v_rfa, norms or None, q_mean, k_mean, omega.
Summaries = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]


def saved_shapes(k: Tensor, C: int, kind: str, save: bool) -> list[tuple[int, ...]]:
    """Of q_mean, k_mean and omega."""
    if not save or kind == "none":
        return [(0,)] * 3
    B, G, _, D = k.shape
    shape = (B, G, C, D)
    # Pooled maps have no use for the means of queries.
    return [(0,) if kind == "pooled" else shape, shape, shape]


def summaries(
    c: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    maps: Maps,
    noise: Tensor | None,
    save: bool,
) -> Summaries:
    """k_rfa, v_rfa and their norms for `attend`; for the backward q_mean, k_mean, omega.

    Norms, means and omega are float32.
    """
    C = c.C
    norms = k.new_zeros((c.B, c.G), dtype=torch.float32) if C >= _MANY_SUMMARIES else None
    k_rfa, v_rfa = (k.new_empty((c.B, c.G, C, c.D)) for _ in range(2))
    # A map in parts reads the means back from memory.
    in_parts = c.map_part < c.block_d
    saved = [
        k.new_empty(shape, dtype=torch.float32)
        for shape in saved_shapes(k, C, kind, save or in_parts)
    ]
    if noise is not None:
        noise = noise[:, :, :C].contiguous()
    num_blocks = ceil_div(C, c.summary_tile(kind).block_c)
    c.launch(
        summary_forward,
        (num_blocks * c.B * c.G,),
        *(q, k, v, noise, *maps, k_rfa, v_rfa, norms, *saved, None, None, None),
        *(*strides(q), *strides(k), *strides(v)),
        *(C, num_blocks, 0, c.D**-0.5),
        **c.of_summaries(kind),
        NOISE=noise is not None,
        SAVE=save,
        NORMS=norms is not None,
        CACHED=False,
        SUMS=0,
    )
    if not save:
        saved = [k.new_empty(0, dtype=torch.float32) for _ in saved]
    return k_rfa, v_rfa, norms, saved[0], saved[1], saved[2]


def attend(
    c: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    norms: Tensor | None,
    bias: Tensor | None,
    seq_start: Tensor | None,
    q_start: Tensor | None,
    key_offset: int,
    save: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp [B, H, T] in units of log 2 ([0] unless `save`)."""
    out = like_projection(c.B, c.H, c.T, c.D, q)
    lse = q.new_empty((c.B, c.H, c.T) if save else (0,), dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    q_start = None if q_start is None else q_start.contiguous()
    tile = c.tile("forward")
    num_tiles = ceil_div(c.T, tile.block_m)
    c.launch(
        attention_forward,
        (num_tiles * c.B * c.H,),
        *(q, k, v, k_rfa, v_rfa, norms, bias, seq_start, q_start, out, lse),
        *(*strides(q), *strides(k), *strides(v), *strides(k_rfa), *strides(out)),
        *(c.T, k_rfa.shape[2], c.H, num_tiles, key_offset, c.scale),
        R=c.H // c.G,
        D=c.D,
        **c.rule,
        SUMMARIES=k_rfa.shape[2] > 0,
        NORMS=norms is not None,
        BIAS=bias is not None,
        PACKED=c.packed,
        CACHED=q_start is not None,
        IN_PLACE=in_place,
        SAVE_LSE=save,
        PRECISION=c.precision,
        BLOCK_D=c.block_d,
        BLOCK_S=c.sink_tile,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )
    return out, lse
