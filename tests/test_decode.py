"""The decode kernel answers to one pass of the float64 reference; without a GPU, interpreted."""

import pytest
import torch

from flasheva.triton import decode, ops
from tests.test_cache import tiny

slow = pytest.mark.slow
DEVICE = "cpu" if ops.INTERPRETED else "cuda"
DTYPE = torch.float32
KINDS = ("eva_attention", "window_attention", "full_attention")


def both(layer_types=KINDS, **sizes):
    """The same weights under the kernels, and in float64 under the reference."""
    kernels = tiny(layer_types, DTYPE, impl="triton", **sizes).to(DEVICE)
    reference = tiny(layer_types, torch.float64, **sizes).to(DEVICE)
    reference.load_state_dict(kernels.state_dict())
    return kernels, reference


@torch.no_grad()
def steps(model, ids, cache, prompt: int):
    out = [model(ids[:, :prompt], cache)] if prompt else []
    out += [model(token, cache) for token in ids[:, prompt:].split(1, 1)]
    return torch.cat(out, 1).double()


@pytest.mark.parametrize(
    ("window", "S", "P", "summary_map", "splits"),
    [
        ("sliding", 8, 8, "linear", 1),
        ("block", 0, 8, "linear", 3),
        pytest.param("sliding", 32, 16, "layernorm", 2, marks=slow),
        pytest.param("block", 16, 16, "pooled", 2, marks=slow),
        pytest.param("sliding", 24, 12, "linear", 5, marks=slow),  # nothing is a power of 2
    ],
)
def test_steps_equal_one_pass(window, S, P, summary_map, splits, monkeypatch):
    monkeypatch.setattr(decode, "splits_of", lambda *_: splits)
    W = 24 if P == 12 else 16
    sizes = {"window_size": W, "chunk_size": P, "window": window, "sink_size": S}
    model, reference = both(summary_map=summary_map, **sizes)
    ids = torch.randint(97, (2, 75), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        exact = reference(ids)
    for prompt in (0, 21):
        out = steps(model, ids, model.new_cache(2, 75), prompt)
        assert (out - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_a_row_that_takes_no_token_keeps_its_cache(monkeypatch):
    model, reference = both(window_size=16, chunk_size=8)
    ids = torch.randint(97, (3, 60), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cache, took = model.new_cache(3, 64), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    out = torch.zeros(3, 60, 97, dtype=torch.float64, device=DEVICE)
    row = torch.arange(3, device=DEVICE)
    for step in range(60):
        count = torch.tensor([1, step % 2, step < 20], device=DEVICE).long()
        at = took.clamp(max=59)
        with torch.no_grad():
            logits = model(ids[row, at][:, None], cache, lengths=count)
        out[row, at] = torch.where((count > 0)[:, None], logits[:, 0].double(), out[row, at])
        took += count
    assert took.tolist() == cache.length.tolist() == [60, 30, 20]
    with torch.no_grad():
        exact = reference(ids)
    for number, length in enumerate(took.tolist()):
        error = (out[number, :length] - exact[number, :length]).abs().max()
        assert error <= 1e-5 * exact.abs().max()


@slow
def test_steps_and_rollbacks_mix():
    model, reference = both(window_size=16, chunk_size=8)
    ids = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        exact = reference(ids)
        cache = model.new_cache(2, 80, max_rollback=5)
        while (at := int(cache.length[0])) < 70:
            wrong = (ids[:, at : at + 5] + 1) % 97
            for token in wrong.split(1, 1):
                model(token, cache)
            cache.rollback(wrong.shape[1])
            new = model(ids[:, at : at + 1], cache)[:, 0].double()
            assert (new - exact[:, at]).abs().max() <= 1e-5 * exact.abs().max()


def test_scratch_is_left_as_it_was_found(monkeypatch):
    monkeypatch.setattr(decode, "splits_of", lambda *_: 3)
    model, _ = both(("eva_attention",), window_size=16, chunk_size=8)
    cache = model.new_cache(1, 40)
    with torch.no_grad():
        for token in range(30):
            model(torch.tensor([[token]], device=DEVICE), cache)
    assert not cache.layers[0].arrived.any()


def test_the_op_is_well_registered():
    def make(*shape):
        return torch.randn(shape, device=DEVICE)

    q, k, v = make(2, 4, 1, 16), make(2, 2, 1, 16), make(2, 2, 1, 16)
    length, count = (torch.tensor(x, device=DEVICE) for x in ([37, 20], [1, 0]))
    maps = [make(16, 16), make(16)] * 2
    cache = [make(2, 2, n, 16) for n in (8, 8, 24, 24, 9, 9, 1)]
    arrived = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    args = (q, k, v, length, count, make(4), *cache, arrived, maps, "linear", 16, 8, 8, "sliding")
    torch.library.opcheck(ops._decode, args)
