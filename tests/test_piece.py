"""The kernels of a piece of a prompt: outputs and cache are those of the plain code."""

import copy

import pytest
import torch

from flasheva import AffineMap, AffineMaps, EvaCache, EvaConfig, PooledMaps
from flasheva.api import eva_attention_with_cache
from flasheva.storage import FLOAT8
from flasheva.triton import ops
from tests.test_cache_dtype import exact_float8, needs_float8  # noqa: F401

DEVICE = "cpu" if ops.INTERPRETED else "cuda"
slow = pytest.mark.slow
# Pieces: new tokens and how many of them are real in each of two rows.
PIECES = [(5, (5, 3)), (70, (70, 41)), (2, (0, 2)), (17, (17, 17)), (33, (1, 30))]
LENGTH = 160


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_maps(kind: str, G: int, D: int, generator: torch.Generator):
    if kind == "none":
        return None
    if kind == "pooled":
        return PooledMaps(random(generator, G, D), random(generator, G, D))

    def one() -> AffineMap:
        norm = [1 + 0.1 * random(generator, D), random(generator, D)]
        weight = torch.eye(D, dtype=torch.float64) + 0.1 * random(generator, D, D)
        return AffineMap(
            weight, 0.1 * random(generator, D), *(norm if kind == "layernorm" else ())
        )

    return AffineMaps(one(), one())


def converted(maps, dtype: torch.dtype):
    if maps is None:
        return None
    if isinstance(maps, PooledMaps):
        return PooledMaps(*(x.to(DEVICE, dtype) for x in maps))
    return AffineMaps(
        *(AffineMap(*(x.to(DEVICE, dtype) for x in f if x is not None)) for f in maps)
    )


@pytest.mark.parametrize(
    ("window", "W", "P", "S", "kind", "H", "G", "D", "K", "cache_dtype"),
    [
        ("sliding", 32, 8, 8, "linear", 4, 2, 16, 0, None),
        ("block", 16, 4, 0, "layernorm", 2, 2, 24, 3, None),
        pytest.param("sliding", 24, 12, 24, "pooled", 3, 1, 16, 2, None, marks=slow),
        pytest.param("sliding", 16, 16, 16, "none", 2, 1, 40, 0, None, marks=slow),
        pytest.param("sliding", 16, 8, 8, "linear", 2, 1, 256, 1, None, marks=slow),
        pytest.param("block", 200, 10, 10, "linear", 2, 2, 16, 0, None, marks=slow),
        pytest.param("sliding", 32, 8, 8, "linear", 2, 2, 16, 1, FLOAT8, marks=needs_float8),
    ],
)
@pytest.mark.usefixtures("exact_float8")
@torch.no_grad()
def test_outputs_and_cache_are_those_of_the_plain_code(
    window, W, P, S, kind, H, G, D, K, cache_dtype
):
    generator = torch.Generator().manual_seed(0)
    config = EvaConfig(window_size=W, chunk_size=P, window=window, sink_size=S)
    maps, bias = make_maps(kind, G, D, generator), random(generator, H)
    caches, lengths = {}, {}
    for dtype in (torch.float32, torch.float64):
        caches[dtype] = EvaCache(
            config,
            batch_size=2,
            num_key_value_heads=G,
            head_dim=D,
            max_seq_len=LENGTH,
            summaries=maps is not None,
            max_rollback=K,
            dtype=dtype,
            cache_dtype=cache_dtype,
            device=DEVICE,
        )
        lengths[dtype] = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for T, real in PIECES:
        q = random(generator, 2, H, T, D)
        k, v = (random(generator, 2, G, T, D) for _ in range(2))
        count = torch.tensor(real, device=DEVICE)
        outs = {}
        for dtype, impl in ((torch.float32, "triton"), (torch.float64, "reference")):
            outs[dtype] = eva_attention_with_cache(
                *(x.to(DEVICE, dtype) for x in (q, k, v)),
                converted(maps, dtype),
                caches[dtype],
                length=lengths[dtype],
                count=count,
                bias=None if maps is None else bias.to(DEVICE, dtype),
                impl=impl,
            )
            lengths[dtype] += count
        for row, n in enumerate(real):
            ours, exact = (outs[x][row, :, :n].double() for x in (torch.float32, torch.float64))
            # A float8 cache rounds numbers that differ by an error of float32 to its neighbours.
            error = 1e-5 if cache_dtype is None else 0.02
            assert (ours - exact).norm() <= error * exact.norm(), (T, row)
        ours, exact = caches[torch.float32], caches[torch.float64]
        end = lengths[torch.float32].tolist()
        for name in ("sink_k", "sink_v", "window_k", "window_v", "k_rfa", "v_rfa", "q_sum"):
            a, b = (getattr(x, name).double() for x in (ours, exact))
            if name.endswith("rfa"):  # what lies behind the complete chunks is nobody's
                a, b = (
                    torch.cat([x[row, :, : n // P] for row, n in enumerate(end)], 1)
                    for x in (a, b)
                )
            error = 1e-5 if cache_dtype is None or name == "q_sum" else 0.02
            assert (a - b).norm() <= error * b.norm(), (T, name)


@pytest.mark.skipif(not ops.INTERPRETED, reason="compares with what the interpreter gives")
@torch.no_grad()
def test_padding_and_stale_slots_change_nothing():
    """What a slot held before, and tokens that are not real, may be anything."""
    generator = torch.Generator().manual_seed(1)
    config = EvaConfig(window_size=16, chunk_size=4, sink_size=4)
    maps = converted(make_maps("linear", 1, 16, generator), torch.float32)
    size = {"batch_size": 1, "num_key_value_heads": 1, "head_dim": 16, "max_seq_len": 64}
    clean = EvaCache(config, **size, dtype=torch.float32, device=DEVICE)
    used = copy.deepcopy(clean)
    for tensor in used.tensors():
        tensor.fill_(1e3)
    q, k, v = (random(generator, 1, 1, 30, 16).float() for _ in range(3))
    outs = []
    for cache, padding in ((clean, 0.0), (used, -1e3)):
        x = [y.clone() for y in (q, k, v)]
        for y in x:
            y[:, :, 21:] = padding
        length = torch.zeros(1, dtype=torch.int64)
        count = torch.full_like(length, 21)
        first = eva_attention_with_cache(
            *x, maps, cache, length=length, count=count, impl="triton"
        )
        more = [y[:, :, :9] for y in (q, k, v)]
        second = eva_attention_with_cache(
            *more, maps, cache, length=count, count=torch.full_like(length, 9), impl="triton"
        )
        outs.append(torch.cat([first[:, :, :21], second], 2))
    assert torch.equal(*outs)
