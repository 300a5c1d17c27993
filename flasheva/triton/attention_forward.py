"""Forward kernel: one softmax over exact keys and chunk summaries, read from where they lie.

A program owns BLOCK_M queries of one head and goes through the summaries, the sinks and the exact
keys that its queries see; no tile outside the rule is loaded. Logits are in units of log 2.
"""

import triton
import triton.language as tl

from flasheva.triton.exponential import LOG2_E, exp2
from flasheva.triton.rule import between, entries_before, locate, whole_tiles

_LOW: tl.constexpr = tl.constexpr(-1.0e30)  # finite: a row that sees nothing yet makes no NaN


@triton.jit
def load_rows(pointer, first, stride, rows, d, limit, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `first + rows` of a matrix with D columns, zero at and behind row `limit`."""
    address = pointer + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + d[None, :]
    if MASKED:
        if D == d.shape[0]:
            return tl.load(address, mask=(first + rows)[:, None] < limit, other=0.0)
        else:
            mask = ((first + rows)[:, None] < limit) & (d[None, :] < D)
            return tl.load(address, mask=mask, other=0.0)
    elif D == d.shape[0]:
        return tl.load(address)
    else:
        return tl.load(address, mask=d[None, :] < D, other=0.0)


@triton.jit
def _attend(
    acc, total, peak, q, keys, values, seen, full, bias, scale,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Adds one tile of keys to the running softmax; `seen` [queries, keys] matters if not full.

    BIAS: `bias` [keys] is added to the logits.
    """
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if BIAS:
        logits = logits * scale + bias[None, :]
        scale = 1.0
    if not full:
        logits = tl.where(seen, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
    weights = exp2(logits * scale - new_peak[:, None], PRECISION == "ieee")
    decay = exp2(peak - new_peak, PRECISION == "ieee")
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit(do_not_specialize=["T", "C", "H", "num_tiles", "key_offset"])
def attention_forward(
    q, k, v, k_rfa, v_rfa, bias, seq_start, q_start, out, lse,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_rb, stride_rh, stride_rt,
    stride_ob, stride_oh, stride_ot,
    T, C, H, num_tiles, key_offset, scale,
    R: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SLIDING: tl.constexpr,
    SUMMARIES: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, CACHED: tl.constexpr,
    SAVE_LSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Grid: tiles of queries x B * H. k_rfa and v_rfa share strides; lse is [B, H, T] contiguous.

    CACHED: the queries of row b stand at q_start[b] + i, their keys in the row `key_offset` behind
    where they would lie if the row began there; sinks lie in rows 0 .. S - 1.
    """
    # Late tiles see the most summaries: they go first.
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    head = tl.program_id(0) // num_tiles
    h = tl.cast(head % H, tl.int64)
    b = tl.cast(head // H, tl.int64)
    g = h // R
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + g * stride_kh
    v += b * stride_vb + g * stride_vh
    row_start = 0
    if CACHED:
        row_start = tl.cast(tl.load(q_start + b), tl.int32)
    if PACKED:
        seq_start += b * T

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    first = tile * BLOCK_M
    last = first + BLOCK_M - 1
    n, start, begin = locate(first + rows, T, row_start, seq_start, W, P, SLIDING, PACKED)
    first_n, first_start, first_begin = locate(
        first, T, row_start, seq_start, W, P, SLIDING, PACKED
    )
    last_n, last_start, last_begin = locate(last, T, row_start, seq_start, W, P, SLIDING, PACKED)

    queries = load_rows(q, first, stride_qt, rows, d, T, D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.float32) + _LOW

    # What lies before the windows is one list: sinks, then summaries. See rule.py.
    shift = 0.0
    if SUMMARIES:
        k_rfa += b * stride_rb + g * stride_rh
        v_rfa += b * stride_rb + g * stride_rh
        if BIAS:
            shift = tl.maximum(tl.load(bias + h).to(tl.float32) * LOG2_E, _LOW)
    far = tl.where(start == first_start, entries_before(begin - start, S, P, SUMMARIES), 0)
    first_far = entries_before(first_begin - first_start, S, P, SUMMARIES)
    num_entries = entries_before(last_begin - first_start, S, P, SUMMARIES)
    first_chunk = first_start // P + S // P
    if SUMMARIES:
        # A later document of the tile, or padding past the end of a cache, may begin its window
        # behind the last summary.
        num_entries = tl.minimum(num_entries, S + tl.maximum(C - first_chunk, 0))
        first_far = tl.minimum(first_far, num_entries)
    if PACKED:
        first_far = tl.where(last_start == first_start, first_far, 0)

    # Tiles of summaries that every query sees, if they are many, have a loop without masks.
    low: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    high = low
    if SUMMARIES:
        high += whole_tiles(first_far - low, BLOCK_N)
        peak -= shift  # of these logits alone; so the loop need not add it
        for i in tl.range(low, high, BLOCK_N):
            summary = i - S + first_chunk
            keys = load_rows(k_rfa, summary, stride_rt, columns, d, 0, D, False)
            values = load_rows(v_rfa, summary, stride_rt, columns, d, 0, D, False)
            acc, total, peak = _attend(
                acc, total, peak, queries, keys, values, True, True, shift, scale, False, PRECISION
            )
        peak += shift
    # All others and the exact keys share one loop, which so has one pipeline.
    skipped = high - low
    num_far = (num_entries - skipped + BLOCK_N - 1) // BLOCK_N
    num_exact = (last_n - first_begin + BLOCK_N) // BLOCK_N
    for i in tl.range(0, num_far + num_exact):
        is_far = i < num_far
        at = i * BLOCK_N
        at += tl.where(is_far, tl.where(at >= low, skipped, 0), first_begin - num_far * BLOCK_N)
        full = (at >= last_begin) & (at + BLOCK_N <= first_n + 1)
        full = tl.where(is_far, at + BLOCK_N <= first_far, full)
        x = at + columns
        see_low, see_high = tl.where(is_far, 0, begin), tl.where(is_far, far, n + 1)
        seen = between(x[None, :], see_low[:, None], see_high[:, None])

        row = tl.where(is_far, x + first_start, x)
        there = tl.where(is_far, x < num_entries, x <= last_n)
        if CACHED:  # the sinks lie first, unless they are among the new tokens
            row += tl.where(is_far & (x < row_start), 0, key_offset - row_start)
        rows_k, rows_v = k + row.to(tl.int64) * stride_kt, v + row.to(tl.int64) * stride_vt
        extra = tl.zeros([BLOCK_N], tl.float32)
        if SUMMARIES:
            is_summary = is_far & (x >= S)
            row = (x - S + first_chunk).to(tl.int64) * stride_rt
            rows_k = tl.where(is_summary, k_rfa + row, rows_k)
            rows_v = tl.where(is_summary, v_rfa + row, rows_v)
            extra = tl.where(is_summary, shift, extra)
        mask = there[:, None] & (d[None, :] < D)
        keys = tl.load(rows_k[:, None] + d[None, :], mask=mask, other=0.0)
        values = tl.load(rows_v[:, None] + d[None, :], mask=mask, other=0.0)
        acc, total, peak = _attend(
            acc, total, peak, queries, keys, values, seen, full, extra, scale, BIAS, PRECISION
        )

    out += b * stride_ob + h * stride_oh + tl.cast(first, tl.int64) * stride_ot
    inside = (first + rows) < T
    tl.store(
        out + rows[:, None] * stride_ot + d[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < D),
    )
    if SAVE_LSE:
        lse += tl.cast(head, tl.int64) * T + first
        tl.store(lse + rows, peak + tl.log2(total), mask=inside)
