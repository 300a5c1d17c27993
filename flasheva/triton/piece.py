"""Launches of a piece of a prompt: T new tokens per row, stored in its cache and attended.

They are laid out behind what the cache holds and stored in it, the chunks that they complete are
compressed, and then they attend to all of it.
"""

import torch
from torch import Tensor

from flasheva.triton.call import Call, Maps, ceil_div, strides
from flasheva.triton.forward import attend
from flasheva.triton.move_tokens import move_tokens
from flasheva.triton.summary_forward import summary_forward


def piece(
    c: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    count: Tensor,
    bias: Tensor | None,
    sinks: tuple[Tensor, Tensor],
    ring: tuple[Tensor, Tensor],
    summaries: tuple[Tensor, Tensor, Tensor] | None,
    kind: str,
    maps: Maps,
) -> Tensor:
    """The output [B, H, T, D]; the caches are written in place. Arguments: see ops.py."""
    length, count = length.contiguous(), count.contiguous()
    keys, values = _laid_out(c, k, v, length, count, sinks, ring)
    k_rfa = v_rfa = keys[:, :, :0]
    if summaries is not None:
        _compress(c, q, keys, values, length, count, summaries, kind, maps)
        # The last entry is nobody's summary. A cache in float8 is read as a copy.
        k_rfa, v_rfa = (x[:, :, :-1].to(q.dtype) for x in summaries[:2])
    offset = keys.shape[2] - c.T
    out, _ = attend(
        *(c, q, keys, values, k_rfa, v_rfa, None, bias, None, length, offset), save=False
    )
    return out


def _laid_out(
    c: Call,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    count: Tensor,
    sinks: tuple[Tensor, Tensor],
    ring: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, sinks + slots + T, D] that the new tokens may see."""
    num_sinks, slots = sinks[0].shape[2], ring[0].shape[2]
    rows = num_sinks + slots + c.T
    keys, values = (k.new_empty((c.B, c.G, rows, c.D)) for _ in range(2))
    block = 64 if c.block_d * c.dtype.itemsize <= 256 else 32
    num_blocks = ceil_div(rows, block)
    c.launch(
        move_tokens,
        (num_blocks * c.B * c.G,),
        *(k, v, length, count, *(sinks if num_sinks else ring), *ring, keys, values),
        *(*strides(k), *strides(v)),
        *(c.T, num_sinks, slots, num_blocks),
        G=c.G,
        D=c.D,
        BLOCK_D=c.block_d,
        BLOCK_N=block,
        num_warps=4,
    )
    return keys, values


def _compress(
    c: Call,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    count: Tensor,
    summaries: tuple[Tensor, Tensor, Tensor],
    kind: str,
    maps: Maps,
) -> None:
    """Writes the summaries of complete chunks, and the running sums of queries."""
    k_rfa, v_rfa, q_sum = summaries
    block = c.summary_tile(kind).block_c
    num_blocks = ceil_div((c.T + 2 * c.P - 2) // c.P, block)
    # A map in parts reads the means back from memory.
    shape = (c.B, c.G, num_blocks * block, c.D) if c.map_part < c.block_d else (0,)
    q_mean, k_mean = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    c.launch(
        summary_forward,
        (num_blocks * c.B * c.G,),
        *(q, keys, values, None, *maps, k_rfa, v_rfa, None, q_mean, k_mean, None),
        *(q_sum, length, count),
        *(*strides(q), *strides(keys), *strides(values)),
        *(k_rfa.shape[2], num_blocks, keys.shape[2] - c.T, c.D**-0.5),
        **c.of_summaries(kind),
        NOISE=False,
        SAVE=False,
        NORMS=False,
        CACHED=True,
        SUMS=q_sum.shape[2],
    )
