"""Forward kernel: one softmax over exact keys and chunk summaries, read from where they lie.

A program owns BLOCK_M queries of one head and goes through the summaries, the sinks and the exact
keys that its queries see; no tile outside the rule is loaded. Logits are in units of log 2.
"""

import triton
import triton.language as tl

from flasheva.triton.rule import between, locate

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
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
    acc, total, peak, q, k, v, stride_k, stride_v, d, low, high, shift, see_low, see_high,
    bias, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Adds keys low .. high - 1 to the running softmax.

    Key x lies in row x - shift; a query sees it where see_low <= x < see_high. Without MASKED
    every query sees all of them and BLOCK_N divides their number.
    """
    columns = tl.arange(0, BLOCK_N)
    for x in tl.range(low, high, BLOCK_N):
        keys = load_rows(k, x - shift, stride_k, columns, d, high - shift, D, MASKED)
        logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            seen = between((x + columns)[None, :], see_low[:, None], see_high[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1) * scale + bias)
        weights = tl.exp2(logits * scale - (new_peak - bias)[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, 1)
        values = load_rows(v, x - shift, stride_v, columns, d, high - shift, D, MASKED)
        acc = tl.dot(
            weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION
        )
        peak = new_peak
    return acc, total, peak


@triton.jit
def attention_forward(
    q, k, v, k_rfa, v_rfa, bias, seq_start, q_start, out, lse,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_rb, stride_rh, stride_rt,
    stride_ob, stride_oh, stride_ot,
    T, num_tiles, key_offset, scale,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SLIDING: tl.constexpr,
    SUMMARIES: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, CACHED: tl.constexpr,
    SAVE_LSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Grid: tiles of queries x B * H. k_rfa and v_rfa share strides; lse is [B, H, T] contiguous.

    CACHED: the queries of row b stand at q_start[b] + i, their keys in the row `key_offset` behind
    where they would lie if the row began there; sinks lie in rows 0 .. S - 1.
    """
    # Late tiles see the most summaries: they go first.
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    head = tl.program_id(0) // num_tiles
    h = head % H
    b = tl.cast(head // H, tl.int64)
    g = h // R
    q += b * stride_qb + tl.cast(h, tl.int64) * stride_qh
    k += b * stride_kb + tl.cast(g, tl.int64) * stride_kh
    v += b * stride_vb + tl.cast(g, tl.int64) * stride_vh
    row_start = 0
    if CACHED:
        row_start = tl.load(q_start + b).to(tl.int32)
    if PACKED:
        seq_start += b * T

    rows = tl.arange(0, BLOCK_M)
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

    if SUMMARIES:
        k_rfa += b * stride_rb + tl.cast(g, tl.int64) * stride_rh
        v_rfa += b * stride_rb + tl.cast(g, tl.int64) * stride_rh
        shift = 0.0
        if BIAS:
            shift = tl.load(bias + h).to(tl.float32) * LOG2_E
        low = (first_start + S) // P
        high = last_begin // P
        middle = low
        if not PACKED:
            middle += tl.maximum(first_begin // P - low, 0) // BLOCK_N * BLOCK_N
            acc, total, peak = _attend(
                acc, total, peak, queries, k_rfa, v_rfa, stride_rt, stride_rt, d, low, middle, 0,
                start, begin, shift, scale, D, BLOCK_N, False, PRECISION,
            )
        acc, total, peak = _attend(
            acc, total, peak, queries, k_rfa, v_rfa, stride_rt, stride_rt, d, middle, high, 0,
            (start + S) // P, begin // P, shift, scale, D, BLOCK_N, True, PRECISION,
        )
    if S > 0:
        if last_begin > first_start:
            sink_end = tl.where(start == first_start, tl.minimum(first_start + S, begin), 0)
            acc, total, peak = _attend(
                acc, total, peak, queries, k, v, stride_kt, stride_vt, d,
                first_start, first_start + S, 0,
                start, sink_end, 0.0, scale, D, BLOCK_S, True, PRECISION,
            )
    acc, total, peak = _attend(
        acc, total, peak, queries, k, v, stride_kt, stride_vt, d,
        first_begin, last_n + 1, row_start - key_offset,
        begin, n + 1, 0.0, scale, D, BLOCK_N, True, PRECISION,
    )

    out += b * stride_ob + tl.cast(h, tl.int64) * stride_oh + tl.cast(first, tl.int64) * stride_ot
    inside = (first + rows) < T
    tl.store(
        out + rows[:, None] * stride_ot + d[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < D),
    )
    if SAVE_LSE:
        lse += tl.cast(head, tl.int64) * T + first
        tl.store(lse + rows, peak + tl.log2(total), mask=inside)
