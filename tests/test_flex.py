"""FlexAttention answers to the float64 reference: forward on a CPU, forward and backward on a GPU.

The tolerance is the error that eager attention makes at the same precision over the same
augmented keys: a fast path may err at most twice as much, in the norm of the whole tensor.
"""

import itertools

import pytest
import torch

from flasheva import EvaConfig
from tests.accuracy import (
    UNIT_ROUNDOFF,
    assert_all_as_good_as_eager,
    assert_as_good_as_eager,
    attend,
    eager,
)
from tests.inputs import make
from tests.test_cache import tiny

# FlexAttention's exponential on a GPU, ex2.approx, errs by so much whatever the dtype: four
# roundings of float32, and nothing beside one of the others.
EXPONENTIAL = 2**-22
MAPS = ["linear"] * 6 + ["layernorm", "pooled"]


@pytest.mark.parametrize(
    ("T", "D", "G", "window", "S", "packed"),
    [
        (300, 32, 2, "sliding", 16, False),
        (36, 32, 2, "sliding", 16, False),  # N + C = 38, less than a tile
        (290, 64, 4, "block", 0, True),
        (1, 80, 1, "sliding", 32, False),
    ],
)
def test_compiled_forward_on_a_cpu(T, D, G, window, S, packed):
    config = EvaConfig(window_size=64, chunk_size=16, window=window, sink_size=S)
    exact = make(config, T=T, D=D, G=G, packed=packed)
    low = exact.to(torch.float32)
    with torch.no_grad():
        out = attend(config, low, "flex")
        reference = attend(config, exact, "reference")
    assert_as_good_as_eager("o", out, eager(config, low), reference, UNIT_ROUNDOFF[torch.float32])


HEADS = [(1, 2, 2), (2, 4, 2), (3, 6, 1)]  # B, H, G
SETTINGS = [
    # Every pair of D, window and S; the number of heads, packing and maps take turns.
    (D, window, S, HEADS[number % 3], number % 2 == 1, MAPS[number % 8])
    for number, (D, window, S) in enumerate(
        itertools.product([16, 64, 80, 128], ["sliding", "block"], [0, 16, 32])
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "setting"),
    [
        *((torch.bfloat16, setting) for setting in SETTINGS),
        *((torch.float16, setting) for setting in SETTINGS[::2]),
        *((torch.float32, setting) for setting in SETTINGS[1::2]),
    ],
    ids=str,
)
def test_forward_and_gradients_on_a_gpu(dtype, setting):
    D, window, S, (B, H, G), packed, summary_map = setting
    torch.backends.cuda.matmul.allow_tf32 = False
    config = EvaConfig(
        window_size=64, chunk_size=16, window=window, sink_size=S, summary_map=summary_map
    )
    # A handle of its own for T = 1 and for rows without a chunk; the others share one.
    for T in (1 if packed else 7, 63, 130, 520):
        exact = make(config, B=B, H=H, G=G, D=D, T=T, packed=packed, seed=T)
        allowed = {"of_output": EXPONENTIAL, "of_gradients": EXPONENTIAL}
        assert_all_as_good_as_eager(config, exact, dtype, "cuda", "flex", **allowed)


def test_prefill_onto_a_cache_on_a_cpu():
    """The first piece meets an empty cache, the second a full window."""
    sizes = {"window_size": 32, "chunk_size": 8}
    flex = tiny(("eva_attention",), torch.float32, impl="flex", head_dim=32, **sizes)
    reference = tiny(("eva_attention",), torch.float64, head_dim=32, **sizes)
    reference.load_state_dict(flex.state_dict())
    ids = torch.randint(97, (2, 140), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = flex.new_cache(2, 160)
        found = torch.cat([flex(piece, cache) for piece in ids.split(70, 1)], 1)
        exact = reference(ids)
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("S", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_onto_a_cache_on_a_gpu(window, S, dtype):
    """Pieces through a fast path, steps through the reference; ragged rows included.

    The tolerance is twice the error of the reference path at the same precision.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    sizes = {"window_size": 64, "chunk_size": 16, "window": window, "sink_size": S}
    low = tiny(dtype=dtype, **sizes).cuda()
    auto = tiny(dtype=dtype, impl="auto", **sizes).cuda()
    wide = tiny(**sizes).cuda()
    for other in (auto, wide):
        other.load_state_dict(low.state_dict())
    ids = torch.randint(97, (2, 520), device="cuda")
    lengths = [torch.tensor([n, n - n // 3], device="cuda") for n in (31, 130, 1, 16, 200)]

    def run(model) -> torch.Tensor:
        cache, out = model.new_cache(2, 600), []
        with torch.no_grad():
            for length in lengths:
                n = int(length[0])
                rows = [
                    row[at : at + n] for row, at in zip(ids, cache.length.tolist(), strict=True)
                ]
                new = model(torch.stack(rows), cache, lengths=length)
                out += [row[:real] for row, real in zip(new, length.tolist(), strict=True)]
        return torch.cat(out).double()

    exact = run(wide)
    found, reference = ((run(m) - exact).norm() / exact.norm() for m in (auto, low))
    assert found <= 2 * reference, (float(found), float(reference))
