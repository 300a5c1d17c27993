"""The visibility rule: every past token counts exactly once, and every path restates the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flasheva import EvaConfig
from flasheva.flex import _mask_mod
from flasheva.flex_blocks import BLOCK, _visible_blocks, make_block_mask
from flasheva.visibility import Positions, sees_key, sees_summary, visible, window_start
from tests.inputs import packed_documents


@st.composite
def configs(draw, max_chunk: int = 8) -> EvaConfig:
    chunk = draw(st.integers(1, max_chunk))
    return EvaConfig(
        window_size=chunk * draw(st.integers(1, 6)),
        chunk_size=chunk,
        window=draw(st.sampled_from(["sliding", "block"])),
        sink_size=chunk * draw(st.integers(0, 3)),
    )


def count_seen(config: EvaConfig, query: int, length: int) -> torch.Tensor:
    """How often each of `length` tokens counts for the query: as a key, or in a summary."""
    n, tokens = torch.tensor(query), torch.arange(length)
    exact = sees_key(config, n, tokens).long()
    return exact + sees_summary(config, n, tokens // config.chunk_size).long()


@settings(deadline=None)
@given(config=configs(), query=st.integers(0, 300))
def test_each_past_token_is_seen_exactly_once_and_no_future_token(config, query):
    seen = count_seen(config, query, query + 3 * config.chunk_size)
    assert (seen[: query + 1] == 1).all()
    assert (seen[query + 1 :] == 0).all()


@settings(deadline=None)
@given(config=configs(), query=st.integers(0, 300))
def test_window_start_is_a_chunk_boundary_within_a_window_of_the_query(config, query):
    start = int(window_start(config, torch.tensor(query)))
    W, P = config.window_size, config.chunk_size
    assert start % P == 0
    assert 0 <= start <= query
    assert query - start + 1 <= (W if config.window == "block" else W + P - 1)
    assert start <= int(window_start(config, torch.tensor(query + 1)))


@settings(deadline=None)
@given(config=configs(), query=st.integers(0, 300))
def test_the_rule_as_it_is_stated(config, query):
    W, P, S = config.window_size, config.chunk_size, config.sink_size
    start = query // W * W if config.window == "block" else max(0, (query - W + 1) // P * P)
    for j in range(query + 5):
        expected = j <= query and (j >= start or j < S)
        assert bool(sees_key(config, torch.tensor(query), torch.tensor(j))) == expected
    for c in range(query // P + 2):
        expected = c * P >= S and (c + 1) * P <= start
        assert bool(sees_summary(config, torch.tensor(query), torch.tensor(c))) == expected


@settings(deadline=None)
@given(config=configs(), seed=st.integers(0, 10), length=st.integers(1, 120))
def test_packed_documents_see_only_themselves(config, seed, length):
    P = config.chunk_size
    seq_start = packed_documents(config, 1, length, seed)
    chunks = length // P
    mask = visible(
        config, Positions(seq_start=seq_start), length, length, chunks, torch.device("cpu")
    )
    for n in range(length):
        start = int(seq_start[0, n])
        seen = mask[0, n, :length].long()
        by_chunk = mask[0, n, length:].long().repeat_interleave(P)
        seen[: len(by_chunk)] += by_chunk
        assert (seen[start : n + 1] == 1).all()
        assert (seen[:start] == 0).all()
        assert (seen[n + 1 :] == 0).all()


def blocks(mask: torch.Tensor) -> torch.Tensor:
    """[B, Q, K, BLOCK, BLOCK] of a dense mask [B, T, N], padded with False."""
    B, T, N = mask.shape
    padded = mask.new_zeros(B, -(-T // BLOCK) * BLOCK, -(-N // BLOCK) * BLOCK)
    padded[:, :T, :N] = mask
    return padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)


def listed(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """FlexAttention's ordered form back to a dense bool [B, Q, K]."""
    named = torch.arange(index.shape[-1]) < count[..., None]
    dense = torch.zeros(index.shape, dtype=torch.long)
    return dense.scatter_add_(-1, index.long(), named.long())[:, 0] > 0


FLEX_CASES = [
    (T, N, window, S, layout)
    for T, N in [(1, 1), (130, 130), (300, 300), (1000, 1000)]
    for window in ("sliding", "block")
    for S in (0, 16, 32)
    for layout in ("plain", "packed", "cached")
]


@pytest.mark.parametrize(("T", "N", "window", "S", "layout"), FLEX_CASES)
def test_flex_masks_are_the_rule(T, N, window, S, layout):
    """mask_mod equals the dense rule; the block mask names every visible block and calls full
    only blocks that are."""
    config = EvaConfig(window_size=64, chunk_size=16, window=window, sink_size=S)
    cpu = torch.device("cpu")
    B, C = 2, N // 16
    if layout == "packed":
        positions = Positions(seq_start=packed_documents(config, B, T, seed=T))
    elif layout == "cached":  # keys of a cache stand in any order, with empty slots
        length = torch.tensor([0, 700])
        key = torch.stack([torch.randperm(N) - 1 for _ in range(B)]) + length[:, None] - N // 2
        key = torch.where(key < 0, -1, key)
        positions = Positions(query=length[:, None] + torch.arange(T), key=key)
    else:
        positions = Positions()
    dense = visible(config, positions, T, N, C, cpu).expand(B, -1, -1)
    mask_mod = _mask_mod(config, positions, N)
    i, j = torch.arange(T), torch.arange(N + C)
    by_mod = torch.vmap(
        torch.vmap(torch.vmap(mask_mod, (None, None, None, 0)), (None, None, 0, None)),
        (0, None, None, None),
    )(torch.arange(B), torch.tensor(0), i, j)
    assert torch.equal(by_mod, dense)
    mask = make_block_mask(config, positions, T, N, C, cpu, mask_mod)
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    dense_blocks = blocks(dense)
    assert not (partial & full).any()
    assert (partial | full | ~dense_blocks.flatten(3).any(-1)).all(), "a visible block is skipped"
    # Rows past the last query do not exist: whether they would see a block does not matter.
    exists = blocks(torch.ones(1, T, N + C, dtype=torch.bool))
    rows = exists.any(-1, keepdim=True)
    assert (full <= (dense_blocks | ~rows).flatten(3).all(-1)).all(), "a block is not full"
    if layout == "plain" and T == 1000:  # what nobody sees is skipped, not only masked
        assert partial.sum() + full.sum() < 0.6 * partial.numel()


@settings(deadline=None, max_examples=20)
@given(config=configs())
def test_config_survives_a_round_trip(config):
    assert EvaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("key", [None, torch.arange(300).expand(2, -1)], ids=["rows", "cache"])
def test_the_op_of_block_masks_keeps_torch_library_s_rules(key):
    query = None if key is None else torch.arange(200, 500).expand(2, -1)
    args = (query, key, None, 300, 300, 18, 64, 16, 16, "sliding", torch.device("cpu"))
    torch.library.opcheck(_visible_blocks, args)
