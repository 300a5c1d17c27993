"""Launch of a decode step: one new token per row, appended to its cache and attended to."""

import functools

import torch
from torch import Tensor

from flasheva.triton.call import (
    Call,
    Maps,
    capability_of,
    ceil_div,
    like_projection,
    power_of_2,
)
from flasheva.triton.decode_step import decode_step

# Programs that run on a multiprocessor of Hopper at once.
_PROGRAMS = 4


def decode(
    c: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    count: Tensor,
    bias: Tensor | None,
    sinks: tuple[Tensor, Tensor] | None,
    ring: tuple[Tensor, Tensor],
    summaries: tuple[Tensor, Tensor, Tensor] | None,
    arrived: Tensor,
    kind: str,
    maps: Maps,
) -> Tensor:
    """The output [B, H, 1, D]; the caches are written in place. Arguments: see ops.py."""
    out = like_projection(c.B, c.H, 1, c.D, q)
    window_k, window_v = ring
    sink_k, sink_v = sinks or (window_k, window_v)
    k_rfa, v_rfa, q_sum = summaries or (window_k, window_v, window_k)
    R, slots = c.H // c.G, window_k.shape[2]
    block_n = 64 if c.block_d * c.dtype.itemsize <= 128 else 32
    held = c.S + slots + (0 if summaries is None else k_rfa.shape[2])
    splits = splits_of(c.B * c.G, held, block_n, multiprocessors(q.device))
    found = q.new_empty((c.B * c.G, splits, R, c.D + 2), dtype=torch.float32)
    c.launch(
        decode_step,
        (c.B * c.G, splits + 1),
        *(q, k, v, out, length.contiguous(), count.contiguous()),
        None if bias is None else bias.contiguous(),
        *(sink_k, sink_v, window_k, window_v, k_rfa, v_rfa, q_sum, *maps, found, arrived),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
        *(v.stride(0), v.stride(1), out.stride(0), out.stride(1)),
        *(slots, sink_k.shape[2], k_rfa.shape[2], c.scale),
        G=c.G,
        R=R,
        D=c.D,
        **c.rule,
        # Without summaries it has no meaning: a kernel for each size of a cache would be compiled.
        SUMS=1 if summaries is None else q_sum.shape[2],
        MAP=kind,
        BIAS=bias is not None,
        PRECISION=c.precision,
        SPLITS=splits,
        BLOCK_R=max(16, power_of_2(R)),
        BLOCK_D=c.block_d,
        BLOCK_P=power_of_2(c.P),
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=3,
    )
    return out


def splits_of(heads: int, entries: int, block_n: int, processors: int) -> int:
    """Among how many programs the entries of a row and head are shared.

    As many as run at once: what waits for a place makes a second round. A power of 2: kernels are
    compiled for it, and caches have many sizes.
    """
    most = min(_PROGRAMS * processors // heads, ceil_div(entries, 2 * block_n))
    return 1 << (max(most, 1).bit_length() - 1)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; a few in the interpreter."""
    if capability_of(device) == 0:
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
