"""Forward kernel of the chunk summaries: means, maps, weights and value sums in one pass.

A program owns BLOCK_C chunks of one key/value head. Formulas: flasheva/summary.py. All in float32.
The same kernel compresses the chunks that a piece of a prompt completes, and keeps the running sum
of queries of the one in progress (flasheva/cache.py).
"""

import triton
import triton.language as tl

from flasheva.triton.exponential import exp


@triton.jit
def load_tokens(
    pointer, stride, chunk, m, d, num_chunks, D: tl.constexpr, P: tl.constexpr, low=None,
):
    """Tokens m of `chunk` as float32 [chunks, tokens, BLOCK_D]; zero where there is none.

    With `low`, there is none before that one.
    """
    token = tl.cast(chunk[:, None] * P + m[None, :], tl.int64)  # stride may be a whole batch's
    there = (chunk < num_chunks)[:, None] & (m < P)[None, :]
    if low is not None:
        there = there & (token >= low)
    address = pointer + token[:, :, None] * stride + d[None, None, :]
    return tl.load(address, mask=there[:, :, None] & (d < D)[None, None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def logits_of(centred, direction, m, scale, P: tl.constexpr):
    """Logits [chunks, tokens] of v_rfa's weights; -inf where there is no token."""
    logits = tl.sum(centred * (direction[:, None, :] - 0.5 * centred), 2) * scale
    return tl.where((m < P)[None, :], logits, float("-inf"))


@triton.jit
def pool_logits_of(centred, mu, m, scale, P: tl.constexpr):
    """Logits [chunks, tokens] of pooled maps' weights of k_rfa."""
    logits = tl.sum(centred * mu[None, None, :], 2) * scale
    return tl.where((m < P)[None, :], logits, float("-inf"))


@triton.jit
def times_matrix(
    x, rows, matrix, stride_in, stride_out, chunk, left, d,
    D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """x @ m for x [BLOCK_C, BLOCK_D] and m [D, D] with m[i, j] at i * stride_in + j * stride_out.

    `rows` is where this program wrote x [left, D], float32 contiguous. A matrix too large for
    shared memory is taken BLOCK_K rows at a time, and the columns of x that they need come from
    there, because a tile in registers has no slices.
    """
    BLOCK_D: tl.constexpr = d.shape[0]
    if BLOCK_K == BLOCK_D:
        mask = (d < D)[:, None] & (d < D)[None, :]
        address = matrix + d[:, None] * stride_in + d[None, :] * stride_out
        m = tl.load(address, mask=mask, other=0.0)
        return tl.dot(x, m.to(tl.float32), input_precision=PRECISION)
    else:
        tl.debug_barrier()  # other threads wrote what this one reads
        acc = tl.zeros(x.shape, tl.float32)
        for start in tl.range(0, D, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            part = tl.load(
                rows + chunk[:, None] * D + i[None, :],
                mask=(chunk < left)[:, None] & (i < D)[None, :],
                other=0.0,
            )
            mask = (i < D)[:, None] & (d < D)[None, :]
            address = matrix + i[:, None] * stride_in + d[None, :] * stride_out
            m = tl.load(address, mask=mask, other=0.0)
            acc = tl.dot(part, m.to(tl.float32), acc, input_precision=PRECISION)
        return acc


@triton.jit
def affine(
    x, rows, weight, bias, chunk, left, d,
    D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """x @ weight.T + bias; weight [D, D] contiguous, bias [D], the rest as `times_matrix`."""
    shift = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    y = times_matrix(x, rows, weight, 1, D, chunk, left, d, D, BLOCK_K, PRECISION)
    return y + shift[None, :]


@triton.jit
def normalise(x, d, D: tl.constexpr):
    """LayerNorm without its parameters, and 1 / standard deviation [BLOCK_C]."""
    inside = d[None, :] < D
    centred = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / D + 1e-5)
    return centred * inverse[:, None], inverse


@triton.jit
def scale_and_shift(x, weight, bias, d, D: tl.constexpr):
    """x * weight + bias, [D] each."""
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    return x * w[None, :] + b[None, :]


@triton.jit
def stored(x, dtype: tl.constexpr):
    """x as a cache stores it; float8 saturates, as in flasheva/storage.py."""
    if dtype == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def _keep_sums(
    q, stride_qh, stride_qt, q_sum, carried, n, end, token, d,
    R: tl.constexpr, D: tl.constexpr, P: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Stores the running sum of queries after each of the last SUMS tokens that are new.

    `q` points at the first token of the chunk that position n lies in, `carried` is the sum of
    the tokens of that chunk that came before n.
    """
    for back in tl.range(0, SUMS):
        last = end - 1 - back
        if last >= n:
            begin = last // P * P
            total = tl.zeros([d.shape[0]], tl.float32)
            for r in tl.range(0, R):
                for m in tl.range(0, BLOCK_P, token.shape[0]):
                    position = begin + m + token
                    there = (position <= last) & (position >= n)
                    address = q + tl.cast(r, tl.int64) * stride_qh
                    address += (position - n // P * P)[:, None] * stride_qt + d[None, :]
                    queries = tl.load(address, there[:, None] & (d < D)[None, :], other=0.0)
                    total += tl.sum(queries.to(tl.float32), 0)
            total += tl.where(begin < n, carried, 0.0)
            tl.store(q_sum + last % SUMS * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["C", "num_blocks", "key_offset"])
def summary_forward(
    q, k, v, noise, w_q, b_q, w_k, b_k, g_q, s_q, g_k, s_k,
    k_rfa, v_rfa, norms, q_mean, k_mean, omega, q_sum, length, count,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    C, num_blocks, key_offset, scale,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    MAP: tl.constexpr, NOISE: tl.constexpr, SAVE: tl.constexpr, NORMS: tl.constexpr,
    CACHED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: blocks of chunks x B * G. Results [B, G, C, D] contiguous, means and omega float32.

    MAP "linear": w [D, D], b [D] of both maps; "layernorm": also gain g, shift s [D];
    "pooled": w_k is mu, w_q is phi, [G, D] each. SLICE tokens of a chunk are taken at a time.
    SAVE: means and omega are kept for a backward pass; if BLOCK_K < BLOCK_D the means are anyway.
    CACHED: the tokens of row b stand at positions length[b] .. length[b] + count[b] - 1; k and v
    have `key_offset` earlier ones before them. Results go to the places of their chunks in a cache
    of C, and running sums of queries to q_sum, float32 [B, G, SUMS, D] contiguous; q_mean and
    k_mean are [B, G, num_blocks * BLOCK_C, D].
    """
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(0) // num_blocks
    g = tl.cast(head % G, tl.int64)
    b = tl.cast(head // G, tl.int64)
    first = tl.cast(block, tl.int64) * BLOCK_C
    q += b * stride_qb + g * R * stride_qh + first * P * stride_qt
    k += b * stride_kb + g * stride_kh + first * P * stride_kt
    v += b * stride_vb + g * stride_vh + first * P * stride_vt
    result = (tl.cast(head, tl.int64) * C + first) * D
    means = result
    left = C - first
    query_low = None
    if CACHED:
        n = tl.load(length + b).to(tl.int32)
        end = n + tl.load(count + b).to(tl.int32)
        old = n % P  # tokens of the chunk in progress, which is the first one here
        left = end // P - n // P - block * BLOCK_C
        result += n // P * D
        means = (tl.cast(head, tl.int64) * num_blocks * BLOCK_C + first) * D
        k += (key_offset - old) * stride_kt
        v += (key_offset - old) * stride_vt
        q -= old * stride_qt
        query_low = old - block * BLOCK_C * P

    chunk = tl.arange(0, BLOCK_C)
    token = tl.arange(0, SLICE)
    d = tl.arange(0, BLOCK_D)
    seen = (chunk < left)[:, None] & (d[None, :] < D)
    offsets = chunk[:, None] * D + d[None, :]

    if CACHED:
        q_sum += tl.cast(head, tl.int64) * SUMS * D
        carried = tl.load(
            q_sum + (n - 1) % SUMS * D + d, mask=(d < D) & (old > 0) & (block == 0), other=0.0
        )

    # Four slices at a time are unrolled, so that their loads are under way together.
    key_mean = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for m in tl.range(0, BLOCK_P, SLICE, loop_unroll_factor=4):
        key_mean += tl.sum(load_tokens(k, stride_kt, chunk, m + token, d, left, D, P), 1)
    key_mean = key_mean * (1.0 / P)

    if MAP == "pooled":
        mu = tl.load(w_k + g * D + d, mask=d < D, other=0.0).to(tl.float32)
        phi = tl.load(w_q + g * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_C], tl.float32)
        peak = tl.zeros([BLOCK_C], tl.float32) + float("-inf")
        key = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for m in tl.range(0, BLOCK_P, SLICE, loop_unroll_factor=4):
            keys = load_tokens(k, stride_kt, chunk, m + token, d, left, D, P)
            centred = keys - key_mean[:, None, :]
            logits = pool_logits_of(centred, mu, m + token, scale, P)
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            decay = exp(peak - new_peak, PRECISION == "ieee")
            weights = exp(logits - new_peak[:, None], PRECISION == "ieee")
            total = total * decay + tl.sum(weights, 1)
            key = key * decay[:, None] + tl.sum(weights[:, :, None] * centred, 1)
            peak = new_peak
        key = key_mean + key / total[:, None]
        feature = tl.zeros([BLOCK_C, BLOCK_D], tl.float32) + phi[None, :]
    else:
        query_mean = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for r in tl.range(0, R):
            for m in tl.range(0, BLOCK_P, SLICE, loop_unroll_factor=4):
                q_r = q + tl.cast(r, tl.int64) * stride_qh
                queries = load_tokens(
                    q_r, stride_qt, chunk, m + token, d, left, D, P, query_low
                )
                query_mean += tl.sum(queries, 1)
        if CACHED:  # nothing unless this is the first block
            query_mean += tl.where((chunk == 0)[:, None], carried[None, :], 0.0)
        query_mean = query_mean * (1.0 / (P * R))
        if SAVE or BLOCK_K < BLOCK_D:
            tl.store(q_mean + means + offsets, query_mean, mask=seen)
            tl.store(k_mean + means + offsets, key_mean, mask=seen)
        key = affine(
            key_mean, k_mean + means, w_k, b_k, chunk, left, d, D, BLOCK_K, PRECISION
        )
        feature = affine(
            query_mean, q_mean + means, w_q, b_q, chunk, left, d, D, BLOCK_K, PRECISION
        )
        if MAP == "layernorm":
            key, _ = normalise(key, d, D)
            key = scale_and_shift(key, g_k, s_k, d, D)
            feature, _ = normalise(feature, d, D)
            feature = scale_and_shift(feature, g_q, s_q, d, D)
        feature += key
        if NOISE:
            feature += tl.load(noise + result + offsets, mask=seen, other=0.0).to(tl.float32)

    direction = feature - key_mean
    total = tl.zeros([BLOCK_C], tl.float32)
    peak = tl.zeros([BLOCK_C], tl.float32) + float("-inf")
    value = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for m in tl.range(0, BLOCK_P, SLICE, loop_unroll_factor=4):
        keys = load_tokens(k, stride_kt, chunk, m + token, d, left, D, P)
        logits = logits_of(keys - key_mean[:, None, :], direction, m + token, scale, P)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        decay = exp(peak - new_peak, PRECISION == "ieee")
        weights = exp(logits - new_peak[:, None], PRECISION == "ieee")
        total = total * decay + tl.sum(weights, 1)
        values = load_tokens(v, stride_vt, chunk, m + token, d, left, D, P)
        value = value * decay[:, None] + tl.sum(weights[:, :, None] * values, 1)
        peak = new_peak

    if NORMS:  # largest squared norm of a head's k_rfa; whatever the order, the same
        squared = tl.sum(tl.where(seen, key * key, 0.0), 1)
        tl.atomic_max(norms + head, tl.max(squared), sem="relaxed")
    tl.store(k_rfa + result + offsets, stored(key, k_rfa.dtype.element_ty), mask=seen)
    tl.store(
        v_rfa + result + offsets, stored(value / total[:, None], v_rfa.dtype.element_ty), mask=seen
    )
    if SAVE:
        tl.store(omega + result + offsets, feature, mask=seen)
        if MAP == "pooled":
            tl.store(k_mean + result + offsets, key_mean, mask=seen)
    if CACHED:
        if block == 0:
            tl.debug_barrier()  # every warp has read the old sum, which may lie in the same place
            _keep_sums(
                q, stride_qh, stride_qt, q_sum, carried, n, end, token, d, R, D, P, SUMS, BLOCK_P
            )
