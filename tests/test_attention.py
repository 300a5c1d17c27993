"""The attention itself: the definition by hand, its gradients, and its invariants."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flasheva import AffineMap, AffineMaps, EvaConfig, PooledMaps, eva_attention
from flasheva.summary import chunk_summaries
from tests.inputs import Inputs, make, map_tensors

CONFIGS = [
    EvaConfig(window_size=8, chunk_size=4, window=window, sink_size=S, summary_map=summary_map)
    for window in ("sliding", "block")
    for S in (0, 4, 8)
    for summary_map in ("linear", "layernorm", "pooled")
]


def reference(config: EvaConfig, inputs: Inputs, **options) -> torch.Tensor:
    x = inputs
    return eva_attention(
        *(x.q, x.k, x.v, config, x.maps),
        bias=x.bias,
        seq_start=x.seq_start,
        impl="reference",
        **options,
    )


def affine_by_hand(f, x):
    y = f.weight @ x + f.bias
    if f.norm_weight is None:
        return y
    variance = (y - y.mean()).square().mean()
    return (y - y.mean()) / (variance + 1e-5).sqrt() * f.norm_weight + f.norm_bias


def by_hand(config: EvaConfig, x: Inputs, b: int, h: int, n: int) -> torch.Tensor:
    """Output of one query, straight from the formulas, with no shared code."""
    W, P, S = config.window_size, config.chunk_size, config.sink_size
    group = x.q.shape[1] // x.k.shape[1]
    g = h // group
    start = 0 if x.seq_start is None else int(x.seq_start[b, n])
    q, k, v = x.q[b, :, start:], x.k[b, g, start:], x.v[b, g, start:]
    p, s = n - start, x.q.shape[3] ** -0.5
    begin = p // W * W if config.window == "block" else max(0, (p - W + 1) // P * P)
    logits, values = [], []
    for j in range(p + 1):
        if j >= begin or j < S:
            logits.append(s * q[h, p] @ k[j])
            values.append(v[j])
    for c in range(begin // P):
        if c * P < S:
            continue
        keys, chunk_values = k[c * P : (c + 1) * P], v[c * P : (c + 1) * P]
        if isinstance(x.maps, PooledMaps):
            weights = (s * keys @ x.maps.mu[g]).softmax(0)
            k_rfa, omega = weights @ keys, x.maps.phi[g]
        else:
            qbar = q[g * group : (g + 1) * group, c * P : (c + 1) * P].mean((0, 1))
            k_rfa = affine_by_hand(x.maps.k, keys.mean(0))
            omega = affine_by_hand(x.maps.q, qbar) + k_rfa
        beta = (s * keys @ omega - s / 2 * keys.square().sum(-1)).softmax(0)
        logits.append(s * q[h, p] @ k_rfa + x.bias[h])
        values.append(beta @ chunk_values)
    return torch.stack(logits).softmax(0) @ torch.stack(values)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_reference_is_the_formula(config, packed):
    x = make(config, T=39, D=8, packed=packed)
    out = reference(config, x)
    for b, h, n in [
        (0, 0, 0),
        (0, 1, 3),
        (1, 2, 11),
        (0, 3, 24),
        (1, 0, 25),
        (1, 3, 37),
        (0, 2, 38),
    ]:
        torch.testing.assert_close(
            out[b, h, n], by_hand(config, x, b, h, n), rtol=1e-11, atol=1e-12
        )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradcheck_of_the_reference(config):
    # The same with a window of 4: up to three chunks are seen as summaries, and the last chunk is
    # incomplete.
    config = dataclasses.replace(
        config, window_size=4, chunk_size=2, sink_size=config.sink_size // 2
    )
    x = make(config, B=1, H=2, G=1, D=3, T=11).requires_grad()
    names, tensors = zip(*x.tensors().items(), strict=True)

    def f(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, values, strict=True))
        maps = _with_tensors(x, given)
        return reference(
            config, Inputs(given["q"], given["k"], given["v"], maps, given["bias"], None)
        )

    assert torch.autograd.gradcheck(f, tensors, atol=1e-6)


def _with_tensors(x, given):
    if isinstance(x.maps, PooledMaps):
        return PooledMaps(given["mu"], given["phi"])
    return AffineMaps(
        *(
            AffineMap(*(given.get(f"{side}.{name}") for name in AffineMap._fields))
            for side in ("q", "k")
        )
    )


def test_every_parameter_of_the_maps_gets_a_gradient():
    for config in CONFIGS:
        x = make(config, T=40).requires_grad()
        reference(config, x).square().sum().backward()
        for name, tensor in map_tensors(x.maps).items():
            assert tensor.grad.abs().max() > 0, name
        assert x.bias.grad.abs().min() > 0


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 40),
    window=st.sampled_from(["sliding", "block"]),
    S=st.sampled_from([0, 4, 8]),
    seed=st.integers(0, 100),
)
def test_a_window_as_long_as_the_row_is_plain_causal_attention(T, window, S, seed):
    config = EvaConfig(window_size=40, chunk_size=4, window=window, sink_size=S)
    x = make(config, T=T, seed=seed)
    causal = F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(reference(config, x), causal, rtol=1e-12, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    config=st.sampled_from(CONFIGS),
    T=st.integers(2, 60),
    at=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_future_token_changes_no_past_output(config, T, at, seed):
    x = make(config, T=T, seed=seed)
    n = min(int(at * T), T - 1)
    before = reference(config, x)[:, :, :n]
    for tensor in (x.q, x.k, x.v):
        tensor[:, :, n:] += 10 * torch.randn_like(tensor[:, :, n:])
    assert torch.equal(reference(config, x)[:, :, :n], before)


@settings(max_examples=40, deadline=None)
@given(config=st.sampled_from(CONFIGS), T=st.integers(1, 80), seed=st.integers(0, 9))
def test_a_document_alone_equals_the_document_in_a_pack(config, T, seed):
    x = make(config, T=T, packed=True, seed=seed)
    out = reference(config, x)
    for b in range(x.q.shape[0]):
        starts = x.seq_start[b].unique().tolist()
        for start, end in zip(starts, [*starts[1:], T], strict=True):
            alone = Inputs(
                *(t[b : b + 1, :, start:end] for t in (x.q, x.k, x.v)), x.maps, x.bias, None
            )
            torch.testing.assert_close(
                reference(config, alone)[0], out[b, :, start:end], rtol=1e-12, atol=1e-12
            )


@settings(max_examples=40, deadline=None)
@given(config=st.sampled_from(CONFIGS), T=st.integers(1, 60), pad=st.integers(1, 30))
def test_padding_behind_a_row_changes_nothing_in_it(config, T, pad):
    x = make(config, T=T)

    def pad_with_noise(t):
        noise = 100 * torch.randn(*t.shape[:2], pad, t.shape[3], dtype=t.dtype)
        return torch.cat([t, noise], 2)

    padded = Inputs(*map(pad_with_noise, (x.q, x.k, x.v)), x.maps, x.bias, None)
    torch.testing.assert_close(
        reference(config, padded)[:, :, :T], reference(config, x), rtol=1e-12, atol=1e-12
    )


def test_no_maps_means_window_and_sinks_only():
    config = EvaConfig(window_size=8, chunk_size=4)
    x = make(config, T=50)
    out = eva_attention(x.q, x.k, x.v, config, None, impl="reference")
    n = torch.arange(50)
    start = ((n - 7).clamp(min=0) // 4 * 4)[:, None]
    mask = (n <= n[:, None]) & ((n >= start) | (n < 4))
    expected = F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


def test_bias_of_log_P_makes_a_chunk_of_equal_keys_weigh_what_exact_attention_gives_it():
    config = EvaConfig(window_size=4, chunk_size=4, sink_size=0)
    x = make(config, T=30, H=2, G=2)
    x.k[:] = x.k[:, :, :1]
    identity = AffineMap(torch.eye(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64))
    x.maps, x.bias = (
        AffineMaps(identity, identity),
        torch.full((2,), math.log(4), dtype=torch.float64),
    )
    exact = F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)
    torch.testing.assert_close(reference(config, x), exact, rtol=1e-12, atol=1e-12)


def test_summaries_survive_large_keys():
    """The centred form in float32 stays near float64 where the plain form cancels."""
    config = EvaConfig(window_size=8, chunk_size=4)
    x = make(config, T=64)
    x.k += 100.0
    exact = chunk_summaries(config, x.q, x.k, x.v, x.maps)
    low = x.to(torch.float32)
    for value, expected in zip(
        chunk_summaries(config, low.q, low.k, low.v, low.maps), exact, strict=True
    ):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)


def test_summaries_ignore_the_precision_setting_of_matrix_products():
    """Half-precision products of float32 matrices would cost three digits."""
    config = EvaConfig(window_size=8, chunk_size=4)
    x = make(config, T=64).to(torch.float32)
    before = torch.get_float32_matmul_precision()
    exact = chunk_summaries(config, x.q, x.k, x.v, x.maps)
    try:
        torch.set_float32_matmul_precision("medium")
        assert all(map(torch.equal, chunk_summaries(config, x.q, x.k, x.v, x.maps), exact))
    finally:
        torch.set_float32_matmul_precision(before)


def test_low_precision_inputs_are_summarised_in_float32_and_rounded_once():
    config = EvaConfig(window_size=8, chunk_size=4)
    low = make(config, T=64).to(torch.bfloat16)
    wide = Inputs(low.q.float(), low.k.float(), low.v.float(), low.maps, low.bias, None)
    for value, expected in zip(
        chunk_summaries(config, low.q, low.k, low.v, low.maps),
        chunk_summaries(config, wide.q, wide.k, wide.v, wide.maps),
        strict=True,
    ):
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected.bfloat16())


def test_noise_is_added_to_omega():
    config = EvaConfig(window_size=8, chunk_size=4, training_noise=True)
    x = make(config, T=64)
    noise = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    shifted = x.maps._replace(q=x.maps.q._replace(bias=x.maps.q.bias + noise[0, 0, 0]))
    constant = noise[:1, :1, :1].expand_as(noise)
    for a, b in zip(
        chunk_summaries(config, x.q, x.k, x.v, x.maps, noise=constant),
        chunk_summaries(config, x.q, x.k, x.v, shifted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_wrong_arguments_say_what_would_work():
    config = EvaConfig(window_size=8, chunk_size=4)
    x = make(config, T=20)
    with pytest.raises(ValueError, match="one of 'auto', 'triton', 'flex', 'reference'"):
        eva_attention(x.q, x.k, x.v, config, x.maps, impl="triton2")
    with pytest.raises(ValueError, match="divides 4"):
        eva_attention(
            x.q, x.k[:, :1].expand(-1, 3, -1, -1), x.v[:, :1].expand(-1, 3, -1, -1), config, x.maps
        )
    with pytest.raises(ValueError, match=r"bias must be \[4\]"):
        eva_attention(x.q, x.k, x.v, config, x.maps, bias=torch.zeros(2))
    with pytest.raises(ValueError, match=r"seq_start must be \[2, 20\]"):
        eva_attention(
            x.q, x.k, x.v, config, x.maps, seq_start=torch.zeros(2, 19, dtype=torch.int32)
        )
    with pytest.raises(ValueError, match="needs head_dim >= 32, not 16"):
        eva_attention(x.q, x.k, x.v, config, x.maps, impl="flex")
    with pytest.raises(ValueError, match="seq_start must hold integers"):
        eva_attention(x.q, x.k, x.v, config, x.maps, seq_start=torch.zeros(2, 20))
    off = torch.zeros(2, 20, dtype=torch.int32)
    off[1, 10:] = 10
    with pytest.raises(RuntimeError, match="must start on a multiple of chunk_size"):
        eva_attention(x.q, x.k, x.v, config, x.maps, seq_start=off)
    with pytest.raises(ValueError, match=r"noise must be \[2, 2, 5, 16\]"):
        eva_attention(x.q, x.k, x.v, config, x.maps, noise=torch.zeros(2, 2, 4, 16))
    with pytest.raises(ValueError, match="noise is for affine maps"):
        eva_attention(x.q, x.k, x.v, config, None, noise=torch.zeros(2, 2, 5, 16))
    for name in ("q", "bias"):
        y = make(config, T=20)
        getattr(y, name).requires_grad_()
        with pytest.raises(ValueError, match="no backward on a CPU; use impl='reference'"):
            eva_attention(y.q, y.k, y.v, config, y.maps, bias=y.bias, impl="flex")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_size": 24}, "window_size=264 would work"),
        ({"sink_size": 8}, "multiple of chunk_size=16"),
        ({"window": "round"}, "'sliding', 'block'"),
        ({"summary_map": "conv"}, "'linear', 'layernorm', 'pooled'"),
        ({"window_size": 0}, "positive integer"),
        ({"window_size": "256"}, "positive integer"),
        ({"windowsize": 256}, "did you mean 'window_size'"),
        ({"summary_bias": 1}, "true or false"),
    ],
)
def test_config_refuses_what_cannot_work(fields, message):
    with pytest.raises(ValueError, match=message):
        EvaConfig.from_dict(fields)


def test_presets():
    paper, default = EvaConfig.paper(), EvaConfig()
    assert (paper.window, paper.sink_size, paper.summary_map) == ("block", 0, "layernorm")
    assert (paper.training_noise, paper.summary_bias) == (True, False)
    assert (default.window, default.sink_size, default.summary_map) == ("sliding", 16, "linear")
    assert (default.training_noise, default.summary_bias) == (False, True)
    assert EvaConfig(chunk_size=8).sink_size == 8


def test_autocast_decides_the_dtype_and_nothing_else():
    """As scaled_dot_product_attention does; RoPE leaves q and k in float32 under autocast."""
    config = EvaConfig(window_size=16, chunk_size=8)

    def attend(x: Inputs) -> torch.Tensor:
        return eva_attention(x.q, x.k, x.v, config, x.maps, bias=x.bias)

    exact = make(config, T=60)
    single = exact.to(torch.float32, "cpu")
    half = dataclasses.replace(
        single, q=single.q.bfloat16(), k=single.k.bfloat16(), v=single.v.bfloat16()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(single)
        assert attend(exact).dtype == torch.float64
    assert torch.equal(found, attend(half))


def test_shapes_can_be_had_without_data():
    x = torch.empty(1, 2, 40, 16, device="meta")
    assert eva_attention(x, x, x, EvaConfig(window_size=16, chunk_size=8), None).shape == x.shape
