"""Forward kernel: one softmax over exact keys and chunk summaries, read from where they lie.

A program owns BLOCK_M queries of one head and goes through the summaries, the sinks and the exact
keys that its queries see; no tile outside the rule is loaded. Logits are in units of log 2.
"""

import triton
import triton.language as tl

from flasheva.triton.exponential import LOG2_E, exp2
from flasheva.triton.rule import between, locate, whole_tiles

_LOW: tl.constexpr = tl.constexpr(-1.0e30)  # finite: a row that sees nothing yet makes no NaN
# A softmax may stand on a number that its largest logit exceeds by so much: weights up to 2^8, and
# their sums, are exact enough in every dtype.
_ABOVE: tl.constexpr = tl.constexpr(8.0)


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
def _load_sinks(
    pointer, x, stride, d, limit, row_start, offset, D: tl.constexpr, CACHED: tl.constexpr
):
    """Rows of the sinks at positions x; zero at and behind `limit`."""
    row = x
    if CACHED:  # sinks lie first, unless they are among the new tokens
        row += tl.where(x < row_start, 0, offset)
    address = pointer + row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(address, mask=(x < limit)[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def _attend(
    acc, total, peak, q, keys, values, x, low, high, full, bias, scale, PRECISION: tl.constexpr,
):
    """Adds one tile of keys x to the running softmax.

    A query sees those that are not below its `low`, but below its `high`; all of them if `full`.
    `bias`, a number, is added to the logits.
    """
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if not full:
        seen = between(x[None, :], low[:, None], high[:, None])
        logits = tl.where(seen, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale + bias)
    weights = exp2(logits * scale - (new_peak - bias)[:, None], PRECISION == "ieee")
    decay = exp2(peak - new_peak, PRECISION == "ieee")
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def _attend_below(
    acc, total, peak, q, keys, values, bias, scale, PRECISION: tl.constexpr,
):
    """`_attend` to a whole tile whose logits cannot exceed `peak` by much: that stays as it is."""
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    weights = exp2(logits * scale - (peak - bias)[:, None], PRECISION == "ieee")
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, total + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["T", "C", "H", "num_tiles", "key_offset"])
def attention_forward(
    q, k, v, k_rfa, v_rfa, norms, bias, seq_start, q_start, out, lse,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_rb, stride_rh, stride_rt,
    stride_ob, stride_oh, stride_ot,
    T, C, H, num_tiles, key_offset, scale,
    R: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SLIDING: tl.constexpr,
    SUMMARIES: tl.constexpr, NORMS: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr,
    CACHED: tl.constexpr, IN_PLACE: tl.constexpr, SAVE_LSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Grid: tiles of queries x B * H. k_rfa and v_rfa share strides; lse is [B, H, T] contiguous.

    NORMS: norms, float32 [B, G], holds the largest squared norm among the k_rfa of each head.
    CACHED: the queries of row b stand at q_start[b] + i, their keys in the row `key_offset` behind
    where they would lie if the row began there; sinks lie in rows 0 .. S - 1. IN_PLACE: keys lie
    in the rows of their positions, and there are `key_offset` rows.
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

    offset = 0
    if CACHED and not IN_PLACE:
        offset = key_offset - row_start  # of the row of a key from its position
    if S > 0:
        # The first sinks are loaded before the queries, so that the program waits once.
        sinks = tl.arange(0, BLOCK_S)
        sink_high = tl.minimum(first_start + S, last_begin)
        sink = first_start + sinks
        first_keys = _load_sinks(k, sink, stride_kt, d, sink_high, row_start, offset, D, CACHED)
        first_values = _load_sinks(v, sink, stride_vt, d, sink_high, row_start, offset, D, CACHED)
    queries = load_rows(q, first, stride_qt, rows, d, T, D, True)
    if NORMS:  # here, because later they lie where the products want them
        longest = tl.max(tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1))
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.float32) + _LOW

    if S > 0:
        sink_end = tl.where(start == first_start, tl.minimum(first_start + S, begin), 0)
        for i in tl.range(first_start, sink_high, BLOCK_S, num_stages=1):
            sink = i + sinks
            keys, values = first_keys, first_values
            if S > BLOCK_S:
                if i > first_start:
                    keys = _load_sinks(
                        k, sink, stride_kt, d, sink_high, row_start, offset, D, CACHED
                    )
                    values = _load_sinks(
                        v, sink, stride_vt, d, sink_high, row_start, offset, D, CACHED
                    )
            acc, total, peak = _attend(
                acc, total, peak, queries, keys, values, sink, start, sink_end, False, 0.0, scale,
                PRECISION,
            )
    # Exact keys and the summaries that only some queries see share one loop, and so one pipeline.
    # The exact keys come first: then `peak` is a logit that the query sees, not _LOW, and no bias
    # of summaries, however low, is added to that.
    shift = 0.0
    low, middle, high = 0, 0, 0
    if SUMMARIES:
        k_rfa += b * stride_rb + g * stride_rh
        v_rfa += b * stride_rb + g * stride_rh
        if BIAS:
            shift = tl.maximum(tl.load(bias + h).to(tl.float32) * LOG2_E, _LOW)
        # A later document of the tile, or padding past the end of a cache, may begin its window
        # behind the last summary.
        low, high = (first_start + S) // P, tl.minimum(last_begin // P, C)
        middle = low + whole_tiles(tl.minimum(first_begin // P, high) - low, BLOCK_N)
        if PACKED:
            middle = tl.where(last_start == first_start, middle, low)
    num_exact = (last_n - first_begin + BLOCK_N) // BLOCK_N
    num_far = tl.maximum(high - middle + BLOCK_N - 1, 0) // BLOCK_N
    for i in tl.range(0, num_exact + num_far):
        x = first_begin + i * BLOCK_N
        full = (x >= last_begin) & (x + BLOCK_N <= first_n + 1)
        see_low, see_high = begin, n + 1
        row, end = x + offset, last_n + 1 + offset
        if IN_PLACE:  # padding may stand behind the last row
            end = tl.minimum(end, key_offset)
        source_k, source_v, stride_k, stride_v, extra = k, v, stride_kt, stride_vt, 0.0
        if SUMMARIES:
            is_far = i >= num_exact
            x = tl.where(is_far, middle + (i - num_exact) * BLOCK_N, x)
            whole = (x >= (last_start + S) // P) & (x + BLOCK_N <= first_begin // P)
            full = tl.where(is_far, whole, full)
            see_low = tl.where(is_far, (start + S) // P, see_low)
            see_high = tl.where(is_far, begin // P, see_high)
            row, end = tl.where(is_far, x, row), tl.where(is_far, high, end)
            source_k, source_v = tl.where(is_far, k_rfa, k), tl.where(is_far, v_rfa, v)
            stride_k = tl.where(is_far, stride_rt, stride_kt)
            stride_v = tl.where(is_far, stride_rt, stride_vt)
            extra = tl.where(is_far, shift, 0.0)
        keys = load_rows(source_k, row, stride_k, columns, d, end, D, True)
        values = load_rows(source_v, row, stride_v, columns, d, end, D, True)
        acc, total, peak = _attend(
            acc, total, peak, queries, keys, values, x + columns, see_low, see_high, full, extra,
            scale, PRECISION,
        )
    inside = (first + rows) < T
    if SUMMARIES:  # those that every query sees, if they are many
        if NORMS:
            # |q| |k_rfa| bounds their logits. Mostly that is no more than the exact keys gave, and
            # a third of the work, the running maximum and the rescaling, can be left out.
            lowest = tl.min(tl.where(inside, peak, -_LOW))
            bound = tl.sqrt(longest * tl.load(norms + head // R)) * scale * 1.01 + shift
            whole = tl.where(bound < lowest + _ABOVE, middle, low)
            for x in tl.range(low, whole, BLOCK_N):
                keys = load_rows(k_rfa, x, stride_rt, columns, d, 0, D, False)
                values = load_rows(v_rfa, x, stride_rt, columns, d, 0, D, False)
                acc, total = _attend_below(
                    acc, total, peak, queries, keys, values, shift, scale, PRECISION
                )
            low = whole
        for x in tl.range(low, middle, BLOCK_N):
            keys = load_rows(k_rfa, x, stride_rt, columns, d, 0, D, False)
            values = load_rows(v_rfa, x, stride_rt, columns, d, 0, D, False)
            acc, total, peak = _attend(
                acc, total, peak, queries, keys, values, columns, n, n, True, shift, scale,
                PRECISION,
            )

    out += b * stride_ob + h * stride_oh + tl.cast(first, tl.int64) * stride_ot
    tl.store(
        out + rows[:, None] * stride_ot + d[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < D),
    )
    if SAVE_LSE:
        lse += tl.cast(head, tl.int64) * T + first
        tl.store(lse + rows, peak + tl.log2(total), mask=inside)
