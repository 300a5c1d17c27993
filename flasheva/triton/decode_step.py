"""Decode kernel: one new token per row against its cache, appended and attended to in one launch.

What a query sees is one list of entries: sinks, summaries, and the tokens of its window, which lie
in a ring. SPLITS programs of each row and key/value head share it; the last one to finish adds up
what they found. One program more appends the token and compresses the chunk that it completes.
Nobody waits for that: the others take the new token from the arguments, and no chunk is visible in
the step that completes it. Layout of the cache: flasheva/cache.py.
"""

import triton
import triton.language as tl

from flasheva.triton.exponential import LOG2_E, exp, exp2
from flasheva.triton.rule import window_start
from flasheva.triton.summary_forward import (
    logits_of,
    normalise,
    pool_logits_of,
    scale_and_shift,
    stored,
)

_LOW: tl.constexpr = tl.constexpr(-1.0e30)  # finite: a split without entries makes no NaN
_ROWS: tl.constexpr = tl.constexpr(16)  # of a map at a time


@triton.jit
def _affine(x, weight, bias, d, D: tl.constexpr):
    """x @ weight.T + bias for one row x [1, BLOCK_D] in float32; weight [D, D] contiguous.

    A few rows of the map at a time: this is rare, and must not cost the others registers.
    """
    y = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    for first in tl.range(0, D, _ROWS):
        row = first + tl.arange(0, _ROWS)
        mask = (row < D)[:, None] & (d < D)[None, :]
        part = tl.load(weight + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        products = tl.sum(part.to(tl.float32) * x, 1)
        y += tl.sum(tl.where(d[:, None] == row[None, :], products[None, :], 0.0), 1)
    return y[None, :]


@triton.jit
def _append(
    q, k, v, n, sink_k, sink_v, window_k, window_v, k_rfa, v_rfa, q_sum,
    w_q, b_q, w_k, b_k, g_q, s_q, g_k, s_k,
    stride_qh, slots, scale, g,
    R: tl.constexpr, D: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SUMS: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Writes the token at position n; all pointers are those of its row and head."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    new_key = tl.load(k + d, mask=inside, other=0.0)
    new_value = tl.load(v + d, mask=inside, other=0.0)
    cache_dtype: tl.constexpr = window_k.dtype.element_ty
    slot = n % slots
    tl.store(window_k + slot * D + d, stored(new_key, cache_dtype), mask=inside)
    tl.store(window_v + slot * D + d, stored(new_value, cache_dtype), mask=inside)
    if n < S:
        tl.store(sink_k + n * D + d, stored(new_key, cache_dtype), mask=inside)
        tl.store(sink_v + n * D + d, stored(new_value, cache_dtype), mask=inside)
    if MAP != "none":
        r = tl.arange(0, BLOCK_R)
        heads = q + r[:, None] * stride_qh + d[None, :]
        queries = tl.load(heads, mask=(r < R)[:, None] & inside[None, :], other=0.0)
        total = tl.sum(queries.to(tl.float32), 0)
        if n % P != 0:
            total += tl.load(q_sum + (n - 1) % SUMS * D + d, mask=inside, other=0.0)
        tl.debug_barrier()  # every warp has read the old sum, which may lie in the same place
        tl.store(q_sum + n % SUMS * D + d, total, mask=inside)
        if n % P == P - 1:
            # As summary_forward.py, for one chunk: [1, tokens, BLOCK_D].
            m = tl.arange(0, BLOCK_P)
            position = n - (P - 1) + m
            old = ((m < P - 1)[:, None] & inside[None, :])[None, :, :]
            token = (position % slots)[:, None] * D + d[None, :]
            is_new = (m == P - 1)[:, None]
            keys = tl.load(window_k + token[None, :, :], mask=old, other=0.0).to(tl.float32)
            values = tl.load(window_v + token[None, :, :], mask=old, other=0.0).to(tl.float32)
            keys += tl.where(is_new, new_key.to(tl.float32)[None, :], 0.0)[None, :, :]
            values += tl.where(is_new, new_value.to(tl.float32)[None, :], 0.0)[None, :, :]
            key_mean = tl.sum(keys, 1) * (1.0 / P)
            centred = keys - key_mean[:, None, :]
            if MAP == "pooled":
                mu = tl.load(w_k + g * D + d, mask=inside, other=0.0).to(tl.float32)
                pool = pool_logits_of(centred, mu, m, scale, P)
                pool = exp(pool - tl.max(pool, 1)[:, None], PRECISION == "ieee")
                pooled = tl.sum(pool[:, :, None] * centred, 1)
                key = key_mean + pooled / tl.sum(pool, 1)[:, None]
                feature = tl.load(w_q + g * D + d, mask=inside, other=0.0).to(tl.float32)[None, :]
            else:
                query_mean = (total * (1.0 / (P * R)))[None, :]
                key = _affine(key_mean, w_k, b_k, d, D)
                feature = _affine(query_mean, w_q, b_q, d, D)
                if MAP == "layernorm":
                    key, _ = normalise(key, d, D)
                    key = scale_and_shift(key, g_k, s_k, d, D)
                    feature, _ = normalise(feature, d, D)
                    feature = scale_and_shift(feature, g_q, s_q, d, D)
                feature += key
            logits = logits_of(centred, feature - key_mean, m, scale, P)
            weights = exp(logits - tl.max(logits, 1)[:, None], PRECISION == "ieee")
            value = tl.sum(weights[:, :, None] * values, 1) / tl.sum(weights, 1)[:, None]
            chunk = n // P * D + d[None, :]
            tl.store(k_rfa + chunk, stored(key, cache_dtype), mask=inside[None, :])
            tl.store(v_rfa + chunk, stored(value, cache_dtype), mask=inside[None, :])


@triton.jit
def _merge(acc, total, peak, more, more_total, more_peak, PRECISION: tl.constexpr):
    """Two halves of a softmax as one."""
    new_peak = tl.maximum(peak, more_peak)
    decay = exp2(peak - new_peak, PRECISION == "ieee")
    share = exp2(more_peak - new_peak, PRECISION == "ieee")
    acc = acc * decay[:, None] + more * share[:, None]
    return acc, total * decay + more_total * share, new_peak


@triton.jit(do_not_specialize=["slots", "chunks"])
def decode_step(
    q, k, v, out, length, count, bias,
    sink_k, sink_v, window_k, window_v, k_rfa, v_rfa, q_sum,
    w_q, b_q, w_k, b_k, g_q, s_q, g_k, s_k,
    found, arrived,
    stride_qb, stride_qh,
    stride_kb, stride_kh,
    stride_vb, stride_vh,
    stride_ob, stride_oh,
    slots, sinks, chunks, scale,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SLIDING: tl.constexpr,
    SUMS: tl.constexpr, MAP: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: B * G x (SPLITS + 1).

    The caches are contiguous: [B, G, sinks, D], [B, G, slots, D], [B, G, chunks, D] and q_sum
    float32 [B, G, SUMS, D]. `found` float32 [B * G, SPLITS, R, D + 2] and `arrived` int32
    [B * G], zero before and after, are scratch; neither is used with one split. Row b appends
    nothing where count[b] is 0, and its output means nothing.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    g = tl.cast(head % G, tl.int64)
    b = tl.cast(head // G, tl.int64)
    head = tl.cast(head, tl.int64)
    q += b * stride_qb + g * R * stride_qh
    k += b * stride_kb + g * stride_kh
    v += b * stride_vb + g * stride_vh
    sink_k += head * sinks * D
    sink_v += head * sinks * D
    window_k += head * slots * D
    window_v += head * slots * D
    k_rfa += head * chunks * D
    v_rfa += head * chunks * D
    n = tl.load(length + b).to(tl.int32)
    if split == SPLITS:
        if tl.load(count + b) > 0:
            _append(
                q, k, v, n, sink_k, sink_v, window_k, window_v, k_rfa, v_rfa,
                q_sum + head * (SUMS * D),
                w_q, b_q, w_k, b_k, g_q, s_q, g_k, s_k,
                stride_qh, slots, scale / LOG2_E, g,
                R, D, P, S, SUMS, MAP, PRECISION, BLOCK_R, BLOCK_D, BLOCK_P,
            )
    else:
        r = tl.arange(0, BLOCK_R)
        d = tl.arange(0, BLOCK_D)
        inside = d < D
        mask = (r < R)[:, None] & inside[None, :]
        queries = tl.load(q + r[:, None] * stride_qh + d[None, :], mask=mask, other=0.0)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        peak = tl.zeros([BLOCK_R], tl.float32) + _LOW
        if split == 0:  # the token itself
            key = tl.load(k + d, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(v + d, mask=inside, other=0.0).to(tl.float32)
            peak = tl.sum(queries.to(tl.float32) * key[None, :], 1) * scale
            total += 1.0
            acc += value[None, :]
        shift = tl.zeros([BLOCK_R], tl.float32)
        if BIAS:
            shift = tl.load(bias + g * R + r, mask=r < R, other=0.0).to(tl.float32) * LOG2_E
            shift = tl.maximum(shift, _LOW)

        begin = window_start(n, W, P, SLIDING)
        num_sinks = tl.minimum(begin, S)
        num_far = num_sinks
        if MAP != "none":
            num_far += tl.maximum(begin - S, 0) // P
        entries = num_far + (n - begin)
        tiles = (entries + BLOCK_N - 1) // BLOCK_N
        per_split = (tiles + SPLITS - 1) // SPLITS * BLOCK_N
        columns = tl.arange(0, BLOCK_N)
        first_slot = begin % slots
        end = tl.minimum((split + 1) * per_split, entries)
        for first in tl.range(split * per_split, end, BLOCK_N):
            x = first + columns
            is_far = x < num_far
            row = first_slot + (x - num_far)
            row = tl.where(row >= slots, row - slots, row).to(tl.int64) * D
            rows_k, rows_v = window_k + row, window_v + row
            if S > 0:
                is_sink = x < num_sinks
                rows_k = tl.where(is_sink, sink_k + x * D, rows_k)
                rows_v = tl.where(is_sink, sink_v + x * D, rows_v)
            if MAP != "none":
                is_summary = is_far & (x >= num_sinks)
                row = (x - num_sinks + S // P).to(tl.int64) * D
                rows_k = tl.where(is_summary, k_rfa + row, rows_k)
                rows_v = tl.where(is_summary, v_rfa + row, rows_v)
            there = x < entries
            whole = there[:, None] & inside[None, :]
            keys = tl.load(rows_k[:, None] + d[None, :], mask=whole, other=0.0)
            values = tl.load(rows_v[:, None] + d[None, :], mask=whole, other=0.0)
            keys, values = keys.to(queries.dtype), values.to(queries.dtype)
            logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            if MAP != "none" and BIAS:
                logits += tl.where(is_summary[None, :], shift[:, None], 0.0)
            logits = tl.where(there[None, :], logits, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            weights = exp2(logits - new_peak[:, None], PRECISION == "ieee")
            decay = exp2(peak - new_peak, PRECISION == "ieee")
            total = total * decay + tl.sum(weights, 1)
            acc *= decay[:, None]
            acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
            peak = new_peak

        last = True
        if SPLITS > 1:
            ours = found + (head * SPLITS + split) * (R * (D + 2)) + r * (D + 2)
            tl.store(ours[:, None] + d[None, :], acc, mask=mask)
            tl.store(ours + D, total, mask=r < R)
            tl.store(ours + D + 1, peak, mask=r < R)
            tl.debug_barrier()  # every thread's part is written before one of them says so
            last = tl.atomic_add(arrived + head, 1, sem="acq_rel") == SPLITS - 1
        if last:
            if SPLITS > 1:
                tl.store(arrived + head, 0)
                acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
                total = tl.zeros([BLOCK_R], tl.float32)
                peak = tl.zeros([BLOCK_R], tl.float32) + _LOW
                for other in tl.range(0, SPLITS, loop_unroll_factor=4):
                    theirs = found + (head * SPLITS + other) * (R * (D + 2)) + r * (D + 2)
                    more = tl.load(theirs[:, None] + d[None, :], mask=mask, other=0.0)
                    more_total = tl.load(theirs + D, mask=r < R, other=1.0)
                    more_peak = tl.load(theirs + D + 1, mask=r < R, other=0.0)
                    acc, total, peak = _merge(
                        acc, total, peak, more, more_total, more_peak, PRECISION
                    )
            to = out + b * stride_ob + (g * R + r)[:, None] * stride_oh + d[None, :]
            acc = acc / total[:, None]
            tl.store(to, acc.to(out.dtype.element_ty), mask=mask)
