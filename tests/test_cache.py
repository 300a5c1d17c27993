"""Prefill in any pieces, then decoding, gives the numbers of one pass, for every mix of layers."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flasheva import EvaConfig, Impl
from zoo.llama import Llama, LlamaConfig

LENGTH = 61
KINDS = ("eva_attention", "full_attention", "window_attention")


def tiny(
    layer_types: tuple[str, ...] = KINDS,
    dtype: torch.dtype = torch.float64,
    impl: Impl = "reference",
    head_dim: int = 16,
    **eva,
) -> Llama:
    options = {"window_size": 8, "chunk_size": 4, **eva}
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=len(layer_types),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            max_position_embeddings=4096,
            layer_types=layer_types,
            eva=EvaConfig(**options),
        ),
        impl=impl,
    )
    for name, parameter in model.named_parameters():
        if "attend" in name or "norm" in name:  # away from identity, ones and constants
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return model.to(dtype).eval()


def one_pass(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids)


def in_pieces(model: Llama, ids: torch.Tensor, pieces: list[int], **cache) -> torch.Tensor:
    state = model.new_cache(ids.shape[0], cache.pop("max_seq_len", ids.shape[1]), **cache)
    with torch.no_grad():
        out = [model(piece, state) for piece in ids.split(pieces, dim=1)]
    assert (state.length == ids.shape[1]).all()
    return torch.cat(out, 1)


def random_pieces(seed: int, length: int = LENGTH) -> list[int]:
    rng = random.Random(seed)
    pieces: list[int] = []
    while sum(pieces) < length:
        pieces.append(min(rng.choice([1, 1, 1, 2, 3, 5, 8, 13, 30]), length - sum(pieces)))
    return pieces


SPLITS = [[LENGTH], [1] * LENGTH, [LENGTH - 1, 1], [4] * 15 + [1], [8] * 7 + [5], [7, 9, 1, 44]]
EVA = [
    {"window": window, "sink_size": S, "summary_map": summary_map}
    for window in ("sliding", "block")
    for S, summary_map in itertools.product((0, 4, 8), ("linear", "layernorm", "pooled"))
]


@pytest.mark.parametrize("eva", EVA, ids=str)
def test_every_split_equals_one_pass_in_float64(eva):
    model = tiny(**eva)
    ids = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    full = one_pass(model, ids)
    for pieces in [*SPLITS, *(random_pieces(seed) for seed in range(6))]:
        torch.testing.assert_close(in_pieces(model, ids, pieces), full, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layer_types", [(kind,) * 3 for kind in KINDS], ids=str)
def test_every_layer_type_alone(layer_types):
    model = tiny(layer_types)
    ids = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    full = one_pass(model, ids)
    for pieces in SPLITS:
        torch.testing.assert_close(in_pieces(model, ids, pieces), full, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", ["sliding", "block"])
def test_float32_stays_within_1e5_of_the_largest_logit(window):
    model = tiny(dtype=torch.float32, window=window)
    ids = torch.randint(97, (2, 400), generator=torch.Generator().manual_seed(1))
    full = one_pass(model, ids)
    for seed in range(4):
        out = in_pieces(model, ids, random_pieces(seed, 400))
        assert (out - full).abs().max() <= 1e-5 * full.abs().max()


@pytest.mark.parametrize("window_size", [4, 8, 40, 64, 100])
def test_windows_and_caches_of_odd_sizes(window_size):
    """Windows of one chunk or longer than the row, rows longer or shorter than a chunk."""
    model = tiny(window_size=window_size)
    for length in (1, 3, 4, 5, LENGTH):
        ids = torch.randint(97, (1, length), generator=torch.Generator().manual_seed(1))
        full = one_pass(model, ids)
        for spare in (0, 1, 50):
            out = in_pieces(model, ids, [1] * length, max_seq_len=length + spare)
            torch.testing.assert_close(out, full, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=4),
    window=st.sampled_from(["sliding", "block"]),
    S=st.sampled_from([0, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_ragged_rows_equal_themselves_alone(lengths, window, S, seed):
    """Rows of different lengths read pieces with padding, then take turns at single tokens."""
    model = tiny(window=window, sink_size=S)
    rng = random.Random(seed)
    ids = torch.randint(97, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(seed))
    cache = model.new_cache(len(lengths), LENGTH)
    done = [0] * len(lengths)
    seen: list[list[torch.Tensor]] = [[] for _ in lengths]
    with torch.no_grad():
        while done != lengths:
            width = rng.choice([1, 2, 5, 11, 30])
            counts = [
                min(rng.randint(0, width), n - d) for n, d in zip(lengths, done, strict=True)
            ]
            piece = torch.randint(97, (len(lengths), width))  # whatever is padding is noise
            for row, (start, count) in enumerate(zip(done, counts, strict=True)):
                piece[row, :count] = ids[row, start : start + count]
            out = model(piece, cache, lengths=torch.tensor(counts))
            for row, count in enumerate(counts):
                seen[row].append(out[row, :count])
                done[row] += count
        assert cache.length.tolist() == lengths
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length])[0]
            torch.testing.assert_close(torch.cat(seen[row]), alone, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    window=st.sampled_from(["sliding", "block"]),
    S=st.sampled_from([0, 4, 8]),
    K=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_rollback_forgets_exactly(window, S, K, seed):
    """Wrong tokens are tried and taken back at every turn, a different number per row."""
    model = tiny(window=window, sink_size=S)
    rng = random.Random(seed)
    ids = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    full = one_pass(model, ids)
    cache = model.new_cache(2, LENGTH + K, max_rollback=K)
    at = [0, 0]
    with torch.no_grad():
        while min(at) < LENGTH:
            good = [min(rng.randint(0, 9), LENGTH - n) for n in at]
            bad = [rng.randint(0, K) for _ in at]
            width = max(g + b for g, b in zip(good, bad, strict=True)) or 1
            piece = torch.randint(97, (2, width))
            for row in range(2):
                piece[row, : good[row]] = ids[row, at[row] : at[row] + good[row]]
            counts = [g + b for g, b in zip(good, bad, strict=True)]
            out = model(piece, cache, lengths=torch.tensor(counts))
            for row in range(2):
                expected = full[row, at[row] : at[row] + good[row]]
                torch.testing.assert_close(out[row, : good[row]], expected, rtol=0, atol=1e-10)
                at[row] += good[row]
            cache.rollback(torch.tensor(bad))
            assert cache.length.tolist() == at


def test_rollback_refuses_what_it_cannot_do():
    model = tiny()
    cache = model.new_cache(1, 32)
    model(torch.zeros(1, 5, dtype=torch.long), cache)
    for wrong in (torch.tensor([1.5]), torch.tensor([1, 1])):
        with pytest.raises(ValueError, match="an int or integers"):
            cache.rollback(wrong)
    with pytest.raises(ValueError, match="allocated with max_rollback=0"):
        cache.rollback(1)
    cache = model.new_cache(1, 32, max_rollback=4)
    model(torch.zeros(1, 6, dtype=torch.long), cache)
    cache.rollback(3)
    with pytest.raises(ValueError, match="can go back by 1 only"):
        cache.rollback(2)
    cache.rollback(1)
    assert cache.length.tolist() == [2]


def test_reset_starts_anew():
    model = tiny()
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    full = one_pass(model, ids)
    cache = model.new_cache(2, 30, max_rollback=2)
    with torch.no_grad():
        model(torch.randint(97, (2, 25)), cache)
        cache.reset()
        out = torch.cat([model(piece, cache) for piece in ids.split([9, 1, 20], 1)], 1)
    torch.testing.assert_close(out, full, rtol=0, atol=1e-10)


def test_a_cache_that_is_too_small_fails():
    model = tiny()
    cache = model.new_cache(1, 8)
    with pytest.raises(ValueError, match="9 tokens do not fit into a cache of 8"):
        model(torch.zeros(1, 9, dtype=torch.long), cache)
    model(torch.zeros(1, 6, dtype=torch.long), cache)
    with pytest.raises(RuntimeError, match="outgrow the cache's max_seq_len"):
        model(torch.zeros(1, 3, dtype=torch.long), cache)
    for lengths in (4, -2):
        with pytest.raises(RuntimeError, match="between 0 and the tokens given"):
            model(torch.zeros(1, 2, dtype=torch.long), cache, lengths=torch.tensor([lengths]))
    for other in (tiny(window_size=16), tiny(KINDS[::-1])):
        with pytest.raises(ValueError, match="made by another model"):
            other(torch.zeros(1, 1, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="has 1 rows, but ids has 2"):
        model(torch.zeros(2, 1, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="pass cache or seq_start"):
        model(torch.zeros(1, 1, dtype=torch.long), cache, torch.zeros(1, 1, dtype=torch.int32))


def test_sizes_of_a_cache_are_integers():
    model = tiny()
    for sizes, name in (((1.0, 8), "batch_size"), ((1, 8.5), "max_seq_len"), ((1, True), "max_")):
        with pytest.raises(ValueError, match=rf"^{name}\w* must be an int of at least 1, not "):
            model.new_cache(*sizes)
    with pytest.raises(ValueError, match=r"^max_rollback must be an int of at least 0, not 1\.0$"):
        model.new_cache(1, 8, max_rollback=1.0)
    cache = model.new_cache(np.int64(2), torch.tensor(8), max_rollback=np.int32(1))
    assert (cache.length.shape, cache.max_seq_len, cache.max_rollback) == ((2,), 8, 1)


def test_entries_are_those_of_the_design():
    """S + W + P window slots and one summary per chunk, instead of every token."""
    model = tiny(("eva_attention",), dtype=torch.float32, window_size=256, chunk_size=16)
    cache = model.new_cache(1, 10240)
    entry = 2 * 2 * 16 * 4  # keys and values of 2 heads of 16 float32
    entries = 16 + 256 + 16 + 10240 // 16
    unread, running_sum = entry, 2 * 16 * 4
    assert cache.nbytes == entries * entry + unread + running_sum
    full = tiny(("full_attention",), dtype=torch.float32).new_cache(1, 10240)
    assert full.nbytes / cache.nbytes > 10.9


def test_packed_rows_equal_their_documents_alone():
    model = tiny()
    ids = torch.randint(97, (1, 60), generator=torch.Generator().manual_seed(1))
    starts = [0, 12, 16, 44, 60]
    seq_start = torch.zeros(1, 60, dtype=torch.int32)
    for start in starts[:-1]:
        seq_start[0, start:] = start
    with torch.no_grad():
        packed = model(ids, seq_start=seq_start)
        for start, end in itertools.pairwise(starts):
            alone = model(ids[:, start:end])
            torch.testing.assert_close(packed[:, start:end], alone, rtol=0, atol=1e-10)
