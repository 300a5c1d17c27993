"""EvaCache: the fixed-size state of one EVA (or window) layer for a batch of growing rows.

Per row it holds the S sinks, a ring of window keys and values, one summary per complete chunk, and
the running sum of the queries of the chunk in progress. Everything is allocated once; a step
writes in place, without allocation of state, host sync or data-dependent Python.

A token at position p lives in ring slot `p % slots`, so what a slot holds follows from the row's
length alone. A chunk is compressed with its last token: it stays hidden until the rule of
visibility.py shows it, and one running sum of queries is enough.

With `max_rollback = K` a row can be shortened by up to K tokens, exactly: the ring has K more
slots, and the running sums after each of the last K + 1 tokens are kept.

Keys, values and summaries may be stored in float8_e4m3fn (storage.py). New tokens see each other
exactly, and what was stored before them rounded.

Dims: B batch, H query heads, G key/value heads, D head dim, T new tokens, P chunk_size.
"""

import torch
from torch import Tensor

from flasheva.config import EvaConfig
from flasheva.storage import gather, readable, replace_, rows, scatter_, storage_dtype
from flasheva.summary import SummaryMaps, query_sums, summarize, summary_dtype
from flasheva.visibility import Positions


class EvaCache:
    """The state of one layer. Row lengths are the caller's: one [B] tensor serves all layers.

    Args:
        config: the layer's attention.
        batch_size, num_key_value_heads, head_dim: B, G, D.
        max_seq_len: the longest row, prompt and generated tokens together.
        summaries: False for a layer with window and sinks only, which keeps none.
        max_rollback: K, how many tokens `ModelCache.rollback` can take back.
        dtype, device: of the keys and values that come.
        cache_dtype: what keys, values and summaries are stored in: torch.float8_e4m3fn, or None:
            `dtype`. Sums of queries stay in float32, or float64.
    """

    def __init__(
        self,
        config: EvaConfig,
        *,
        batch_size: int,
        num_key_value_heads: int,
        head_dim: int,
        max_seq_len: int,
        summaries: bool = True,
        max_rollback: int = 0,
        dtype: torch.dtype,
        cache_dtype: str | torch.dtype | None = None,
        device: torch.device | str,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.summaries = summaries
        # A sliding query can see the P - 1 tokens before its window, and itself.
        extra = 0 if config.window == "block" else config.chunk_size
        # No ring needs more slots than a row has tokens.
        self.slots = min(config.window_size + extra + max_rollback, max_seq_len)
        sinks = min(config.sink_size, max_seq_len)
        chunks = max_seq_len // config.chunk_size if summaries else 0

        kept = storage_dtype(cache_dtype, dtype, device)

        def zeros(*shape: int, dtype: torch.dtype = kept) -> Tensor:
            shape = (batch_size, num_key_value_heads, *shape)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.sink_k, self.sink_v = zeros(sinks, head_dim), zeros(sinks, head_dim)
        self.window_k, self.window_v = zeros(self.slots, head_dim), zeros(self.slots, head_dim)
        # The last entry takes the writes of chunks that are not complete; nobody reads it.
        self.k_rfa, self.v_rfa = (
            zeros(chunks + 1 if summaries else 0, head_dim) for _ in range(2)
        )
        self.q_sum = zeros(
            max_rollback + 1 if summaries else 0, head_dim, dtype=summary_dtype(dtype)
        )
        # Scratch of the decode kernel, zeros between steps.
        self.arrived = torch.zeros(
            batch_size * num_key_value_heads, dtype=torch.int32, device=device
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All state, for counting bytes and for resetting."""
        return (
            *(self.sink_k, self.sink_v, self.window_k, self.window_v),
            *(self.k_rfa, self.v_rfa, self.q_sum),
        )

    def readable(
        self, k: Tensor, v: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Positions]:
        """Everything that T new queries may attend to, before anything of them is in the window.

        Args:
            k, v: [B, G, T, D], the new tokens.
            length: int [B], tokens of each row that the cache holds.

        Returns:
            keys, values [B, G, S + slots + T, D] (sinks, the last `slots` tokens in order, the
            new ones), k_rfa, v_rfa [B, G, C, D], and positions. What is stored in float8 comes
            in the dtype of the model.
        """
        T, sinks = k.shape[2], self.sink_k.shape[2]
        device = k.device
        new = length[:, None] + torch.arange(T, device=device)
        sink = torch.arange(sinks, device=device).expand(len(length), -1)
        sink = torch.where(sink < length[:, None], sink, -1)
        window = length[:, None] + torch.arange(-self.slots, 0, device=device)
        slot = window % self.slots
        # A sink that is still in the ring counts once, as a sink.
        window = torch.where(window < sinks, -1, window)
        keys = readable(self.sink_k, self.window_k, slot, k)
        values = readable(self.sink_v, self.window_v, slot, v)
        k_rfa, v_rfa = (x[:, :, :-1].to(self.dtype) for x in (self.k_rfa, self.v_rfa))
        positions = Positions(query=new, key=torch.cat([sink, window, new], dim=1))
        return keys, values, k_rfa, v_rfa, positions

    def write_summaries(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        maps: SummaryMaps,
        length: Tensor,
        count: Tensor,
    ) -> None:
        """Adds the new queries to the running sums and compresses the chunks they complete.

        Call before `write_window`: a chunk that began earlier is completed from the ring.

        Args:
            q: [B, H, T, D]; k, v: [B, G, T, D].
            maps: the layer's maps.
            length: int [B], tokens that the cache holds.
            count: int [B], how many of the T new tokens are real (the first ones).
        """
        P, K = self.config.chunk_size, self.q_sum.shape[2]
        G, T = k.shape[1:3]
        # The piece laid out from the start of the chunk that it begins in.
        chunks = (T + 2 * P - 2) // P
        begin = length // P * P
        position = begin[:, None] + torch.arange(chunks * P, device=k.device)
        new = (position - length[:, None]).clamp(0, T - 1)
        is_new = position >= length[:, None]
        shape = (chunks, P)

        def laid_out(ring: Tensor, piece: Tensor) -> Tensor:
            old = gather(ring, position % self.slots).to(self.dtype)
            return torch.where(rows(is_new), gather(piece, new), old).unflatten(2, shape)

        sums = query_sums(q, G)
        # The running sum after the last cached token, or 0 at a chunk's first token.
        carried = gather(self.q_sum, ((length - 1) % K)[:, None])
        carried = carried * rows((length % P != 0)[:, None])
        addend = gather(sums, new) * rows(is_new)
        at_first_new = rows(position == length[:, None])
        running = torch.where(at_first_new, addend + carried, addend)
        running = running.unflatten(2, shape).cumsum(3)
        q_mean = running[:, :, :, -1] / (P * (q.shape[1] // G))
        k_rfa, v_rfa = summarize(
            laid_out(self.window_k, k), laid_out(self.window_v, v), q_mean, maps
        )
        chunk = begin[:, None] // P + torch.arange(chunks, device=k.device)
        complete = (chunk + 1) * P <= (length + count)[:, None]
        unread = self.k_rfa.shape[2] - 1
        index = torch.where(complete, chunk, unread)
        scatter_(self.k_rfa, index, k_rfa)
        scatter_(self.v_rfa, index, v_rfa)

        end = length + count
        slot = _latest(end, K, k.device)
        source = (slot - begin[:, None]).clamp(0, chunks * P - 1)
        fresh = (slot >= length[:, None]) & (slot >= 0)
        replace_(self.q_sum, fresh, gather(running.flatten(2, 3), source), after=self.k_rfa)

    def write_window(
        self, k: Tensor, v: Tensor, length: Tensor, count: Tensor, *, after: Tensor
    ) -> None:
        """Stores the new keys and values in the ring and among the sinks.

        Args:
            k, v: [B, G, T, D].
            length: int [B], tokens that the cache holds.
            count: int [B], how many of the T new tokens are real; padding is never written.
            after: what attention gave for the new tokens.
        """
        last = k.shape[2] - 1
        slot = self._slot_positions(length + count)
        sink = torch.arange(self.sink_k.shape[2], device=k.device).expand(len(length), -1)
        for position, buffer_k, buffer_v in (
            (slot, self.window_k, self.window_v),
            (sink, self.sink_k, self.sink_v),
        ):
            source = (position - length[:, None]).clamp(0, last)
            fresh = (position >= length[:, None]) & (position < (length + count)[:, None])
            replace_(buffer_k, fresh, gather(k, source), after=after)
            replace_(buffer_v, fresh, gather(v, source), after=after)

    def _slot_positions(self, length: Tensor) -> Tensor:
        return _latest(length, self.slots, length.device)


def _latest(length: Tensor, slots: int, device: torch.device) -> Tensor:
    """[B, slots]: the last position below `length` that lives in each slot; negative for none."""
    slot = torch.arange(slots, device=device)
    last = length[:, None] - 1
    position = last - (last - slot) % slots
    return torch.where(position < 0, -1, position)
