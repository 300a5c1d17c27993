"""Forward kernel: one softmax over exact keys and chunk summaries, read from where they lie.

A program owns BLOCK_M queries of one head and goes through the summaries, the sinks and the exact
keys that its queries see; no tile outside the rule is loaded. Logits are in units of log 2.
"""

import triton
import triton.language as tl

from flasheva.triton.exponential import LOG2_E, exp2
from flasheva.triton.rule import between, locate, whole_tiles

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
    acc, total, peak, q, keys, values, seen, full, bias, scale, PRECISION: tl.constexpr,
):
    """Adds one tile of keys to the running softmax; `seen` [queries, keys] matters if not full."""
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if not full:
        logits = tl.where(seen, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale + bias)
    weights = exp2(logits * scale - (new_peak - bias)[:, None], PRECISION == "ieee")
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

    # Summaries that every query of the tile sees, if they are many.
    shift = 0.0
    low, high = 0, 0
    if SUMMARIES:
        k_rfa += b * stride_rb + g * stride_rh
        v_rfa += b * stride_rb + g * stride_rh
        if BIAS:
            shift = tl.load(bias + h).to(tl.float32) * LOG2_E
        # Padding behind a row's real queries may stand past the end of a cache.
        low, high = (first_start + S) // P, tl.minimum(last_begin // P, C)
        middle = (last_start + S) // P
        middle += whole_tiles(tl.minimum(first_begin // P, C) - middle, BLOCK_N)
        if not PACKED:
            for x in tl.range(low, middle, BLOCK_N):
                keys = load_rows(k_rfa, x, stride_rt, columns, d, 0, D, False)
                values = load_rows(v_rfa, x, stride_rt, columns, d, 0, D, False)
                acc, total, peak = _attend(
                    acc, total, peak, queries, keys, values, True, True, shift, scale, PRECISION
                )
            low = middle
    # The other summaries, the sinks and the exact keys in one loop, which so has one pipeline.
    num_far = tl.maximum(high - low + BLOCK_N - 1, 0) // BLOCK_N
    num_sinks = 0
    if S > 0:
        sink_high = tl.minimum(first_start + S, last_begin)
        num_sinks = (sink_high - first_start + BLOCK_N - 1) // BLOCK_N
        sink_end = tl.where(start == first_start, tl.minimum(first_start + S, begin), 0)
    num_exact = (last_n - first_begin + BLOCK_N) // BLOCK_N
    for i in tl.range(0, num_far + num_sinks + num_exact):
        x = first_begin + (i - num_far - num_sinks) * BLOCK_N
        row, limit = x - row_start + key_offset, last_n + 1 - row_start + key_offset
        see_low, see_high = begin, n + 1
        source_k, source_v, stride_k, stride_v, extra = k, v, stride_kt, stride_vt, 0.0
        full = (x >= last_begin) & (x + BLOCK_N <= first_n + 1)
        lines = columns
        if S > 0:
            at_sinks = i < num_far + num_sinks
            x = tl.where(at_sinks, first_start + (i - num_far) * BLOCK_N, x)
            row = tl.where(at_sinks, x, row)
            limit = tl.where(at_sinks, sink_high, limit)
            see_low = tl.where(at_sinks, start, see_low)
            see_high = tl.where(at_sinks, sink_end, see_high)
            full &= not at_sinks
            if CACHED:  # sinks that are among the new tokens lie with those
                new = at_sinks & (x + columns >= row_start)
                lines = columns + tl.where(new, key_offset - row_start, 0)
                limit = tl.where(at_sinks, key_offset + T, limit)
        if SUMMARIES:
            is_far = i < num_far
            x = tl.where(is_far, low + i * BLOCK_N, x)
            row = tl.where(is_far, x, row)
            limit = tl.where(is_far, high, limit)
            see_low = tl.where(is_far, (start + S) // P, see_low)
            see_high = tl.where(is_far, begin // P, see_high)
            full &= not is_far
            source_k = tl.where(is_far, k_rfa, k)
            source_v = tl.where(is_far, v_rfa, v)
            stride_k = tl.where(is_far, stride_rt, stride_kt)
            stride_v = tl.where(is_far, stride_rt, stride_vt)
            extra = tl.where(is_far, shift, 0.0)
        keys = load_rows(source_k, row, stride_k, lines, d, limit, D, True)
        values = load_rows(source_v, row, stride_v, lines, d, limit, D, True)
        seen = between((x + columns)[None, :], see_low[:, None], see_high[:, None])
        acc, total, peak = _attend(
            acc, total, peak, queries, keys, values, seen, full, extra, scale, PRECISION
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
