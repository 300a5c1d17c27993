"""Backward kernels of queries and sinks; formulas: key_gradients.py.

- `output_dot`: delta, which all others need;
- `query_gradients`: a tile of queries, all its keys: dq, the bias, and its share of the sinks;
- `add_sink_gradients`: sums the shares of the sinks and adds them to dk, dv.
"""

import triton
import triton.language as tl

from flasheva.triton.attention_forward import load_rows
from flasheva.triton.exponential import LOG2_E, exp2
from flasheva.triton.key_gradients import add_rows_of_chunks
from flasheva.triton.rule import between, end_of_document, locate, whole_tiles


@triton.jit(do_not_specialize=["T", "H", "num_tiles"])
def output_dot(
    out, do, delta,
    stride_ob, stride_oh, stride_ot,
    stride_gb, stride_gh, stride_gt,
    T, H, num_tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """delta [B, H, T] = rowsum(do * out). Grid: tiles of queries x B * H."""
    first = tl.program_id(0) % num_tiles * BLOCK_M
    head = tl.program_id(0) // num_tiles
    h = tl.cast(head % H, tl.int64)
    b = tl.cast(head // H, tl.int64)
    rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    x = load_rows(out + b * stride_ob + h * stride_oh, first, stride_ot, rows, d, T, D, True)
    y = load_rows(do + b * stride_gb + h * stride_gh, first, stride_gt, rows, d, T, D, True)
    dot = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta + tl.cast(head, tl.int64) * T + first + rows, dot, mask=first + rows < T)


@triton.jit
def _weights_and_gradients(
    q, do, lse, delta, keys, values, seen, bias, scale,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):
    """p and ds, [queries, keys] each; with WHOLE every query sees every key."""
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    p = exp2(logits * scale + (bias - lse)[:, None], PRECISION == "ieee")
    if not WHOLE:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
    return p, p * (dp - delta[:, None])


@triton.jit(do_not_specialize=["T", "C", "H", "num_tiles"])
def query_gradients(
    q, k, v, k_rfa, v_rfa, bias, seq_start, do, lse, delta, q_mean_grad, dq, bias_shares,
    sink_shares,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_rb, stride_rh, stride_rt,
    stride_gb, stride_gh, stride_gt,
    stride_dqb, stride_dqh, stride_dqt,
    T, C, H, num_tiles, scale,
    R: tl.constexpr, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    SLIDING: tl.constexpr, SUMMARIES: tl.constexpr, QUERY_MEANS: tl.constexpr, BIAS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Grid: tiles of queries x B * H.

    QUERY_MEANS: q_mean_grad float32 [B, G, C, D] is what each query of a chunk gets from the
    chunk's mean. bias_shares float32 [B, H, tiles]; sink_shares [B, H, tiles, 2, S, D] (of k, then
    of v) in the dtype of k, written only for tiles that look back at sinks.
    """
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    head = tl.program_id(0) // num_tiles
    h = tl.cast(head % H, tl.int64)
    b = tl.cast(head // H, tl.int64)
    g = h // R
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + g * stride_kh
    v += b * stride_vb + g * stride_vh
    do += b * stride_gb + h * stride_gh
    if PACKED:
        seq_start += b * T
    rows = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    first = tile * BLOCK_M
    last = first + BLOCK_M - 1
    n, start, begin = locate(first + rows, T, 0, seq_start, W, P, SLIDING, PACKED)
    first_n, first_start, first_begin = locate(first, T, 0, seq_start, W, P, SLIDING, PACKED)
    last_n, last_start, last_begin = locate(last, T, 0, seq_start, W, P, SLIDING, PACKED)

    inside = first + rows < T
    if S > 0:  # under way together with the queries
        sinks = tl.arange(0, BLOCK_S)
        sink_high = tl.minimum(first_start + S, last_begin)
        first_keys = load_rows(k, first_start, stride_kt, sinks, d, sink_high, D, True)
        first_values = load_rows(v, first_start, stride_vt, sinks, d, sink_high, D, True)
    queries = load_rows(q, first, stride_qt, rows, d, T, D, True)
    grads = load_rows(do, first, stride_gt, rows, d, T, D, True)
    row = tl.cast(head, tl.int64) * T + first
    peak = tl.load(lse + row + rows, mask=inside, other=float("inf"))
    mean = tl.load(delta + row + rows, mask=inside, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # The same tiles as in the forward pass, but the sinks by themselves: what they get is kept.
    columns = tl.arange(0, BLOCK_N)
    per_query = tl.zeros([BLOCK_M], tl.float32)
    if S > 0:
        if last_begin > first_start:
            sink_end = tl.where(start == first_start, tl.minimum(first_start + S, begin), 0)
            share = sink_shares + (tl.cast(head, tl.int64) * num_tiles + tile) * (2 * S * D)
            for i in tl.static_range(0, S, BLOCK_S):
                x = first_start + i
                keys, values = first_keys, first_values
                if i > 0:
                    keys = load_rows(k, x, stride_kt, sinks, d, sink_high, D, True)
                    values = load_rows(v, x, stride_vt, sinks, d, sink_high, D, True)
                seen = between((x + sinks)[None, :], start[:, None], sink_end[:, None])
                p, ds = _weights_and_gradients(
                    queries, grads, peak, mean, keys, values, seen, 0.0, scale, False, PRECISION,
                )
                ds = ds.to(keys.dtype)
                acc = tl.dot(ds, keys, acc, input_precision=PRECISION)
                key_grad = tl.dot(tl.trans(ds), queries, input_precision=PRECISION)
                value_grad = tl.dot(tl.trans(p.to(keys.dtype)), grads, input_precision=PRECISION)
                offsets = (i + sinks)[:, None] * D + d[None, :]
                mask = (i + sinks < S)[:, None] & (d[None, :] < D)
                # `scale` is in units of log 2.
                key_grad = key_grad * (scale / LOG2_E)
                tl.store(share + offsets, key_grad.to(keys.dtype), mask=mask)
                tl.store(share + S * D + offsets, value_grad.to(keys.dtype), mask=mask)
    shift = 0.0
    low, high = 0, 0
    if SUMMARIES:
        k_rfa += b * stride_rb + g * stride_rh
        v_rfa += b * stride_rb + g * stride_rh
        if BIAS:
            shift = tl.load(bias + h).to(tl.float32) * LOG2_E
        low, high = (first_start + S) // P, tl.minimum(last_begin // P, C)
        middle = (last_start + S) // P
        middle += whole_tiles(first_begin // P - middle, BLOCK_N)
        if not PACKED:
            for x in tl.range(low, middle, BLOCK_N):
                keys = load_rows(k_rfa, x, stride_rt, columns, d, 0, D, False)
                values = load_rows(v_rfa, x, stride_rt, columns, d, 0, D, False)
                p, ds = _weights_and_gradients(
                    queries, grads, peak, mean, keys, values, True, shift, scale, True, PRECISION,
                )
                acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
                per_query += tl.sum(ds, 1)
            low = middle
    num_far = tl.maximum(high - low + BLOCK_N - 1, 0) // BLOCK_N
    num_exact = (last_n - first_begin + BLOCK_N) // BLOCK_N
    for i in tl.range(0, num_far + num_exact):
        x = first_begin + (i - num_far) * BLOCK_N
        limit = last_n + 1
        see_low, see_high = begin, n + 1
        source_k, source_v, stride_k, stride_v, extra = k, v, stride_kt, stride_vt, 0.0
        if SUMMARIES:
            is_far = i < num_far
            x = tl.where(is_far, low + i * BLOCK_N, x)
            limit = tl.where(is_far, high, limit)
            see_low = tl.where(is_far, (start + S) // P, see_low)
            see_high = tl.where(is_far, begin // P, see_high)
            source_k = tl.where(is_far, k_rfa, k)
            source_v = tl.where(is_far, v_rfa, v)
            stride_k = tl.where(is_far, stride_rt, stride_kt)
            stride_v = tl.where(is_far, stride_rt, stride_vt)
            extra = tl.where(is_far, shift, 0.0)
        keys = load_rows(source_k, x, stride_k, columns, d, limit, D, True)
        values = load_rows(source_v, x, stride_v, columns, d, limit, D, True)
        seen = between((x + columns)[None, :], see_low[:, None], see_high[:, None])
        p, ds = _weights_and_gradients(
            queries, grads, peak, mean, keys, values, seen, extra, scale, False, PRECISION
        )
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
        if SUMMARIES and BIAS:
            per_query += tl.where(is_far, tl.sum(ds, 1), 0.0)
    if SUMMARIES and BIAS:
        tl.store(bias_shares + head * num_tiles + tile, tl.sum(per_query, 0))

    acc = acc * (scale / LOG2_E)
    if QUERY_MEANS:
        acc = add_rows_of_chunks(
            acc, tl.full([BLOCK_M], 1.0, tl.float32), q_mean_grad + (b * (H // R) + g) * C * D,
            (first + rows) // P, first // P, C, d, D, CHUNKS, queries.dtype, PRECISION,
        )
    dq += b * stride_dqb + h * stride_dqh + tl.cast(first, tl.int64) * stride_dqt
    tl.store(
        dq + rows[:, None] * stride_dqt + d[None, :],
        acc.to(dq.dtype.element_ty),
        mask=inside[:, None] & (d[None, :] < D),
    )


@triton.jit(do_not_specialize=["T", "H", "num_tiles"])
def add_sink_gradients(
    sink_shares, seq_start, dk, dv,
    stride_dkb, stride_dkh, stride_dkt,
    T, H, num_tiles,
    R: tl.constexpr, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    SLIDING: tl.constexpr, PACKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adds to the sinks the shares of all tiles that look back at them.

    Grid: blocks of BLOCK_D of the S * D entries x documents x B * G, by 2 (dk, then dv); without
    PACKED there is one document. With it, the program of the first tile that has a document as its
    first one sums the shares of that document.
    """
    blocks: tl.constexpr = (S * D + BLOCK_D - 1) // BLOCK_D
    entry = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    which = tl.program_id(1)
    G = H // R
    if PACKED:
        first = tl.program_id(0) // blocks % num_tiles
        head = tl.program_id(0) // blocks // num_tiles
    else:
        first = tl.program_id(0) * 0
        head = tl.program_id(0) // blocks
    g = tl.cast(head % G, tl.int64)
    b = tl.cast(head // G, tl.int64)
    tiles = tl.arange(0, BLOCK_T)
    if PACKED:
        seq_start += b * T
    first_n, start, begin = locate(first * BLOCK_M, T, 0, seq_start, W, P, SLIDING, PACKED)
    end = num_tiles
    document_end = T
    leads = first == 0
    if PACKED:
        leads |= tl.load(seq_start + tl.maximum(first - 1, 0) * BLOCK_M) != start
        document_end = end_of_document(seq_start, start, T)
        end = (document_end + BLOCK_M - 1) // BLOCK_M
    if leads:
        total = tl.zeros([BLOCK_D], tl.float32)
        for r in tl.range(0, R):
            base = (b * H + g * R + r) * num_tiles
            for x in tl.range(first, end, BLOCK_T):
                tile = x + tiles
                tile_n, tile_start, first_begin = locate(
                    tile * BLOCK_M, T, 0, seq_start, W, P, SLIDING, PACKED
                )
                last_n, last_start, tile_begin = locate(
                    tile * BLOCK_M + (BLOCK_M - 1), T, 0, seq_start, W, P, SLIDING, PACKED
                )
                wrote = (tile < end) & (tile_start == start) & (tile_begin > start)
                offsets = ((base + tile) * 2 + which)[:, None] * (S * D) + entry[None, :]
                mask = wrote[:, None] & (entry < S * D)[None, :]
                share = tl.load(sink_shares + offsets, mask=mask, other=0.0)
                total += tl.sum(share.to(tl.float32), 0)
        position = start + entry // D
        inside = (entry < S * D) & (position < document_end)
        grad = dk
        if which == 1:
            grad = dv
        grad += b * stride_dkb + g * stride_dkh
        grad += tl.cast(position, tl.int64) * stride_dkt + entry % D
        total += tl.load(grad, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad, total.to(dk.dtype.element_ty), mask=inside)
