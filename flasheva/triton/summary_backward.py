"""Backward kernels of the chunk summaries.

With w the weights of a chunk's tokens, u = omega and z = s * (u . k_m) - s/2 * |k_m|^2 their
logits, v_rfa = sum_m w_m v_m gives dw_m = dv_rfa . v_m, dz = w * (dw - sum_m w_m dw_m), and

    dv_m += w_m * dv_rfa      dk_m += s * dz_m * (u - k_m)      du = s * sum_m dz_m k_m

The means that centre the logits pass nothing on: the weights do not depend on them. What the maps
send to the mean of a chunk goes to each of its tokens in equal parts. For "pooled" maps, with pool
weights p, k_rfa = sum_m p_m k_m gives dpool_m = s * p_m * (dk_rfa . k_m - sum_m p_m dk_rfa . k_m)
and dk_m += p_m * dk_rfa + dpool_m * mu.

So a token needs two (pooled: four) numbers of its own and rows of its chunk: `summary_backward`
computes those, and `key_gradients` and `query_gradients` add the products to dk, dv and dq.
"""

import triton
import triton.language as tl

from flasheva.triton.exponential import exp
from flasheva.triton.summary_forward import (
    affine,
    load_tokens,
    logits_of,
    normalise,
    pool_logits_of,
    times_matrix,
)


@triton.jit
def _through_layernorm(
    dy, x, rows, weight, bias, gain, chunk, left, d,
    D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """From the gradient of a map's result to those of its product, its gain and its shift."""
    y = affine(x, rows, weight, bias, chunk, left, d, D, BLOCK_K, PRECISION)
    normal, inverse = normalise(y, d, D)
    scaled = dy * tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(scaled, 1) / D
    along = tl.sum(scaled * normal, 1) / D
    dz = (scaled - mean[:, None] - normal * along[:, None]) * inverse[:, None]
    return tl.where(d[None, :] < D, dz, 0.0), tl.sum(dy * normal, 0), tl.sum(dy, 0)


@triton.jit
def _online(peak, total, moment, logits, grads, EXACT: tl.constexpr):
    """Adds tokens to a softmax's peak, its sum, and the sum of weight * gradient of the weight."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    decay = exp(peak - new_peak, EXACT)
    weights = exp(logits - new_peak[:, None], EXACT)
    total = total * decay + tl.sum(weights, 1)
    moment = moment * decay + tl.sum(weights * grads, 1)
    return new_peak, total, moment


@triton.jit
def _weights_of(peak, total, moment, logits, grads, EXACT: tl.constexpr):
    """The softmax's weights, and the gradients of its logits."""
    weights = exp(logits - peak[:, None], EXACT) / total[:, None]
    return weights, weights * (grads - (moment / total)[:, None])


@triton.jit(do_not_specialize=["C", "num_blocks"])
def summary_backward(
    k, v, w_q, b_q, w_k, b_k, g_q, g_k, q_mean, k_mean, omega, dk_rfa, dv_rfa,
    weights, logit_grads, pool, pool_grads, q_mean_grad, k_mean_grad, dz_q, dz_k, vector_shares,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    C, num_blocks, scale,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, P: tl.constexpr, MAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Grid: blocks of chunks x B * G. All but k, v and the maps is float32 and contiguous.

    Per token [B, G, C * P]: weights, logit_grads (dz without s), pool, pool_grads (without s).
    Per chunk [B, G, C, D]: k_mean_grad, q_mean_grad (what each token gets), dz_q, dz_k (the
    gradients of the maps' products). vector_shares [B, G, blocks, 4, D]: of g_q, s_q, g_k, s_k
    ("layernorm"), or of phi, mu ("pooled").
    """
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(0) // num_blocks
    g = tl.cast(head % G, tl.int64)
    b = tl.cast(head // G, tl.int64)
    first = tl.cast(block, tl.int64) * BLOCK_C
    k += b * stride_kb + g * stride_kh + first * P * stride_kt
    v += b * stride_vb + g * stride_vh + first * P * stride_vt
    chunk = tl.arange(0, BLOCK_C)
    token = tl.arange(0, SLICE)
    d = tl.arange(0, BLOCK_D)
    left = C - first
    seen = (chunk < left)[:, None] & (d[None, :] < D)
    base = tl.cast(head, tl.int64) * C + first
    rows = base * D + chunk[:, None] * D + d[None, :]

    key_mean = tl.load(k_mean + rows, mask=seen, other=0.0)
    feature = tl.load(omega + rows, mask=seen, other=0.0)
    key_grad = tl.load(dk_rfa + rows, mask=seen, other=0.0)
    value_grad = tl.load(dv_rfa + rows, mask=seen, other=0.0)
    direction = feature - key_mean
    mu = tl.zeros([BLOCK_D], tl.float32)
    if MAP == "pooled":
        mu = tl.load(w_k + g * D + d, mask=d < D, other=0.0).to(tl.float32)

    peak = tl.zeros([BLOCK_C], tl.float32) + float("-inf")
    total = tl.zeros([BLOCK_C], tl.float32)
    moment = tl.zeros([BLOCK_C], tl.float32)
    pool_peak, pool_total, pool_moment = peak, total, moment
    for i in tl.range(0, BLOCK_P, SLICE, loop_unroll_factor=4):
        m = i + token
        centred = load_tokens(k, stride_kt, chunk, m, d, left, D, P) - key_mean[:, None, :]
        values = load_tokens(v, stride_vt, chunk, m, d, left, D, P)
        peak, total, moment = _online(
            peak, total, moment,
            logits_of(centred, direction, m, scale, P),
            tl.sum(values * value_grad[:, None, :], 2),
            PRECISION == "ieee",
        )
        if MAP == "pooled":
            pool_peak, pool_total, pool_moment = _online(
                pool_peak, pool_total, pool_moment,
                pool_logits_of(centred, mu, m, scale, P),
                tl.sum(centred * key_grad[:, None, :], 2),
                PRECISION == "ieee",
            )

    feature_grad = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    mu_grad = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for i in tl.range(0, BLOCK_P, SLICE, loop_unroll_factor=4):
        m = i + token
        centred = load_tokens(k, stride_kt, chunk, m, d, left, D, P) - key_mean[:, None, :]
        values = load_tokens(v, stride_vt, chunk, m, d, left, D, P)
        tokens = base * P + chunk[:, None] * P + m[None, :]
        inside = (chunk < left)[:, None] & (m < P)[None, :]
        weight, logit_grad = _weights_of(
            peak, total, moment,
            logits_of(centred, direction, m, scale, P),
            tl.sum(values * value_grad[:, None, :], 2),
            PRECISION == "ieee",
        )
        tl.store(weights + tokens, weight, mask=inside)
        tl.store(logit_grads + tokens, logit_grad, mask=inside)
        feature_grad += tl.sum(logit_grad[:, :, None] * centred, 1)
        if MAP == "pooled":
            weight, pool_grad = _weights_of(
                pool_peak, pool_total, pool_moment,
                pool_logits_of(centred, mu, m, scale, P),
                tl.sum(centred * key_grad[:, None, :], 2),
                PRECISION == "ieee",
            )
            tl.store(pool + tokens, weight, mask=inside)
            tl.store(pool_grads + tokens, pool_grad, mask=inside)
            mu_grad += tl.sum(pool_grad[:, :, None] * centred, 1)
    feature_grad = feature_grad * scale

    share = vector_shares + (tl.cast(head, tl.int64) * num_blocks + block) * (4 * D) + d
    if MAP == "pooled":
        tl.store(share, tl.sum(feature_grad, 0), mask=d < D)
        tl.store(share + D, tl.sum(mu_grad, 0) * scale, mask=d < D)
    else:
        key_grad += feature_grad  # omega holds k_rfa
        if MAP == "layernorm":
            query_mean = tl.load(q_mean + rows, mask=seen, other=0.0)
            feature_grad, gain_grad, shift_grad = _through_layernorm(
                feature_grad, query_mean, q_mean + base * D, w_q, b_q, g_q, chunk, left, d,
                D, BLOCK_K, PRECISION,
            )
            tl.store(share, gain_grad, mask=d < D)
            tl.store(share + D, shift_grad, mask=d < D)
            key_grad, gain_grad, shift_grad = _through_layernorm(
                key_grad, key_mean, k_mean + base * D, w_k, b_k, g_k, chunk, left, d,
                D, BLOCK_K, PRECISION,
            )
            tl.store(share + 2 * D, gain_grad, mask=d < D)
            tl.store(share + 3 * D, shift_grad, mask=d < D)
        tl.store(dz_q + rows, feature_grad, mask=seen)
        tl.store(dz_k + rows, key_grad, mask=seen)
        to_queries = times_matrix(
            feature_grad, dz_q + base * D, w_q, D, 1, chunk, left, d, D, BLOCK_K, PRECISION
        )
        to_keys = times_matrix(
            key_grad, dz_k + base * D, w_k, D, 1, chunk, left, d, D, BLOCK_K, PRECISION
        )
        tl.store(q_mean_grad + rows, to_queries * (1.0 / (P * R)), mask=seen)
        tl.store(k_mean_grad + rows, to_keys * (1.0 / P), mask=seen)


@triton.jit(do_not_specialize=["rows", "num_shares"])
def map_gradients(
    dz_q, q_mean, dz_k, k_mean, shares,
    rows, num_shares,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Shares of the gradients of both maps: dz^T @ mean and, behind it, the sums of dz.

    Grid: num_shares x 2 (of q, of k) x blocks of COLUMNS of the mean. dz and means float32
    [rows, D] contiguous; shares float32 [num_shares, 2, D + 1, D].
    """
    share = tl.program_id(0)
    which = tl.program_id(1)
    dz = dz_q
    mean = q_mean
    if which == 1:
        dz = dz_k
        mean = k_mean
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, BLOCK_R)
    weight_grad = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    bias_grad = tl.zeros([BLOCK_D], tl.float32)
    for x in tl.range(share * BLOCK_R, rows, num_shares * BLOCK_R):
        row = (tl.cast(x, tl.int64) + r)[:, None] * D
        inside = (x + r)[:, None] < rows
        grad = tl.load(dz + row + d[None, :], mask=inside & (d[None, :] < D), other=0.0)
        value = tl.load(mean + row + e[None, :], mask=inside & (e[None, :] < D), other=0.0)
        weight_grad = tl.dot(tl.trans(grad), value, weight_grad, input_precision=PRECISION)
        bias_grad += tl.sum(grad, 0)
    shares += (share * 2 + which) * ((D + 1) * D)
    mask = (d < D)[:, None] & (e < D)[None, :]
    tl.store(shares + d[:, None] * D + e[None, :], weight_grad, mask=mask)
    if tl.program_id(2) == 0:
        tl.store(shares + D * D + d, bias_grad, mask=d < D)
