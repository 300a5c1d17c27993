"""The Triton kernels answer to the float64 reference; without a GPU, in Triton's interpreter.

Tolerances are those of test_flex.py: at most twice the error of eager attention at the same
precision over the same augmented keys.
"""

import itertools
from functools import partial

import pytest
import torch

from flasheva import (
    AffineMap,
    AffineMaps,
    EvaConfig,
    eva_attention,
    full_attention_packed,
    full_attention_piece,
)
from flasheva.triton import cache_ops, call, forward, ops
from flasheva.triton.arguments import flatten
from flasheva.triton.tiles import Tile
from flasheva.visibility import Positions, visible
from tests.accuracy import (
    UNIT_ROUNDOFF,
    assert_all_as_good_as_eager,
    assert_as_good_as_eager,
    attend,
    eager,
)
from tests.inputs import Inputs, make
from tests.test_cache import tiny
from tests.test_flex import MAPS

# A fused backward computes weights again from the log-sum-exp, a float32 whose last digit is worth
# 2^-21 between 4 and 8 (in units of log 2): four roundings of float32, nothing beside one of the
# others. Eager attention keeps the weights.
ALLOWED = {"of_output": 0.0, "of_gradients": 2**-22, "sums": ("bias", "phi", "q.bias")}
slow = partial(pytest.param, marks=pytest.mark.slow)
interpreted = pytest.mark.skipif(not ops.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def big_tiles(monkeypatch):
    """The interpreter pays per tile, not per element."""
    monkeypatch.setattr(call, "tile_of", lambda *_: Tile(64, 64, 4, 1))


@interpreted
@pytest.mark.parametrize(
    ("window", "S", "G", "D", "T", "packed", "summary_map", "P"),
    [
        ("sliding", 16, 2, 16, 200, False, "linear", 16),
        slow("block", 0, 4, 32, 200, False, "layernorm", 16),
        slow("sliding", 32, 1, 16, 150, False, "pooled", 8),
        ("block", 16, 2, 16, 190, True, "linear", 16),
        slow("sliding", 16, 1, 80, 130, True, "linear", 16),
        ("sliding", 64, 2, 16, 50, False, "linear", 16),  # more sinks than tokens
        ("block", 16, 2, 16, 1, False, "linear", 16),
        slow("sliding", 16, 2, 136, 70, False, "layernorm", 16),  # maps in parts
        slow("sliding", 16, 1, 256, 130, True, "pooled", 16),
        slow("sliding", 96, 2, 16, 120, False, "linear", 24),  # nothing is a power of 2
    ],
)
def test_forward_and_gradients(window, S, G, D, T, packed, summary_map, P, big_tiles):
    W = 48 if P == 24 else 64
    config = EvaConfig(
        window_size=W, chunk_size=P, window=window, sink_size=S, summary_map=summary_map
    )
    exact = make(config, B=1 if packed else 2, G=G, D=D, T=T, packed=packed, seed=T)
    assert_all_as_good_as_eager(config, exact, torch.float32, "cpu", "triton", **ALLOWED)


@pytest.mark.parametrize(
    ("dtype", "D", "T"),
    [
        pytest.param(torch.float32, 16, 150, marks=interpreted),
        pytest.param(torch.float32, 80, 70, marks=[interpreted, pytest.mark.slow]),
        pytest.param(torch.float32, 64, 2048, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, 64, 2048, marks=pytest.mark.gpu),
    ],
)
def test_full_attention_of_packed_rows(dtype, D, T, request):
    """Documents that begin anywhere, some of one or two tokens, one of a whole row."""
    device = "cuda" if request.node.get_closest_marker("gpu") else "cpu"
    rng = torch.Generator().manual_seed(T)
    starts = torch.tensor([max(s for s in (0, 1, 3, 34, 36, 61) if s <= i) for i in range(T)])
    seq_start = torch.stack([starts, torch.zeros_like(starts)]).int()
    exact = [torch.randn(2, h, T, D, generator=rng, dtype=torch.float64) for h in (4, 2, 2, 4)]
    key = torch.arange(T)
    mask = (key <= key[:, None]) & (key >= seq_start[:, :, None])

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None].to(q.device), enable_gqa=True
        )

    def packed(q, k, v):
        out = full_attention_packed(q, k, v, seq_start=seq_start.to(device), impl="triton")
        assert out is not None
        return out

    def run(attend, kind, where):
        *inputs, do = (x.to(where, kind) for x in exact)
        inputs = [x.requires_grad_() for x in inputs]
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, do)]

    reference = run(sdpa, torch.float64, "cpu")
    found, eager_run = run(packed, dtype, device), run(sdpa, dtype, device)
    for name, *values in zip(("o", "dq", "dk", "dv"), found, eager_run, reference, strict=True):
        value, at_once, wanted = (x.cpu() for x in values)
        assert_as_good_as_eager(name, value, at_once, wanted, UNIT_ROUNDOFF[dtype])


def test_full_attention_of_packed_rows_on_a_cpu_is_left_to_pytorch():
    x = torch.zeros(1, 1, 8, 16)
    assert full_attention_packed(x, x, x, seq_start=torch.zeros(1, 8).int()) is None


@pytest.mark.parametrize("factor", [slow(1.0), 1000.0])
def test_summaries_below_and_above_what_the_exact_keys_gave(factor, monkeypatch):
    """Short ones let the forward pass do without a running maximum, long ones do not."""
    monkeypatch.setattr(call, "tile_of", lambda *_: Tile(64, 16, 4, 1))
    monkeypatch.setattr(forward, "_MANY_SUMMARIES", 1)
    config = EvaConfig(window_size=16, chunk_size=4, sink_size=8, summary_bias=True)
    exact = make(config, B=2, H=2, G=2, D=16, T=330, seed=0)
    with torch.no_grad():
        exact.k[1, 1] *= factor  # of this row and head only
        low = exact.to(torch.float32, "cpu" if ops.INTERPRETED else "cuda")
        out, reference = attend(config, low, "triton"), attend(config, exact, "reference")
        at_once = eager(config, low)
    assert_as_good_as_eager("o", out, at_once, reference, UNIT_ROUNDOFF[torch.float32])


@pytest.mark.slow
def test_tiles_larger_than_a_small_window(big_tiles):
    config = EvaConfig(window_size=16, chunk_size=8, window="sliding", sink_size=8)
    exact = make(config, B=1, T=100, packed=True)
    device = "cpu" if ops.INTERPRETED else "cuda"
    assert_all_as_good_as_eager(config, exact, torch.float32, device, "triton", **ALLOWED)


def arguments(x: Inputs, config: EvaConfig, save: bool = True) -> tuple[object, ...]:
    """Arguments of the op."""
    kind, tensors = flatten(x.maps)
    sizes = (config.window_size, config.chunk_size, config.sink_size, config.window)
    return (x.q, x.k, x.v, tensors, x.bias, x.seq_start, None, *sizes, kind, save)


@pytest.mark.parametrize(
    ("summary_map", "packed"), [("linear", True), slow("pooled", False), slow("layernorm", False)]
)
def test_the_op_is_well_registered(summary_map, packed, big_tiles):
    """Schema, fake kernel, autograd, and all of it traced with dynamic sizes."""
    config = EvaConfig(window_size=32, chunk_size=16, sink_size=16, summary_map=summary_map)
    device = "cpu" if ops.INTERPRETED else "cuda"
    x = make(config, B=1, H=2, G=1, T=50, packed=packed).to(torch.float32, device)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops._attention, arguments(x, config, save=False), test_utils=utilities)
    torch.library.opcheck(ops._attention, arguments(x.requires_grad(), config))


def test_the_op_onto_a_cache_is_well_registered(big_tiles):
    device = "cpu" if ops.INTERPRETED else "cuda"
    q, k = torch.randn(2, 4, 5, 16, device=device), torch.randn(2, 2, 85, 16, device=device)
    start = torch.tensor([70, 33], device=device)
    torch.library.opcheck(cache_ops._full_piece, (q, k, k.clone(), start))

    def random(n: int) -> torch.Tensor:
        return torch.randn(2, 2, n, 16, device=device)

    maps = [torch.eye(16, device=device), torch.zeros(16, device=device)]
    cache = [random(n) for n in (16, 16, 64, 64, 9, 9, 1)]
    maps = [maps[0], maps[1], maps[0].clone(), maps[1].clone()]
    args = (q, random(5), random(5), start, torch.full_like(start, 5), None, *cache)
    torch.library.opcheck(cache_ops._piece, (*args, maps, "linear", 48, 16, 16, "sliding"))


@pytest.mark.slow
def test_a_compiled_model_trains_without_a_graph_break(big_tiles):
    torch._dynamo.reset()
    device = "cpu" if ops.INTERPRETED else "cuda"
    sizes = {"window_size": 32, "chunk_size": 16}
    model = tiny(("eva_attention",), torch.float32, impl="triton", **sizes).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(97, (1, 70), generator=torch.Generator().manual_seed(0)).to(device)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(ids).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "window", "S"),
    [
        ("eva_attention", "sliding", 16),
        ("eva_attention", "block", 0),
        ("full_attention", "block", 0),
    ],
)
def test_prefill_onto_a_cache(kind, window, S, big_tiles):
    """Ragged pieces onto an empty cache, a full window, and across windows."""
    device = "cpu" if ops.INTERPRETED else "cuda"
    sizes = {"window_size": 32, "chunk_size": 8, "window": window, "sink_size": S}
    triton = tiny((kind,), torch.float32, impl="triton", **sizes).to(device)
    reference = tiny((kind,), torch.float64, **sizes).to(device)
    reference.load_state_dict(triton.state_dict())
    ids = torch.randint(97, (2, 140), generator=torch.Generator().manual_seed(0)).to(device)
    outs = []
    with torch.no_grad():
        for model in (triton, reference):
            cache, out = model.new_cache(2, 160), []
            for n in (20, 70, 3):
                length = torch.tensor([n, n - n // 3], device=device)
                rows = [r[at : at + n] for r, at in zip(ids, cache.length.tolist(), strict=True)]
                new = model(torch.stack(rows), cache, lengths=length)
                out += [row[:real] for row, real in zip(new, length.tolist(), strict=True)]
            outs.append(torch.cat(out).double())
    assert (outs[0] - outs[1]).abs().max() <= 1e-5 * outs[1].abs().max()


def test_nothing_behind_a_full_cache_is_read(big_tiles):
    """Padding of a piece may stand there: a weight of zero times NaN is NaN."""
    device = "cpu" if ops.INTERPRETED else "cuda"
    N, T, real = 70, 20, 6
    q, k, v = (torch.randn(1, 2, n, 16, device=device) for n in (T, 2 * N, 2 * N))
    for x in (k, v):
        x[:, :, N:] = float("nan")
    k, v = k[:, :1, :N], v[:, :1, :N]
    start = torch.tensor([N - real], device=device)
    out = full_attention_piece(q, k, v, length=start, impl="triton")
    mask = torch.arange(N) <= torch.arange(N - real, N)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, :real], k, v, attn_mask=mask.to(device), enable_gqa=True
    )
    torch.testing.assert_close(out[:, :, :real], expected, rtol=1e-5, atol=1e-6)


def test_projections_are_read_where_they_lie(big_tiles, monkeypatch):
    """q, k, v as views of one product: no copy, and an output that needs none to be merged."""
    config = EvaConfig(window_size=32, chunk_size=16)
    device = "cpu" if ops.INTERPRETED else "cuda"
    x = make(config, B=2, H=2, G=2, T=40).to(torch.float32, device)
    fused = torch.cat([y.transpose(1, 2) for y in (x.q, x.k, x.v)], 2).clone()
    views = [y.transpose(1, 2) for y in fused.split(2, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", None)  # whoever copies, fails
        out = eva_attention(*views, config, None, impl="triton")
    assert out.transpose(1, 2).is_contiguous()
    copies = [y.contiguous() for y in views]
    assert torch.equal(out, eva_attention(*copies, config, None, impl="triton"))


def test_strides_and_dtypes_of_arguments_do_not_matter(big_tiles):
    """A column of a table as the bias; q and k in float32 beside v in float16, as in autocast."""
    config = EvaConfig(window_size=16, chunk_size=8)
    device = "cpu" if ops.INTERPRETED else "cuda"
    x = make(config, B=1, H=2, G=2, T=60).to(torch.float32, device)
    x.bias = torch.stack([x.bias, x.bias + 9], 1)[:, 0]
    x.v = x.v.half()
    out = attend(config, x, "triton")
    torch.testing.assert_close(out, attend(config, x, "reference"), rtol=1e-3, atol=1e-3)


def test_maps_of_other_shapes_are_refused(big_tiles):
    config = EvaConfig(window_size=16, chunk_size=8)
    device = "cpu" if ops.INTERPRETED else "cuda"
    x = make(config, B=1, T=20).to(torch.float32, device)
    small = x.maps.q._replace(weight=x.maps.q.weight[:8, :8])
    with pytest.raises(ValueError, match="needs linear maps of shapes"):
        eva_attention(x.q, x.k, x.v, config, AffineMaps(small, x.maps.k), impl="triton")


@pytest.mark.parametrize("window", ["sliding", "block"])
def test_nothing_behind_the_last_summary_is_read(window, big_tiles, monkeypatch):
    """NaN there would reach the outputs: a weight of zero times NaN is NaN."""
    config = EvaConfig(window_size=32, chunk_size=8, window=window, sink_size=8)
    device = "cpu" if ops.INTERPRETED else "cuda"
    x = make(config, B=1, H=2, G=2, T=120, packed=True).to(torch.float32, device)
    x.seq_start = (torch.arange(120, device=device)[None] >= 104) * 104  # in the last window
    summaries = forward.summaries

    def poisoned(*args):
        k_rfa, v_rfa, *others = summaries(*args)
        padded = [torch.cat([y, torch.full_like(y, float("nan"))], 2) for y in (k_rfa, v_rfa)]
        return *(y[:, :, : y.shape[2] // 2] for y in padded), *others

    monkeypatch.setattr(forward, "summaries", poisoned)
    out = attend(config, x.requires_grad(), "triton")
    grads = torch.autograd.grad(out.square().sum(), list(x.tensors().values()))
    assert all(y.isfinite().all() for y in (out, *grads))


def test_a_bias_that_hides_all_summaries_hides_nothing_else(big_tiles):
    config = EvaConfig(window_size=16, chunk_size=8)
    device = "cpu" if ops.INTERPRETED else "cuda"
    x = make(config, B=1, H=2, G=2, T=150).to(torch.float32, device)
    x.bias = torch.tensor([float("-inf"), torch.finfo(torch.float32).min], device=device)
    out, expected = (attend(config, x, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_noise_gets_no_gradient_and_asks_for_none(big_tiles):
    config = EvaConfig(window_size=16, chunk_size=8)
    device = "cpu" if ops.INTERPRETED else "cuda"
    x = make(config, B=1, H=2, G=2, T=40).to(torch.float32, device)
    noise = torch.zeros(1, 2, 5, 16, device=device, requires_grad=True)
    for impl in ("triton", "reference"):
        out = eva_attention(x.q, x.k, x.v, config, x.maps, noise=noise, impl=impl)
        assert not out.requires_grad


def test_gradients_of_maps_keep_the_dtype_of_each(big_tiles):
    """A large gradient is finite in a float32 bias beside a float16 weight."""
    config = EvaConfig(window_size=16, chunk_size=8)
    device = "cpu" if ops.INTERPRETED else "cuda"
    x = make(config, B=1, H=2, G=2, T=60).to(torch.float32, device).requires_grad()
    q_map = x.maps.q._replace(weight=x.maps.q.weight.detach().half().requires_grad_())
    maps = AffineMaps(q_map, x.maps.k)
    grads = []
    for impl in ("triton", "reference"):
        out = eva_attention(x.q, x.k, x.v, config, maps, bias=x.bias, impl=impl)
        grads += torch.autograd.grad(1e6 * out.square().sum(), [q_map.bias])
    assert grads[0].dtype == torch.float32
    assert grads[0].isfinite().all()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4 * float(grads[1].abs().max()))


def positions_from(start: int, T: int) -> Positions:
    """Of a row whose second document begins at `start`."""
    index = torch.arange(T)
    return Positions(seq_start=torch.where(index < start, 0, start)[None])


@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_summary_that_a_query_sees_is_made_and_few_others(window, packed):
    config = EvaConfig(window_size=32, chunk_size=8, window=window, sink_size=8)
    for T in (1, 31, 32, 33, 40, 41, 63, 64, 65, 200):
        C = call.num_summaries(T, 32, 8, window == "sliding", packed)
        starts = range(0, T, 8) if packed else (0,)  # a last document that starts there
        seen = [
            visible(config, positions_from(start, T), T, T, T // 8, torch.device("cpu"))
            .any(1)[0, T:]
            .nonzero()
            for start in starts
        ]
        needed = max((int(x.max()) + 1 for x in seen if len(x)), default=0)
        assert needed <= C <= T // 8
        assert packed or needed == C or needed == 0


@interpreted
@pytest.mark.parametrize(
    ("dtype", "D", "W", "message"),
    [
        (torch.float64, 16, 32, "needs float32 and float16, not torch.float64; use impl='ref"),
        (torch.bfloat16, 16, 32, "needs float32 and float16, not torch.bfloat16; use impl='ref"),
        (torch.float32, 257, 32, "needs head_dim <= 256, not 257; use impl='flex' or 'reference'"),
        (torch.float32, 16, 8, "needs window_size >= 16, not 8; use impl='flex' or 'reference'"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_line(dtype, D, W, message):
    x = torch.zeros(1, 1, 20, D, dtype=dtype)
    with pytest.raises(ValueError, match="impl='triton' needs") as error:
        eva_attention(x, x, x, EvaConfig(window_size=W, chunk_size=8), None, impl="triton")
    assert message in str(error.value)


def test_without_an_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 1, 20, 16)
    with pytest.raises(ValueError, match="impl='triton' runs on cuda, not cpu; use impl='flex'"):
        eva_attention(x, x, x, EvaConfig(), None, impl="triton")


HEADS = [(1, 2, 2), (2, 4, 2), (3, 6, 1)]  # B, H, G
SETTINGS = [
    (D, window, S, HEADS[number % 3], number % 2 == 1, MAPS[number % 8])
    for number, (D, window, S) in enumerate(
        itertools.product([16, 32, 64, 80, 128, 256], ["sliding", "block"], [0, 16, 32])
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_forward_and_gradients_on_a_gpu(dtype, setting):
    D, window, S, (B, H, G), packed, summary_map = setting
    torch.backends.cuda.matmul.allow_tf32 = False
    config = EvaConfig(
        window_size=64, chunk_size=16, window=window, sink_size=S, summary_map=summary_map
    )
    for T in (1 if packed else 7, 63, 130, 520):
        exact = make(config, B=B, H=H, G=G, D=D, T=T, packed=packed, seed=T)
        assert_all_as_good_as_eager(config, exact, dtype, "cuda", "triton", **ALLOWED)


@pytest.mark.gpu
@pytest.mark.parametrize("window", ["sliding", "block"])
def test_gradients_repeat_to_the_last_bit(window):
    config = EvaConfig(window_size=256, chunk_size=16, window=window)
    x = make(config, B=2, H=4, G=2, D=64, T=3000, packed=True).to(torch.bfloat16, "cuda")
    do = torch.randn_like(x.q)
    runs = []
    for _ in range(3):
        out = attend(config, x.requires_grad(), "triton")
        runs.append(torch.autograd.grad(out, list(x.tensors().values()), do))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    """The last head of a tensor of 2^31 elements and more, against that head alone."""
    config = EvaConfig(window_size=256, chunk_size=16)
    B, H, T, D = 1, 18, 2**20, 128
    assert B * H * T * D > 2**31
    q, k, v, do = (
        torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(4)
    )
    eye, zero = torch.eye(D, device="cuda"), torch.zeros(D, device="cuda")
    maps = AffineMaps(AffineMap(eye, zero), AffineMap(eye, zero))
    results = []
    for heads in (slice(None), slice(H - 1, H)):
        inputs = [x[:, heads].detach().requires_grad_() for x in (q, k, v)]
        out = eva_attention(*inputs, config, maps, impl="triton")
        grads = torch.autograd.grad(out, inputs, do[:, heads])
        results.append([x[:, -1].clone() for x in (out, *grads)])
        del inputs, out, grads
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
