"""The decode kernel answers to one pass of the float64 reference; without a GPU, interpreted."""

import pytest
import torch

from flasheva.triton import cache_ops, decode, ops
from tests.test_cache import tiny

slow = pytest.mark.slow
DEVICE = "cpu" if ops.INTERPRETED else "cuda"
DTYPE = torch.float32
KINDS = ("eva_attention", "window_attention", "full_attention")


def models(layer_types=KINDS, **sizes):
    """The same weights under the kernels, the reference, and the reference in float64."""
    kernels = tiny(layer_types, DTYPE, impl="triton", **sizes).to(DEVICE)
    low = tiny(layer_types, DTYPE, **sizes).to(DEVICE)
    exact = tiny(layer_types, torch.float64, **sizes).to(DEVICE)
    for other in (low, exact):
        other.load_state_dict(kernels.state_dict())
    return kernels, low, exact


def tokens(B: int, T: int) -> torch.Tensor:
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize(
    ("kinds", "window", "S", "P", "summary_map", "splits"),
    [
        (("eva_attention",), "sliding", 8, 8, "linear", 1),
        pytest.param(("eva_attention",), "block", 0, 8, "linear", 2, marks=slow),
        pytest.param(
            ("window_attention", "full_attention"), "sliding", 8, 8, "linear", 2, marks=slow
        ),
        pytest.param(("eva_attention",), "sliding", 32, 16, "layernorm", 2, marks=slow),
        pytest.param(("eva_attention",), "block", 16, 16, "pooled", 2, marks=slow),
        # Nothing is a power of 2.
        pytest.param(("eva_attention",), "sliding", 24, 12, "linear", 5, marks=slow),
        pytest.param(KINDS, "block", 8, 8, "linear", 3, marks=slow),
    ],
)
def test_steps_equal_one_pass(kinds, window, S, P, summary_map, splits, monkeypatch):
    """After prompts that end in the first window, and where chunks leave the window."""
    monkeypatch.setattr(decode, "splits_of", lambda *_: splits)
    W = 24 if P == 12 else 16
    sizes = {"window_size": W, "chunk_size": P, "window": window, "sink_size": S}
    model, low, reference = models(kinds, summary_map=summary_map, **sizes)
    ids = tokens(2, 99)
    with torch.no_grad():
        exact = reference(ids)
        for prompt in (0, 3 * W - 5):
            cache = model.new_cache(2, 99)
            if prompt:
                low(ids[:, :prompt], cache)  # the interpreter is slow
            for at in range(prompt, prompt + P + 4):
                out = model(ids[:, at : at + 1], cache)[:, 0].double()
                assert (out - exact[:, at]).abs().max() <= 1e-5 * exact.abs().max(), at


@slow
def test_a_row_that_takes_no_token_keeps_its_cache():
    model, low, reference = models(window_size=16, chunk_size=8)
    ids = tokens(3, 60)
    with torch.no_grad():
        exact = reference(ids)
        cache = model.new_cache(3, 64)
        lengths = torch.tensor([20, 30, 33], device=DEVICE)
        low(ids[:, :33], cache, lengths=lengths)
        row = torch.arange(3, device=DEVICE)
        for step in range(10):
            # Every other entry of a longer tensor.
            count = torch.tensor([1, 0, step % 2, 1, step < 3, 1], device=DEVICE).long()[::2]
            out = model(ids[row, cache.length][:, None], cache, lengths=count)[:, 0].double()
            error = (out - exact[row, cache.length - 1]).abs().amax(1)
            assert (error[count > 0] <= 1e-5 * exact.abs().max()).all()
    assert cache.length.tolist() == [30, 35, 36]


@slow
def test_steps_and_rollbacks_mix():
    model, low, reference = models(window_size=16, chunk_size=8)
    ids = tokens(2, 99)
    with torch.no_grad():
        exact = reference(ids)
        cache = model.new_cache(2, 64, max_rollback=5)
        low(ids[:, :44], cache)
        for at in range(44, 52):
            for wrong in ((ids[:, at : at + 5] + 1) % 97).split(1, 1):
                model(wrong, cache)
            cache.rollback(5)
            new = model(ids[:, at : at + 1], cache)[:, 0].double()
            assert (new - exact[:, at]).abs().max() <= 1e-5 * exact.abs().max()


def test_scratch_is_left_as_it_was_found(monkeypatch):
    monkeypatch.setattr(decode, "splits_of", lambda *_: 3)
    model, *_ = models(("eva_attention",), window_size=16, chunk_size=8)
    cache = model.new_cache(1, 40)
    with torch.no_grad():
        for token in range(5):
            model(torch.tensor([[token]], device=DEVICE), cache)
    assert not cache.layers[0].arrived.any()


def arguments(cache_dtype: torch.dtype = DTYPE) -> tuple[object, ...]:
    """Arguments of the op."""

    def make(*shape):
        return torch.randn(shape, device=DEVICE)

    q, k, v = make(2, 4, 1, 16), make(2, 2, 1, 16), make(2, 2, 1, 16)
    length, count = (torch.tensor(x, device=DEVICE) for x in ([37, 20], [1, 0]))
    maps = [make(16, 16), make(16)] * 2
    cache = [make(2, 2, n, 16).to(cache_dtype) for n in (8, 8, 24, 24, 9, 9)]
    cache += [make(2, 2, 1, 16), torch.zeros(4, dtype=torch.int32, device=DEVICE)]
    return (q, k, v, length, count, make(4), *cache, maps, "linear", 16, 8, 8, "sliding")


def test_the_op_is_well_registered():
    torch.library.opcheck(cache_ops._decode, arguments())


@pytest.mark.parametrize(
    ("heads", "entries", "expected"),
    # Full on 132 processors; as many as fit; no more than there are tiles.
    [(384, 800, 1), (200, 800, 2), (100, 800, 4), (12, 8192, 32), (1, 8192, 64), (12, 64, 1)],
)
def test_programs_of_a_step_run_at_once(heads, entries, expected):
    assert decode.splits_of(heads, entries, 64, 132) == expected


@pytest.mark.parametrize("T", [1, 5, 20])
def test_full_attention_does_not_fall_back_from_triton(T):
    """As the layers of EVA; `auto` does."""
    for impl in ("auto", "triton"):
        model = tiny(("full_attention",), torch.float64, impl=impl).to(DEVICE)
        with torch.no_grad():
            cache = model.new_cache(1, 40)
            if impl == "auto":
                assert model(tokens(1, T), cache).shape == (1, T, 97)
            else:
                with pytest.raises(ValueError, match=r"impl='triton' needs .*not torch\.float64"):
                    model(tokens(1, T), cache)
