"""Backward kernels of keys and summaries; no atomics, so that gradients repeat to the last bit.

With p the weights, delta = rowsum(do * o) and ds = p * (do . v - delta), gradients are
dv = p^T do, dk = s * ds^T q and dq = s * ds k. Each kernel recomputes p from the saved
log-sum-exp (in units of log 2) for the tiles that the rule shows:

- `summary_gradients`: a tile of summaries, all later queries: dk_rfa, dv_rfa;
- `key_gradients`: a tile of keys, the queries whose exact window holds them: dk, dv, to which it
  adds what the summaries of its chunks pass on (summary_backward.py).

The queries: query_gradients.py.
"""

import triton
import triton.language as tl

from flasheva.triton.attention_forward import load_rows
from flasheva.triton.exponential import LOG2_E, exp2
from flasheva.triton.rule import (
    between,
    end_of_document,
    first_query_of_chunk,
    last_query_of_key,
    locate,
)


@triton.jit
def add_rows_of_chunks(
    acc, weights, rows, chunk, first_chunk, C, d,
    D: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Adds to token i of a tile [tokens, BLOCK_D] weights[i] times the row of its chunk.

    `rows` points at float32 [C, D]; the CHUNKS chunks from `first_chunk` on hold the tile. It is a
    product of matrices, because to gather a row for every token takes several times as long.
    """
    c = first_chunk + tl.arange(0, CHUNKS)
    mask = (c < C)[:, None] & (d[None, :] < D)
    row = tl.load(rows + c[:, None] * D + d[None, :], mask=mask, other=0.0)
    spread = tl.where(chunk[:, None] == c[None, :], weights[:, None], 0.0)
    return tl.dot(spread.to(DTYPE), row.to(DTYPE), acc, input_precision=PRECISION)


@triton.jit
def _key_gradients(
    dk, dv, keys, values, queries, grads, peak, mean, seen, whole, bias, scale,
    PRECISION: tl.constexpr,
):
    """Adds what a tile of queries passes to keys; `seen` [keys, queries] matters unless whole."""
    logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    p = exp2(logits * scale + (bias - peak)[None, :], PRECISION == "ieee")
    if not whole:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    ds = p * (dp - mean[None, :])
    dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "C", "H", "num_heads"])
def summary_gradients(
    q, k_rfa, v_rfa, bias, seq_start, do, lse, delta, dk_rfa, dv_rfa,
    stride_qb, stride_qh, stride_qt,
    stride_rb, stride_rh, stride_rt,
    stride_gb, stride_gh, stride_gt,
    T, C, H, num_heads, scale,
    R: tl.constexpr, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    SLIDING: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Grid: tiles of summaries x B * G (num_heads); results float32 [B, G, C, D] contiguous."""
    # Tile by tile over all heads: the first summaries have the most queries and go first.
    head = tl.program_id(0) % num_heads
    first = tl.program_id(0) // num_heads * BLOCK_N
    G = H // R
    g = tl.cast(head % G, tl.int64)
    b = tl.cast(head // G, tl.int64)
    k_rfa += b * stride_rb + g * stride_rh
    v_rfa += b * stride_rb + g * stride_rh
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keys = load_rows(k_rfa, first, stride_rt, columns, d, C, D, True)
    values = load_rows(v_rfa, first, stride_rt, columns, d, C, D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    chunk = tl.minimum(first + columns, C - 1)
    last = tl.minimum(first + BLOCK_N, C) * P - 1  # the last token of the tile's chunks
    first_start = 0
    end = T
    if PACKED:
        seq_start += b * T
        first_start = tl.load(seq_start + first * P)
        end = end_of_document(seq_start, last, T)
    low = tl.minimum(first_query_of_chunk((first + 1) * P, first_start, W, SLIDING), end)
    # From here on a query sees the whole tile. A loop of its own for those queries is faster than
    # a branch; the queries before them and behind their last whole tile share the other loop.
    whole = tl.minimum(first_query_of_chunk(last + 1, first_start, W, SLIDING), end)
    if PACKED:
        whole = end
    tail = whole + (end - whole) // BLOCK_M * BLOCK_M
    num_partial = (tl.maximum(whole - low, 0) + BLOCK_M - 1) // BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    for r in tl.range(0, R):
        h = g * R + r
        q_h = q + b * stride_qb + h * stride_qh
        do_h = do + b * stride_gb + h * stride_gh
        lse_h = lse + (b * H + h) * T
        delta_h = delta + (b * H + h) * T
        shift = 0.0
        if BIAS:
            shift = tl.load(bias + h).to(tl.float32) * LOG2_E
        for i in tl.range(0, num_partial + tl.where(tail < end, 1, 0)):
            x = tl.where(i < num_partial, low + i * BLOCK_M, tail)
            limit = tl.where(i < num_partial, whole, end)
            queries = load_rows(q_h, x, stride_qt, rows, d, limit, D, True)
            grads = load_rows(do_h, x, stride_gt, rows, d, limit, D, True)
            peak = tl.load(lse_h + x + rows, mask=x + rows < limit, other=float("inf"))
            mean = tl.load(delta_h + x + rows, mask=x + rows < limit, other=0.0)
            n, start, begin = locate(x + rows, T, 0, seq_start, W, P, SLIDING, PACKED)
            seen = ((chunk + 1) * P)[:, None] <= begin[None, :]
            if PACKED:
                seen &= (chunk * P)[:, None] >= (start + S)[None, :]
            dk, dv = _key_gradients(
                dk, dv, keys, values, queries, grads, peak, mean, seen, False, shift, scale,
                PRECISION,
            )
        if not PACKED:
            # Backwards: all tiles of a head end at T, so they read the same queries at a time.
            for i in tl.range(0, (tail - whole) // BLOCK_M):
                x = tail - (i + 1) * BLOCK_M
                queries = load_rows(q_h, x, stride_qt, rows, d, 0, D, False)
                grads = load_rows(do_h, x, stride_gt, rows, d, 0, D, False)
                peak = tl.load(lse_h + x + rows)
                mean = tl.load(delta_h + x + rows)
                dk, dv = _key_gradients(
                    dk, dv, keys, values, queries, grads, peak, mean, True, True, shift, scale,
                    PRECISION,
                )

    offsets = (tl.cast(head, tl.int64) * C + first) * D + columns[:, None] * D + d[None, :]
    mask = ((first + columns)[:, None] < C) & (d[None, :] < D)
    if first * P < S:  # chunks of sinks are nobody's summaries
        unseen = (chunk * P < S)[:, None]
        dk = tl.where(unseen, 0.0, dk)
        dv = tl.where(unseen, 0.0, dv)
    tl.store(dk_rfa + offsets, dk * (scale / LOG2_E), mask=mask)
    tl.store(dv_rfa + offsets, dv, mask=mask)


@triton.jit(do_not_specialize=["T", "C", "H", "num_tiles"])
def key_gradients(
    q, k, v, seq_start, do, lse, delta, omega, dv_rfa, k_mean_grad, weights, logit_grads, pool,
    pool_grads, mu, dk, dv,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,
    stride_dkb, stride_dkh, stride_dkt,
    T, C, H, num_tiles, scale,
    R: tl.constexpr, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    SLIDING: tl.constexpr, SUMMARIES: tl.constexpr, POOLED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: tiles of keys x B * G. dk and dv share strides.

    SUMMARIES: what the tokens get from their chunks' summaries is added; see summary_backward.py
    for the arguments from omega to pool_grads.
    """
    first = tl.program_id(0) % num_tiles * BLOCK_N
    head = tl.program_id(0) // num_tiles
    G = H // R
    g = tl.cast(head % G, tl.int64)
    b = tl.cast(head // G, tl.int64)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    keys = load_rows(k + b * stride_kb + g * stride_kh, first, stride_kt, columns, d, T, D, True)
    values = load_rows(v + b * stride_vb + g * stride_vh, first, stride_vt, columns, d, T, D, True)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    last = tl.minimum(first + BLOCK_N, T) - 1
    last_start = 0
    if PACKED:
        seq_start += b * T
        last_start = tl.load(seq_start + last)
    high = tl.minimum(last_query_of_key(last, last_start, W, P, SLIDING) + 1, T)
    # Queries from `last` to here see the whole tile.
    full = tl.minimum(last_query_of_key(first, last_start, W, P, SLIDING) + 1, T)
    if PACKED:
        full = 0
    rows = tl.arange(0, BLOCK_M)
    for r in tl.range(0, R):
        h = g * R + r
        q_h = q + b * stride_qb + h * stride_qh
        do_h = do + b * stride_gb + h * stride_gh
        lse_h = lse + (b * H + h) * T
        delta_h = delta + (b * H + h) * T
        for x in tl.range(first, high, BLOCK_M):
            queries = load_rows(q_h, x, stride_qt, rows, d, high, D, True)
            grads = load_rows(do_h, x, stride_gt, rows, d, high, D, True)
            peak = tl.load(lse_h + x + rows, mask=x + rows < high, other=float("inf"))
            mean = tl.load(delta_h + x + rows, mask=x + rows < high, other=0.0)
            n, start, begin = locate(x + rows, T, 0, seq_start, W, P, SLIDING, PACKED)
            seen = between((first + columns)[:, None], begin[None, :], n[None, :] + 1)
            whole = (x >= last) & (x + BLOCK_M <= full)
            dk_acc, dv_acc = _key_gradients(
                dk_acc, dv_acc, keys, values, queries, grads, peak, mean, seen, whole, 0.0, scale,
                PRECISION,
            )
    natural = scale / LOG2_E
    dk_acc = dk_acc * natural

    if SUMMARIES:
        chunk = (first + columns) // P
        whole = chunk < C
        token = tl.cast(head, tl.int64) * C * P + first + columns
        summary = tl.cast(head, tl.int64) * C * D
        weight = tl.load(weights + token, mask=whole, other=0.0)
        logit_grad = tl.load(logit_grads + token, mask=whole, other=0.0) * natural
        share = tl.where(whole, 1.0, 0.0)
        if POOLED:
            share = tl.load(pool + token, mask=whole, other=0.0)
            pool_grad = tl.load(pool_grads + token, mask=whole, other=0.0) * natural
            learned = tl.load(mu + g * D + d, mask=d < D, other=0.0).to(tl.float32)
            dk_acc += pool_grad[:, None] * learned[None, :]
        dv_acc = add_rows_of_chunks(
            dv_acc, weight, dv_rfa + summary, chunk, first // P, C, d, D, CHUNKS, keys.dtype,
            PRECISION,
        )
        dk_acc = add_rows_of_chunks(
            dk_acc, logit_grad, omega + summary, chunk, first // P, C, d, D, CHUNKS, keys.dtype,
            PRECISION,
        )
        dk_acc = add_rows_of_chunks(
            dk_acc, share, k_mean_grad + summary, chunk, first // P, C, d, D, CHUNKS, keys.dtype,
            PRECISION,
        )
        dk_acc -= logit_grad[:, None] * keys.to(tl.float32)

    offsets = b * stride_dkb + g * stride_dkh + tl.cast(first, tl.int64) * stride_dkt
    offsets = offsets + columns[:, None] * stride_dkt + d[None, :]
    mask = ((first + columns)[:, None] < T) & (d[None, :] < D)
    tl.store(dk + offsets, dk_acc.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + offsets, dv_acc.to(dv.dtype.element_ty), mask=mask)
