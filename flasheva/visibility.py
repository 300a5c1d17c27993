"""Who sees what: the one rule that training, prefill, chunked prefill and decoding all use.

Positions are int tensors (any broadcastable shapes) counted from the start of the *query's* own
document; a key of an earlier document, or an empty cache slot, has a negative position. Chunk `c`
holds positions `[cP, (c+1)P)`. Query `n` sees

- exact keys `0 <= j <= n` with `j >= start(n)` or `j < S` (the sinks), and
- the summary of chunk `c` when `cP >= S` and `(c+1)P <= start(n)`,

so every past token is counted exactly once. The functions are plain arithmetic on tensors: they
serve as dense masks, as FlexAttention's `mask_mod`, and on block boundaries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flasheva.config import EvaConfig


def window_start(config: EvaConfig, query: Tensor) -> Tensor:
    """First position of the exact window of the query at position `query`; a multiple of P.

    It never decreases as `query` grows, and never exceeds it.
    """
    if config.window == "block":
        return query // config.window_size * config.window_size
    first = query - config.window_size + 1
    # Not clamp(min=0): Inductor (torch 2.13) fails to simplify a division of a clamped index.
    return torch.where(first > 0, first // config.chunk_size * config.chunk_size, 0)


def sees_key(config: EvaConfig, query: Tensor, key: Tensor) -> Tensor:
    """Whether the query at position `query` sees the key at position `key` exactly (bool)."""
    exact = (key >= window_start(config, query)) | (key < config.sink_size)
    return (key >= 0) & (key <= query) & exact


def sees_summary(config: EvaConfig, query: Tensor, chunk: Tensor) -> Tensor:
    """Whether the query at position `query` sees the summary of chunk index `chunk` (bool)."""
    first = chunk * config.chunk_size
    end = first + config.chunk_size
    return (first >= config.sink_size) & (end <= window_start(config, query))


class Positions(NamedTuple):
    """Where the queries and keys of one attention call stand in their rows (int tensors).

    Attributes:
        query: [B, T], index of each query in its row; None: 0 .. T - 1.
        key: [B, N], index of each exact key in its row, negative for an empty cache slot;
            None: 0 .. N - 1.
        seq_start: [B, T], index in the row where each query's own document begins, a multiple
            of the chunk size; None: 0.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    seq_start: Tensor | None = None

    def resolve(self, num_queries: int, num_keys: int, device: torch.device) -> "Positions":
        """The same with every field a tensor; the leading dim is 1 where all rows agree."""
        query, key, start = self
        if query is None:
            query = torch.arange(num_queries, device=device)[None]
        if key is None:
            key = torch.arange(num_keys, device=device)[None]
        if start is None:
            start = torch.zeros_like(query)
        return Positions(query, key, start)


def visible(
    config: EvaConfig,
    positions: Positions,
    num_queries: int,
    num_keys: int,
    num_summaries: int,
    device: torch.device,
) -> Tensor:
    """The rule as a dense mask over `[keys ; summaries]`.

    Returns:
        bool [B or 1, T, N + C], True where the query sees the key or the summary.
    """
    query, key, start = positions.resolve(num_queries, num_keys, device)
    assert query is not None and key is not None and start is not None
    local = (query - start).unsqueeze(-1)
    keys = sees_key(config, local, key.unsqueeze(-2) - start.unsqueeze(-1))
    # Documents start on a multiple of P, so the index of a chunk shifts by whole chunks.
    chunk = torch.arange(num_summaries, device=device) - (start // config.chunk_size).unsqueeze(-1)
    summaries = sees_summary(config, local, chunk)
    return torch.cat([keys, summaries.expand(keys.shape[0], -1, -1)], dim=-1)
