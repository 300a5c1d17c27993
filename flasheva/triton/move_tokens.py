"""Kernel that lays out what a piece of a prompt can see, and stores the piece in the cache.

A program owns BLOCK_N rows of `keys` and `values`: the sinks, the ring in the order of its tokens,
and the new tokens. Each slot of the ring is one of these rows, so that the program which reads its
old token is the one that writes the new one, and nobody waits. Layout: flasheva/cache.py.
"""

import triton
import triton.language as tl

from flasheva.triton.summary_forward import stored


@triton.jit
def _move(
    x, sinks, ring, seen, stride, row, slot, source, d, rows, num_sinks, num_old, is_fresh,
    D: tl.constexpr,
):
    """Of keys, or of values; all pointers are those of a row and head of the batch."""
    inside = (d < D)[None, :]
    is_old = row < num_old
    is_new = (row >= num_old) & (row < rows)
    place = tl.where(row < num_sinks, sinks + row * D, ring + slot * D)[:, None] + d[None, :]
    old = tl.load(place, mask=is_old[:, None] & inside, other=0.0)
    address = x + source[:, None] * stride + d[None, :]
    new = tl.load(address, mask=(is_new | is_fresh)[:, None] & inside, other=0.0)
    dtype: tl.constexpr = seen.dtype.element_ty
    shown = tl.where(is_old[:, None], old.to(dtype), new.to(dtype))
    tl.store(seen + row[:, None] * D + d[None, :], shown, mask=(row < rows)[:, None] & inside)
    tl.debug_barrier()  # every warp has read the old token, which lies in the same place
    tl.store(place, stored(new, ring.dtype.element_ty), mask=is_fresh[:, None] & inside)


@triton.jit(do_not_specialize=["T", "num_sinks", "slots", "num_blocks"])
def move_tokens(
    k, v, length, count, sink_k, sink_v, window_k, window_v, keys, values,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    T, num_sinks, slots, num_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Grid: blocks of rows x B * G.

    k, v [B, G, T, D]; the caches are contiguous, [B, G, num_sinks, D] and [B, G, slots, D], and
    `keys` and `values` [B, G, num_sinks + slots + T, D] in the dtype of k. Only the first count[b]
    new tokens of a row are stored.
    """
    block = tl.program_id(0) % num_blocks
    head = tl.cast(tl.program_id(0) // num_blocks, tl.int64)
    g = head % G
    b = head // G
    n = tl.load(length + b).to(tl.int64)
    end = n + tl.load(count + b)
    num_old = num_sinks + slots
    rows = num_old + T
    row = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)

    is_sink = row < num_sinks
    slot = (n + tl.maximum(row - num_sinks, 0)) % slots  # of the token slots - (row - sinks) ago
    newest = end - 1 - (end - 1 - slot + slots) % slots  # the last one that belongs in the slot
    position = tl.where(is_sink, row, newest)
    is_fresh = (row < num_old) & (position >= n) & (position < end)
    source = tl.where(row < num_old, position - n, row - num_old)
    _move(
        k + b * stride_kb + g * stride_kh, sink_k + head * num_sinks * D,
        window_k + head * slots * D, keys + head * rows * D,
        stride_kt, row, slot, source, d, rows, num_sinks, num_old, is_fresh, D,
    )
    _move(
        v + b * stride_vb + g * stride_vh, sink_v + head * num_sinks * D,
        window_v + head * slots * D, values + head * rows * D,
        stride_vt, row, slot, source, d, rows, num_sinks, num_old, is_fresh, D,
    )
