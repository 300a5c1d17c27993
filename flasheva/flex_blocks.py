"""The block mask of FlexAttention: which tiles of 128 x 128 the kernel visits.

Evaluating the rule on every pair of tokens would cost O(T * N). Here the tiles follow from the
smallest and largest positions in each block, O(blocks): `any` may name a tile in which nothing is
visible (the mask_mod still decides), `full` names only tiles in which everything is.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from flasheva.config import EvaConfig
from flasheva.visibility import Positions, window_start

BLOCK = 128  # FlexAttention's default; both of its tile sizes must divide it
_FAR = 2**31 - 1

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def make_block_mask(
    config: EvaConfig,
    positions: Positions,
    num_queries: int,
    num_keys: int,
    num_summaries: int,
    device: torch.device,
    mask_mod: MaskMod,
) -> BlockMask:
    """The block mask of T queries over N keys and C summaries; one for all heads."""
    blocks = _visible_blocks(
        *positions,
        num_queries,
        num_keys,
        num_summaries,
        config.window_size,
        config.chunk_size,
        config.sink_size,
        config.window,
        device,
    )
    return BlockMask(
        seq_lengths=(num_queries, num_keys + num_summaries),
        kv_num_blocks=blocks[0],
        kv_indices=blocks[1],
        full_kv_num_blocks=blocks[2],
        full_kv_indices=blocks[3],
        q_num_blocks=blocks[4],
        q_indices=blocks[5],
        full_q_num_blocks=blocks[6],
        full_q_indices=blocks[7],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=mask_mod,
    )


# An op of its own, so that Inductor leaves it alone. What it did otherwise (torch 2.11 and 2.13):
# wrong results on a GPU for every row but the first (it seems that the kernel misreads strides of
# [B, 1, Q, K] that Inductor chose), and failures to simplify index arithmetic of dynamic sizes.
@torch.library.custom_op("flasheva::visible_blocks", mutates_args=())
def _visible_blocks(
    query: Tensor | None,
    key: Tensor | None,
    seq_start: Tensor | None,
    num_queries: int,
    num_keys: int,
    num_summaries: int,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    device: torch.device,
) -> list[Tensor]:
    """Counts [B, 1, Q] and indices [B, 1, Q, K] of partial and of full tiles, then transposed."""
    config = EvaConfig(
        window_size=window_size,
        chunk_size=chunk_size,
        sink_size=sink_size,
        window=window,  # type: ignore[arg-type]  # came from an EvaConfig
    )
    positions = Positions(query, key, seq_start)
    partial, full = _partial_and_full(
        config, positions, num_queries, num_keys, num_summaries, device
    )
    return [
        tensor
        for blocks in (partial, full, partial.mT, full.mT)
        for tensor in _ordered(blocks.unsqueeze(1))
    ]


@_visible_blocks.register_fake
def _(
    query: Tensor | None,
    key: Tensor | None,
    seq_start: Tensor | None,
    num_queries: int,
    num_keys: int,
    num_summaries: int,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    device: torch.device,
) -> list[Tensor]:
    batch = next((x.shape[0] for x in (query, key, seq_start) if x is not None), 1)
    rows = (num_queries + BLOCK - 1) // BLOCK
    columns = (num_keys + num_summaries + BLOCK - 1) // BLOCK

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, 1, *shape, dtype=torch.int32, device=device)

    pair = [empty(rows), empty(rows, columns)]
    transposed = [empty(columns), empty(columns, rows)]
    return [x.clone() for x in (*pair, *pair, *transposed, *transposed)]


def _partial_and_full(
    config: EvaConfig,
    positions: Positions,
    num_queries: int,
    num_keys: int,
    num_summaries: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Bool [B, Q, K] each: tiles that the mask_mod must decide, and tiles all visible."""
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
    any_summary = has_summary & (c_max * P >= start_min + S) & ((c_min + 1) * P <= begin_max)
    full_key = ~has_summary & (k_min >= begin_max) & (k_max <= q_min)
    full_summary = ~has_key & (c_min * P >= start_max + S) & ((c_max + 1) * P <= begin_min)
    full = (full_key | full_summary) & (low + BLOCK <= total)
    return (any_key | any_summary) & ~full, full


def _block_range(key: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of key positions [B, N] over blocks of `total` entries."""
    padding = (0, total - key.shape[1] + -total % BLOCK)
    return (
        F.pad(key, padding, value=_FAR).unflatten(1, (-1, BLOCK)).amin(-1),
        F.pad(key, padding, value=-_FAR).unflatten(1, (-1, BLOCK)).amax(-1),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Dense bool [B, 1, Q, K] to counts [B, 1, Q] and indices [B, 1, Q, K], contiguous int32."""
    index = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), index.to(torch.int32, copy=True).contiguous()
