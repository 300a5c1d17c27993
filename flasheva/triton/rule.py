"""The rule of flasheva/visibility.py inside kernels, and what a tile of queries can see.

Everything is int32. A row of the batch holds documents; `start` is where a query's own document
begins in its row, `begin` where its exact window begins. Both never decrease along a row, so the
first and the last query of a tile bound what the tile sees:

- exact keys from the first query's `begin` to the last query,
- sinks and summaries of the first document, up to the last query's `begin`. Tiles are no larger
  than a window, so the later documents of a tile are still inside their first window: their
  queries see none.
"""

import triton
import triton.language as tl


@triton.jit
def window_start(n, W: tl.constexpr, P: tl.constexpr, SLIDING: tl.constexpr):
    """First position of the exact window of the query at position n >= 0 of its document."""
    if SLIDING:
        return tl.maximum(n - (W - 1), 0) // P * P
    else:
        return n // W * W


@triton.jit
def locate(
    i,
    T,
    q_start,
    seq_start,
    W: tl.constexpr,
    P: tl.constexpr,
    SLIDING: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Position in its row, `start` and `begin` of query index i (tensor or scalar).

    Queries past the last one count as the last one. `seq_start` points at the row's first entry.
    """
    i = tl.minimum(i, T - 1)
    n = q_start + i
    if PACKED:
        start = tl.load(seq_start + i)
    else:
        start = n * 0
    return n, start, start + window_start(n - start, W, P, SLIDING)


@triton.jit
def last_query_of_key(j, start, W: tl.constexpr, P: tl.constexpr, SLIDING: tl.constexpr):
    """Last position of a query whose exact window holds key j of the document from `start`."""
    if SLIDING:
        return j // P * P + (P + W - 2)
    else:
        return start + (j - start) // W * W + (W - 1)


@triton.jit
def first_query_of_chunk(end, start, W: tl.constexpr, SLIDING: tl.constexpr):
    """First position of a query to which the chunk that ends before `end` is a summary."""
    if SLIDING:
        return end + (W - 1)
    else:
        return start + (end - start + (W - 1)) // W * W


@triton.jit
def end_of_document(seq_start, j, T):
    """First index behind j, below T, that belongs to a document that starts behind j."""
    low = j + 1
    high = T
    while low < high:
        middle = (low + high) // 2
        if tl.load(seq_start + middle) > j:
            high = middle
        else:
            low = middle + 1
    return high


@triton.jit
def between(x, low, high):
    """low <= x < high in one comparison; false wherever low >= high."""
    width = tl.maximum(high - low, 0)
    return (x - low).to(tl.uint32, bitcast=True) < width.to(tl.uint32, bitcast=True)


@triton.jit
def whole_tiles(length, BLOCK: tl.constexpr):
    """The part of `length` in whole tiles, or nothing if a loop of its own would not pay."""
    tiles = length // BLOCK
    return tl.where(tiles < 4, 0, tiles) * BLOCK
