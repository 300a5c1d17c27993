"""torch.compile takes whole models: no graph break, and no recompile as lengths change.

`aot_eager` traces all that Inductor would compile, in a second; one test runs Inductor itself.
"""

import itertools
import re
from functools import partial

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import zoo
import zoo.generation
import zoo.prefill
from flasheva.triton import ops
from tests.test_cache import KINDS, tiny
from zoo import compiled_blocks

LENGTHS = [40, 57, 100, 33, 200]
no_recompile = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids(B: int, T: int) -> torch.Tensor:
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(T))


def any_length(x: torch.Tensor) -> torch.Tensor:
    """Says that dim 1 may have any size. (dynamic=True would also make every other size and every
    number of a config a symbol, and tracing ten times as slow.)"""
    torch._dynamo.mark_dynamic(x, 1)
    return x


def test_the_guard_of_these_tests_can_fail():
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled(torch.zeros(3))
    with no_recompile, pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(torch.zeros(4))


@pytest.mark.slow
@pytest.mark.parametrize(("window", "summary_map"), [("sliding", "linear"), ("block", "pooled")])
def test_dynamic_lengths_never_recompile(window, summary_map):
    model = tiny(window=window, summary_map=summary_map)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), no_recompile:
        for T in LENGTHS:
            out = compiled(any_length(ids(2, T)))
            torch.testing.assert_close(out, model(ids(2, T)), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_by_default_no_length_from_the_third_on_recompiles(dtype):
    """Casts to float32 are there in bfloat16 only, and ask how their input lies in memory."""
    model = tiny(summary_map="layernorm", dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for T in LENGTHS[:2]:
            compiled(ids(2, T))
        with no_recompile:
            for T in LENGTHS:
                full = model(ids(2, T))
                torch.testing.assert_close(compiled(ids(2, T)), full, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_training_on_packed_rows_never_recompiles_and_has_the_same_gradients():
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with no_recompile:
        for T in LENGTHS:
            start = (torch.arange(T, dtype=torch.int32) // 16 * 16).expand(2, -1).contiguous()
            grads = []
            for run in (model, compiled):
                model.zero_grad()
                out = run(any_length(ids(2, T)), seq_start=any_length(start))
                out.square().mean().backward()
                grads.append([p.grad.clone() for p in model.parameters()])
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_training_with_noise_compiles():
    model = tiny(("eva_attention",), training_noise=True).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids(2, 40)).square().mean().backward()
    assert not torch.equal(compiled(ids(2, 40)), compiled(ids(2, 40)))


def test_decoding_compiles_for_prefill_and_steps_only():
    model = tiny(KINDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    full = model(ids(2, 70))
    with torch.no_grad():
        cache = model.new_cache(2, 96)
        pieces = ids(2, 70).split([20, 1, 20] + [1] * 29, 1)
        out = [compiled(piece, cache) for piece in pieces[:2]]
        with no_recompile:
            out += [compiled(piece, cache) for piece in pieces[2:]]
    torch.testing.assert_close(torch.cat(out, 1), full, rtol=0, atol=1e-10)


def test_inductor_gives_the_same_numbers():
    """The real compiler, once: a step of every kind of layer onto a cache."""
    model = tiny(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        full = model(ids(1, 41))
        cache = model.new_cache(1, 64)
        model(ids(1, 41)[:, :36], cache)
        out = [compiled(token, cache) for token in ids(1, 41)[:, 36:].split(1, 1)]
    assert (torch.cat(out, 1) - full[:, 36:]).abs().max() <= 1e-5 * full.abs().max()


@pytest.mark.slow
def test_a_compiled_piece_makes_no_second_cache():
    """What a graph writes in place would be copied; what an op writes is not."""
    model = tiny(("eva_attention", "full_attention"), torch.float32)
    cache = model.new_cache(2, 1000)
    pieces = zoo.prefill.compiled_pieces(model)
    with torch.inference_mode():
        _, code = run_and_get_code(pieces, model, ids(2, 40), cache, torch.tensor([40, 33]))
    assert len(code) == 2  # of a block of each kind
    made = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", "\n".join(code))
    long = [x for layer in cache.layers for x in layer.tensors() if x.shape[2] > 200]
    assert len(long) == 4
    assert made
    assert not {", ".join(map(str, x.shape)) for x in long} & set(made)
    # Reads before writes, or Inductor would copy what is written; in place, not onto such copies.
    ops = re.findall(r"flasheva\.(\w+)\.default\((\w+)", code[0])
    found = [name for name, _ in ops]
    assert sorted(found[:3]) == ["replace_", "scatter_", "scatter_"]  # of the summaries
    assert found[3:] == ["readable", "readable", *["replace_"] * 4]
    assert all(target.startswith("arg") for name, target in ops if name != "readable")


@pytest.mark.slow
def test_a_compiled_piece_of_our_kernels_gets_the_cache_itself():
    model = tiny(("eva_attention",), torch.float32, impl="triton", window_size=32, chunk_size=8)
    model = model.to("cpu" if ops.INTERPRETED else "cuda")
    new, lengths = ids(2, 40).to(model.device), torch.tensor([40, 33], device=model.device)
    caches = [model.new_cache(2, 1000) for _ in range(2)]
    with torch.inference_mode():
        eager = zoo.prefill.next_logits(model, new, caches[0], lengths)
        pieces = zoo.prefill.compiled_pieces(model)
        out, (code,) = run_and_get_code(pieces, model, new, caches[1], lengths)
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-5)
    for x, y in zip(*([*c.layers[0].tensors()] for c in caches), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    (call,) = re.findall(r"flasheva\.piece\.default\((.*)\[", code)  # up to the maps
    assert len(re.findall(r"\barg\d+_1\b", call)) == 3 + 7  # length, count, bias; the cache


@pytest.mark.slow
def test_training_with_inductor_never_recompiles():
    """Inductor asks more than tracing: whether slices are contiguous, which T % P may decide."""
    model = tiny(("eva_attention",), dtype=torch.float32, window_size=64, chunk_size=16)
    compiled = torch.compile(model, fullgraph=True)
    for number, T in enumerate((300, 517, 1024)):
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            compiled(ids(2, T)).square().mean().backward()


@pytest.fixture
def traced(monkeypatch):
    """What blocks are compiled with traces them only; the number of graphs so far."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled_blocks._handle.cache_clear()
    torch._dynamo.reset()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled_blocks._handle.cache_clear()


@pytest.mark.slow
def test_blocks_of_a_kind_are_compiled_once(traced):
    """For the first sizes, for any others, and for one row; for two models alike."""
    begin = traced()
    two = ("eva_attention", "full_attention")
    for kinds in (two * 2, two[::-1]):
        model = tiny(kinds, torch.float64)
        blocks = compiled_blocks.compiled_blocks(model)
        for rows, length, room in ((3, 100, 128), (5, 170, 256), (1, 120, 128)):
            lengths = torch.randint(1, length, (rows,), generator=torch.Generator().manual_seed(1))
            prompts = ids(rows, length)
            outs = []
            for run in (zoo.prefill.next_logits, partial(zoo.prefill.next_logits, blocks=blocks)):
                cache = model.new_cache(rows, room)
                with torch.inference_mode():
                    given = (model, prompts, lengths, cache, run)
                    outs.append(zoo.prefill.prefill(*given, pad=True, tokens=1))
            torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)
    assert traced() - begin == 3 * len(two)


@pytest.mark.parametrize("compile", ["prefill", True])
def test_generation_does_not_recompile_for_other_prompts(traced, compile):
    model = tiny(dtype=torch.float32)
    for number, length in enumerate((5, 30, 17)):
        prompt = ids(1, length)[0].tolist()
        eager = zoo.generate(model, prompt, max_new_tokens=12)[0].ids
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            out = zoo.generate(model, prompt, max_new_tokens=12, compile=compile)[0].ids
        assert out == eager


@pytest.mark.slow
def test_every_kind_of_cache_can_be_compiled_for_in_one_process(monkeypatch):
    """torch.compile refuses after 8 graphs of one function."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled_blocks._handle.cache_clear()
    model = tiny(("eva_attention",), torch.float32)
    blocks = compiled_blocks.compiled_blocks(model)
    for cache_dtype, back in itertools.product((None, "float8_e4m3fn"), (0, 32)):
        for rows, room in ((1, 128), (1, 256), (3, 128)):
            lengths, prompts = torch.full((rows,), 40), ids(rows, 40)
            outs = []
            for run in (None, blocks):
                cache = model.new_cache(rows, room, max_rollback=back, cache_dtype=cache_dtype)
                with torch.inference_mode():
                    outs.append(model.hidden_states(prompts, cache, lengths=lengths, blocks=run))
            torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=0)
    compiled_blocks._handle.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_with_inductor(dtype, impl):
    """Training, with lengths off the tile grid.

    The tolerance is twice the error of the eager reference path at the same precision.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    sizes = {"window_size": 64, "chunk_size": 16}
    wide = tiny(**sizes).cuda()
    low = tiny(dtype=dtype, **sizes).cuda()
    model = tiny(dtype=dtype, impl=impl, **sizes).cuda()
    for other in (wide, model):  # the same weights, to the last bit
        other.load_state_dict(low.state_dict())
    compiled = torch.compile(model, fullgraph=True)

    def results(run, owner, tokens):
        owner.zero_grad()
        out = run(tokens)
        out.float().square().mean().backward()
        grad = torch.cat([p.grad.double().flatten() for p in owner.parameters()])
        return out.detach().double(), grad

    for number, T in enumerate((300, 517, 1024, 333, 2000)):
        tokens = torch.randint(97, (2, T), device="cuda")
        exact = results(wide, wide, tokens)
        reference = results(low, low, tokens)
        eager = results(model, model, tokens)
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            inductor = results(compiled, model, tokens)
        for name, found in (("eager", eager), ("inductor", inductor)):
            for what, value, low_value, true in zip(
                ("logits", "gradients"), found, reference, exact, strict=True
            ):
                error, allowed = ((x - true).norm() / true.norm() for x in (value, low_value))
                assert error <= 2 * allowed, (T, name, what, float(error), float(allowed))
