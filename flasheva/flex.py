"""FlexAttention over `[k ; k_rfa]`: the visibility rule as a `mask_mod`, skipped blocks included.

A block mask built by evaluating the rule on every pair of tokens costs O(T * N). Here it is
derived from the smallest and largest positions in each block, O(blocks): `any` may name a block
in which nothing is visible (the mask_mod still decides), `full` names only blocks in which
everything is.

Traps of FlexAttention that this file answers: above 8 recompiles of one handle it falls back to
dense attention, so eager callers get one `fullgraph` handle per static configuration, for which
torch raises instead; it has no backward on a CPU (the api refuses that with a clear message).

Dims: B batch, H query heads, G key/value heads, D head dim, T queries, N keys, C summaries.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flasheva.config import EvaConfig
from flasheva.visibility import Positions, sees_key, sees_summary, window_start

BLOCK = 128  # FlexAttention's default; both tile sizes must divide it
_FAR = 2**31 - 1

_Mod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    bias: Tensor | None,
    positions: Positions,
) -> Tensor:
    """Attends to exact keys and summaries; arguments and result as `reference_attention`.

    Inside `torch.compile` the call becomes part of the caller's graph; an eager caller gets a
    compiled handle, made at the first call of each static configuration.
    """
    args = (q, k, v, k_rfa, v_rfa, bias, positions)
    if torch.compiler.is_compiling():
        return _flex(config, *args)
    static = _Static(
        config=config,
        device=str(q.device),
        dtype=q.dtype,
        heads=(q.shape[1], k.shape[1], q.shape[3]),
        # torch specialises a dim of size 0 or 1, so such a call is a configuration of its own;
        # the CPU template (torch 2.13) does not compile with dynamic sizes at all.
        sizes=tuple(
            size if q.device.type == "cpu" else min(size, 2)
            for size in (q.shape[0], q.shape[2], k.shape[2], k_rfa.shape[2])
        ),
        present=(bias is not None, *(field is not None for field in positions)),
        grad=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    )
    return _compiled(static)(config, *args)


class _Static(NamedTuple):
    config: EvaConfig
    device: str
    dtype: torch.dtype
    heads: tuple[int, int, int]
    sizes: tuple[int, ...]
    present: tuple[bool, ...]
    grad: bool


@functools.cache
def _compiled(static: _Static) -> Callable[..., Tensor]:
    def handle(*args: object) -> Tensor:  # a function of its own, so a compile cache of its own
        return _flex(*args)  # type: ignore[arg-type]

    return torch.compile(handle, fullgraph=True, dynamic=static.device != "cpu")


def _flex(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    bias: Tensor | None,
    positions: Positions,
) -> Tensor:
    num_keys, num_summaries = k.shape[2], k_rfa.shape[2]
    mask_mod = _mask_mod(config, positions, num_keys)
    block_mask = _block_mask(
        config, positions, q.shape[2], num_keys, num_summaries, q.device, mask_mod
    )
    out = flex_attention(
        q,
        torch.cat([k, k_rfa], dim=2),
        torch.cat([v, v_rfa], dim=2),
        score_mod=None if bias is None else _score_mod(bias, num_keys),
        block_mask=block_mask,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def _mask_mod(config: EvaConfig, positions: Positions, num_keys: int) -> _Mod:
    query, key, seq_start = positions

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        start = 0 if seq_start is None else seq_start[b, i]
        local = (i if query is None else query[b, i]) - start
        is_key = j < num_keys
        key_index = j if key is None else key[b, torch.where(is_key, j, 0)]
        chunk = j - num_keys - start // config.chunk_size
        exact = sees_key(config, local, key_index - start)
        return torch.where(is_key, exact, sees_summary(config, local, chunk))

    return mask_mod


def _score_mod(bias: Tensor, num_keys: int) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j < num_keys, score, score + bias[h])

    return score_mod


def _block_mask(
    config: EvaConfig,
    positions: Positions,
    num_queries: int,
    num_keys: int,
    num_summaries: int,
    device: torch.device,
    mask_mod: _Mod,
) -> BlockMask:
    S, P = config.sink_size, config.chunk_size
    total = num_keys + num_summaries
    # Positions, window starts and document starts never decrease along a row, so a block of
    # queries is bounded by its first and last one.
    query, _, start = positions.resolve(num_queries, num_keys, device)
    assert query is not None and start is not None
    begin = start + window_start(config, query - start)
    first = torch.arange(0, num_queries, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=num_queries - 1)
    q_min, q_max, start_min, start_max, begin_min, begin_max = (
        x[:, edge].unsqueeze(-1) for x in (query, start, begin) for edge in (first, last)
    )
    # Blocks of [keys ; summaries], from `low` to `high`; one block may hold both kinds.
    low = torch.arange(0, total, BLOCK, device=device)
    high = (low + BLOCK - 1).clamp(max=total - 1)
    has_key, has_summary = low < num_keys, high >= num_keys
    if positions.key is None:
        k_min, k_max = low, high.clamp(max=num_keys - 1)
    else:  # in a cache they stand in any order
        k_min, k_max = (x.unsqueeze(-2) for x in _block_range(positions.key, total))
    c_min, c_max = (low - num_keys).clamp(min=0), high - num_keys

    in_window = k_max >= begin_min
    is_sink = (k_min < start_max + S) & (k_max >= start_min)
    any_key = has_key & (k_min <= q_max) & (in_window | is_sink)
    any_summary = (
        has_summary & (c_max * P >= start_min + S) & ((c_min + 1) * P <= begin_max)
    )
    full_key = ~has_summary & (k_min >= begin_max) & (k_max <= q_min)
    full_summary = ~has_key & (c_min * P >= start_max + S) & ((c_max + 1) * P <= begin_min)
    full = (full_key | full_summary) & (low + BLOCK <= total)
    partial = (any_key | any_summary) & ~full
    num_partial, partial_index = _ordered(partial)
    num_full, full_index = _ordered(full)
    return BlockMask.from_kv_blocks(
        num_partial,
        partial_index,
        num_full,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, total),
    )


def _block_range(key: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of key positions [B, N] over blocks of `total` entries."""
    padding = (0, total - key.shape[1] + -total % BLOCK)
    return (
        F.pad(key, padding, value=_FAR).unflatten(1, (-1, BLOCK)).amin(-1),
        F.pad(key, padding, value=-_FAR).unflatten(1, (-1, BLOCK)).amax(-1),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Dense bool [B, Q, K] to FlexAttention's form: counts [B, 1, Q] and indices [B, 1, Q, K]."""
    # The count is taken of the sorted copy, which is in memory: Inductor (torch 2.13) fails on a
    # reduction over nothing but index arithmetic of dynamic sizes.
    visible, index = blocks.int().sort(dim=-1, descending=True, stable=True)
    count = visible.sum(-1, dtype=torch.int32)
    return count.unsqueeze(1), index.int().unsqueeze(1)
