"""A float8 cache: what is stored is rounded once, saturates, and otherwise nothing changes."""

import itertools
import json

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import zoo
from flasheva import storage
from flasheva.storage import storage_dtype, stored
from flasheva.triton import cache_ops, ops
from layers import ModelCache
from tests.command_line import assert_mistake, run, save
from tests.test_cache import LENGTH, in_pieces, one_pass, random_pieces, tiny
from tests.test_decode import DEVICE, arguments, models, tokens
from tests.tiny import TEXT, mixed

FLOAT8 = torch.float8_e4m3fn
HUGE = 1e4  # keys and values so many times larger overflow
IDS = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
needs_float8 = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9),
    reason="Triton has no float8_e4m3fn for this GPU",
)


def enlarge(model):
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.k_proj.weight.mul_(HUGE)
            layer.attention.v_proj.weight.mul_(HUGE)


def round_what_is_stored(cache: ModelCache) -> None:
    for layer in cache.layers:
        for tensor in layer.tensors():
            if tensor is not getattr(layer, "q_sum", None):
                tensor.copy_(tensor.clamp(-448, 448).to(FLOAT8))


@pytest.mark.parametrize("huge", [False, True], ids=["", "overflowing"])
@pytest.mark.parametrize(
    ("window", "pieces"),
    [
        ("block", [1] * LENGTH),
        # In pieces of up to a window nobody sees a summary that the same piece completed.
        ("sliding", [8, 1, 3, 8, 7, 8, 2, 1, 1, 8, 8, 6]),
    ],
    ids=["steps", "pieces"],
)
def test_it_is_a_cache_that_is_rounded_after_every_piece(window, pieces, huge):
    model = tiny(window=window)
    if huge:
        enlarge(model)
    float8, rounded = model.new_cache(2, 64, cache_dtype=FLOAT8), model.new_cache(2, 64)
    with torch.no_grad():
        for piece in IDS.split(pieces, 1):
            out, expected = model(piece, float8), model(piece, rounded)
            assert out.isfinite().all()
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
            round_what_is_stored(rounded)
    if not huge:  # rounding is there, and is small
        error = (out - one_pass(model, IDS)[:, -out.shape[1] :]).abs().max()
        assert 1e-5 < error < 0.1


@pytest.mark.parametrize("layer_types", [("full_attention",), ("window_attention",)], ids=str)
def test_a_prompt_read_in_one_piece_is_exact_without_summaries(layer_types):
    """What is new is seen as it came."""
    model = tiny(layer_types)
    out = in_pieces(model, IDS, [LENGTH], cache_dtype=FLOAT8)
    torch.testing.assert_close(out, one_pass(model, IDS), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_float8_saturates(dtype):
    x = torch.tensor([449, 6e4, -460, float("inf"), -float("inf"), 1.0], dtype=dtype)
    assert stored(x, FLOAT8).float().tolist() == [448, 448, -448, 448, -448, 1]
    assert stored(x.new_tensor([float("nan")]), FLOAT8).float().isnan().all()


@pytest.mark.parametrize("window", ["sliding", "block"])
def test_rollback_forgets_exactly(window):
    model = tiny(window=window, sink_size=4)
    clean = model.new_cache(2, 72, cache_dtype=FLOAT8)
    mixed_up = model.new_cache(2, 72, cache_dtype=FLOAT8, max_rollback=6)
    with torch.no_grad():
        for number, piece in enumerate(IDS.split(random_pieces(3), 1)):
            wrong = number % 7
            noisy = torch.cat([piece, (piece[:, :1] + 1).remainder(97).expand(-1, wrong)], 1)
            out = model(noisy, mixed_up)[:, : piece.shape[1]]
            mixed_up.rollback(wrong)
            torch.testing.assert_close(out, model(piece, clean), rtol=0, atol=1e-10)
        mixed_up.reset()
        clean.reset()
        torch.testing.assert_close(model(IDS[:, :9], mixed_up), model(IDS[:, :9], clean))


def test_it_is_half_of_bfloat16():
    model = tiny(dtype=torch.bfloat16)
    half, whole = (model.new_cache(2, 512, cache_dtype=dtype) for dtype in (FLOAT8, None))
    sums = sum(layer.q_sum.nbytes for layer in whole.layers if hasattr(layer, "q_sum"))
    assert half.nbytes - sums == (whole.nbytes - sums) / 2
    assert sums < 0.01 * whole.nbytes


def test_other_dtypes_are_refused(monkeypatch):
    model = tiny()
    wrong = r"must be float8_e4m3fn or the model's float64, not "
    for dtype in ("fp8", torch.int8, torch.float32, "float8_e5m2"):
        with pytest.raises(ValueError, match=wrong):
            model.new_cache(1, 8, cache_dtype=dtype)
    for same in (None, torch.float64, "float64"):
        assert model.new_cache(1, 8, cache_dtype=same).layers[0].window_k.dtype == torch.float64
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"needs compute capability 8\.9 or later, not 8\.0"):
        storage_dtype("float8_e4m3fn", torch.bfloat16, "cuda")


def test_a_wrong_dtype_is_refused_before_anything_is_read(monkeypatch):
    half, whole = tiny(dtype=torch.float16), tiny(dtype=torch.float32)
    monkeypatch.setattr("zoo.generation.prefill", None)
    for write in (zoo.generate, zoo.stream):
        with pytest.raises(ValueError, match=r"model's float32, not 'fp8'$"):
            write(whole, [1, 2], cache_dtype="fp8")
        with pytest.raises(ValueError, match=r"model's float16, not torch\.float32$"):
            write(whole, [1, 2], draft=half, cache_dtype=torch.float32)  # fits one of the two


def test_a_cache_of_another_model_is_refused_still():
    cache = tiny(dtype=torch.float32).new_cache(1, 8, cache_dtype=FLOAT8)
    with pytest.raises(ValueError, match="made by another model"):
        tiny()(torch.zeros(1, 1, dtype=torch.long), cache)


@pytest.mark.slow
def test_pieces_and_steps_compile():
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, eager = (model.new_cache(2, 64, cache_dtype=FLOAT8) for _ in range(2))
    with torch.no_grad():
        for piece in IDS.split([20, 1, 20, *[1] * 20], 1):
            out = compiled(piece, ours)
            torch.testing.assert_close(out, model(piece, eager), rtol=0, atol=1e-10)


@pytest.fixture
def exact_float8(monkeypatch):
    """Triton's interpreter rounds to float8 wrongly: half up, without carry; so PyTorch does."""
    convert = interpreter._convert_float

    def exact(x, source, target, rounding):
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(x, source, target, rounding)
        rounded = torch.from_numpy(np.array(x)).to(FLOAT8)
        return rounded.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", exact)


@pytest.mark.parametrize(
    ("kinds", "huge"),
    [
        (("eva_attention",), False),
        (("eva_attention",), True),
        pytest.param(("window_attention", "full_attention"), False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("exact_float8")
@needs_float8
def test_the_decode_kernel_stores_and_sees_the_same(kinds, huge):
    model, low, _ = models(kinds, window_size=16, chunk_size=8)
    if huge:
        enlarge(model)
        enlarge(low)
    ids = tokens(2, 50)
    kernel, plain = (model.new_cache(2, 64, cache_dtype=FLOAT8) for _ in range(2))
    with torch.no_grad():
        for cache in (kernel, plain):
            low(ids[:, :37], cache)
        for token in ids[:, 37:].split(1, 1):
            out, expected = model(token, kernel), low(token, plain)
            assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    for ours, theirs in zip(kernel.layers, plain.layers, strict=True):
        for a, b in itertools.islice(zip(ours.tensors(), theirs.tensors(), strict=True), 4):
            # On a GPU both paths may round a number of the boundary differently.
            assert (a.float() - b.float()).abs().max() <= (0 if ops.INTERPRETED else 32)


@needs_float8
def test_the_op_is_well_registered():
    # Not "test_schema", which multiplies what it compares; no float8 can be. tests/test_decode.py
    # has it.
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(cache_ops._decode, arguments(FLOAT8), test_utils=others)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
def test_the_ops_that_write_are_well_registered(dtype):
    target, x = torch.zeros(2, 2, 9, 16).to(dtype), torch.randn(2, 2, 3, 16).to(dtype)
    index = torch.tensor([[4, 0, 8], [1, 2, 3]])
    where = torch.arange(9).expand(2, -1) % 2 == 0
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = others if dtype == FLOAT8 else ("test_schema", *others)  # as above
    torch.library.opcheck(storage._scatter_op, (target, index, x), test_utils=tests)
    whole = torch.randn(2, 2, 9, 16).to(dtype)
    out = torch.randn(2, 4, 3, 16)
    torch.library.opcheck(storage._replace_op, (target, where, whole, out), test_utils=tests)
    sinks, new = target[:, :, :2].clone(), torch.randn(2, 2, 3, 16)
    torch.library.opcheck(storage._readable_op, (sinks, target, index, new), test_utils=tests)


def test_text_is_generated_onto_it(tmp_path):
    folder = save(tmp_path / "model", mixed("llama"))
    model = zoo.load(folder)
    options = {"max_new_tokens": 20, "cache_dtype": "float8_e4m3fn"}
    [row] = zoo.generate(model, "A cache", **options)
    assert len(row.ids) == 20
    assert "".join(zoo.stream(model, "A cache", **options)) == row.text
    [drafted] = zoo.generate(model, "A cache", draft=model, **options)
    assert len(drafted.ids) == 20
    command = ("generate", folder, "A cache", "--max-new-tokens", 20, "--cache-dtype")
    assert run(*command, "float8_e4m3fn").out.strip() == row.text.strip()
    assert_mistake(run(*command, "int4"), "float8_e4m3fn or the model's float32, not 'int4'")


def test_perplexity_is_measured_through_it(tmp_path):
    folder = save(tmp_path / "model", mixed("llama"))
    (tmp_path / "text.txt").write_text(8 * TEXT, encoding="utf-8")
    command = ("perplexity", folder, "--text", tmp_path / "text.txt", "--window", 64, "--json")
    cached = (*command, "--cache-dtype")
    plain, same, float8, steps = (
        json.loads(run(*line).out)
        for line in (
            command,
            (*cached, "float32"),
            (*cached, "float8_e4m3fn"),
            (*cached, "float8_e4m3fn", "--piece-size", 1),
        )
    )
    assert same["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert float8["perplexity"] == pytest.approx(plain["perplexity"], rel=0.01)
    assert len({row["perplexity"] for row in (same, float8, steps)}) == 3
    assert (float8["cache_dtype"], float8["piece"]) == ("float8_e4m3fn", 16)
    assert steps["piece"] == 1
    assert "cache_dtype" not in plain
    assert_mistake(run(*cached, "int4"), "not 'int4'")
    assert_mistake(run(*cached, "float32", "--piece-size", 0), "must be at least 1, not 0")
    assert_mistake(run(*command, "--piece-size", 4), "give --cache-dtype")
