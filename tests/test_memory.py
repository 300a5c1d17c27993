"""max_batch: the estimate is monotone, counts what is allocated, and is what really fits."""

import gc
import json
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch

import zoo
from flasheva.triton import ops
from tests.command_line import assert_mistake, run
from tests.test_cache import KINDS, tiny
from tests.tiny import make_model, mixed
from tools.benchmarks.batch import ran_out_of_memory
from zoo.alive_bytes import AliveBytes
from zoo.decoding import Decoder
from zoo.description import describe
from zoo.families import build
from zoo.memory import _free, _Needs, weight_bytes
from zoo.prefill import prefill
from zoo.sampling import Sampling

MIB, GIB = 2**20, 2**30
HYBRID = ("eva_attention", "full_attention", "eva_attention") * 2


def on_meta(*layer_types: str, dtype: torch.dtype = torch.bfloat16) -> zoo.CausalLM:
    """Pythia 70m, whose layers have these types."""
    with torch.device("meta"):
        return build(describe("pythia-70m", layer_types=layer_types), "auto").to(dtype)


def needs(model: zoo.CausalLM, max_seq_len: int) -> _Needs:
    return _Needs(model, max_seq_len, None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_never_need_less(kind):
    found = needs(tiny((kind,)).to("meta"), 4096)
    # Where pieces become shorter, and where they have their least size.
    rows = [1, 7, 8, 9, 10, 16, 17, 60, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 5000]
    bytes_ = [found.up_to(count) for count in rows]
    assert bytes_ == sorted(bytes_)


def test_max_batch_is_the_largest_that_fits():
    model = on_meta(*HYBRID)
    rows = zoo.max_batch(model, 2048, GIB)
    assert zoo.memory_of(model, rows, 2048) <= GIB < zoo.memory_of(model, rows + 1, 2048)
    assert zoo.max_batch(model, 2048, zoo.memory_of(model, 5, 2048)) == 5


def test_the_cache_that_is_counted_is_the_model_s():
    model = make_model(mixed("llama"))
    found = needs(model, 100)
    for rows in (1, 3):
        real = model.new_cache(rows, 100)
        assert found._cache(found._whole, rows).nbytes == real.nbytes
    assert found.row_bytes <= model.new_cache(1, 100).nbytes


@pytest.mark.skipif(not ops.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", ["eva_attention", "window_attention"])
@torch.no_grad()
def test_what_is_counted_is_what_a_real_run_allocates(kind):
    """Without launches: Triton's interpreter keeps the last tensors that it got."""
    T = 128
    model = tiny((kind,), torch.float32, impl="triton", window_size=32, chunk_size=16)
    cache = model.new_cache(2, T)
    launch = staticmethod(lambda *_, **options: None)
    with mock.patch("flasheva.triton.call.Call.launch", launch), AliveBytes() as alive:
        ids = torch.zeros(2, T, dtype=torch.int64)
        seen = torch.zeros(2, model.config.vocab_size, dtype=torch.bool)
        lengths = torch.full_like(cache.length, T - 1)
        logits = prefill(model, ids, lengths, cache)
        assert logits.shape == seen.shape
    assert needs(model, T)._computing(2) == pytest.approx(alive.peak, rel=0.01)


def test_weights_count_once_whether_they_are_loaded_or_not():
    loaded = make_model(mixed("gpt_neox"))
    with torch.device("meta"):
        empty = build(loaded.config, "auto")
    for rows in (1, 20):
        assert zoo.memory_of(loaded, rows, 64) == zoo.memory_of(empty, rows, 64)
    weights = sum(parameter.nbytes for parameter in loaded.parameters())
    twice = zoo.memory_of(make_model(mixed("gpt_neox"), dtype=torch.float64), 1, 64)
    assert twice - zoo.memory_of(loaded, 1, 64) >= weights


@pytest.mark.parametrize(("fraction", "left"), [(1.0, 2 * GIB), (0.25, 0)])
def test_without_a_number_what_is_free_counts_and_what_the_model_has(fraction, left, monkeypatch):
    """1 of 8 GiB is free; of the process's 3 GiB 1 is not in use, and a limit may be below."""
    model = make_model(mixed("gpt_neox"))
    monkeypatch.setattr(type(model), "device", torch.device("cuda:0"))
    for name, value in {
        "is_available": True,
        "mem_get_info": (GIB, 8 * GIB),
        "memory_reserved": 3 * GIB,
        "memory_allocated": 2 * GIB,
        "get_per_process_memory_fraction": fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert _free(model) == left + weight_bytes(model)


@pytest.mark.slow
def test_layers_with_full_attention_cost_rows():
    eva, hybrid, full = (
        zoo.max_batch(on_meta(*kinds), 8192, 2 * GIB)
        for kinds in (("eva_attention",) * 6, HYBRID, ("full_attention",) * 6)
    )
    assert eva > 2 * hybrid > 3 * full > 0


def test_sampling_and_a_smaller_cache_count():
    model = on_meta(*HYBRID)
    sampled = Sampling(temperature=1.0, top_p=0.9)
    greedy = zoo.memory_of(model, 500, 128)
    assert zoo.memory_of(model, 500, 128, sampling=sampled) > greedy
    assert zoo.memory_of(model, 500, 128, cache_dtype="float8_e4m3fn") < greedy


def test_mistakes_say_what_would_work():
    model = on_meta("eva_attention", *HYBRID[1:])
    with pytest.raises(ValueError, match=r"one row of 2,048 tokens needs .* shorter max_seq_len"):
        zoo.max_batch(model, 2048, 100 * MIB)
    with pytest.raises(
        ValueError, match=r"memory, in bytes, must be an int of at least 1, not 0$"
    ):
        zoo.max_batch(model, 2048, 0)
    with pytest.raises(ValueError, match="max_seq_len must be an int of at least 1, not 0"):
        zoo.max_batch(model, 0, GIB)
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, not 0"):
        zoo.memory_of(model, 0, 2048)
    for name, given in (("memory", 0.5 * GIB), ("max_seq_len", 64.0), ("max_seq_len", True)):
        with pytest.raises(ValueError, match=rf"^{name}.* must be an int of at least 1, not "):
            zoo.max_batch(model, **{"max_seq_len": 64, "memory": GIB, name: given})
    with pytest.raises(ValueError, match=r"^batch_size must be an int of at least 1, not 2\.0$"):
        zoo.memory_of(model, 2.0, 64)
    numpy = zoo.max_batch(model, np.int64(64), np.int64(GIB))
    assert numpy == zoo.max_batch(model, 64, GIB)
    with pytest.raises(ValueError, match="memory must be given for a model on cpu"):
        zoo.max_batch(make_model(mixed("llama")), 64)


@pytest.mark.slow
def test_info_says_how_many_rows_fit():
    words = ["info", "pythia-70m-eva", "--context", 2048, "--dtype", "bfloat16", "--memory", 0.5]
    rows = zoo.max_batch(on_meta(*("eva_attention",) * 6), 2048, GIB // 2)
    assert f"A batch in 0.5 GiB of a GPU has at most {rows:,} such rows" in run(*words).out
    found = json.loads(run(*words, "--json").out)
    assert (found["memory_gib"], found["max_batch"]) == (0.5, rows)
    assert "max_batch" not in json.loads(run("info", "pythia-70m", "--json").out)
    assert_mistake(run(*words[:-1], "0.1"), "one row of 2,048 tokens needs")
    assert_mistake(run(*words[:-1], "0"), "--memory must be a number of GiB above 0")
    wide = ("float64" if word == "bfloat16" else word for word in words)
    assert_mistake(run(*wide), "--dtype must be another than float64")


def largest(fits: Callable[[int], bool], low: int, high: int, step: int) -> int:
    """The largest number that fits, to within `step`; `low` does, `high` counts as too much."""
    while high - low > step:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@pytest.mark.parametrize("limit", [100, 104, 149])
def test_the_search_finds_a_known_limit(limit):
    assert limit - 3 < largest(lambda rows: rows <= limit, 100, 150, 3) <= limit


# On a GPU


@torch.inference_mode()
def runs(model: zoo.CausalLM, rows: int, max_seq_len: int, prompt: int) -> bool:
    """Whether a prefill of so many tokens and a few captured steps find enough memory."""
    try:
        device = model.device
        cache = model.new_cache(rows, max_seq_len)
        ids = torch.zeros(rows, max_seq_len, dtype=torch.int64, device=device)
        lengths = torch.full_like(cache.length, prompt)
        seen = torch.zeros(rows, model.config.vocab_size, dtype=torch.bool, device=device)
        logits = prefill(model, ids[:, :prompt], lengths, cache)
        steps = Decoder(model, cache, sampling=Sampling(), seen=seen, room=[99] * rows)
        steps.start(logits)
        for _ in range(4):
            steps.take()
        torch.cuda.synchronize()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return False
    return True


def emptied(rows: int, model: zoo.CausalLM, max_seq_len: int, prompt: int) -> bool:
    """`runs`, on a GPU that holds nothing but the model before and after it."""
    found = runs(model, rows, max_seq_len, prompt)
    gc.collect()
    torch.cuda.empty_cache()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(
    "layer_types",
    [("eva_attention",) * 6, ("full_attention",) * 6, HYBRID],
    ids=["eva", "full", "hybrid"],
)
def test_what_fits_is_within_10_percent(layer_types):
    T = 8192
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    before = torch.cuda.get_per_process_memory_fraction()
    limit = torch.cuda.memory_reserved() + 4 * GIB
    torch.cuda.set_per_process_memory_fraction(limit / whole)
    try:
        model = zoo.load(
            "pythia-70m",
            layer_types=layer_types,
            weights="random",
            dtype=torch.bfloat16,
            device="cuda",
        )
        predicted = zoo.max_batch(model, T)
        assert emptied(predicted, model, T, T - 8)
        # Of a short prompt the cache is as large, and a piece as long.
        high = predicted * 5 // 4 + 2
        found = largest(lambda rows: emptied(rows, model, T, 600), predicted, high, 1 + high // 99)
        assert predicted >= 0.9 * found, (predicted, found)
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
        gc.collect()
        torch.cuda.empty_cache()
