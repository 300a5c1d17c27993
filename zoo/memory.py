"""max_batch: how many rows fit into the memory of a GPU; memory_of: the estimate behind it.

There is no formula of a family or of a cache here. A cache, a prefill and a step of decoding are
made on the meta device, where tensors have shapes but no memory (alive_bytes.py counts them). Only
attention has a stand-in there, which allocates what it does on a GPU.

Dims: B rows, T tokens of a piece, N slots of a cache, H query heads, G key/value heads, D head
dim, V vocabulary.
"""

import bisect
import dataclasses

import torch
from torch import Tensor, nn

from flasheva import EvaCache
from layers import Context, FullAttention, ModelCache, WindowAttention
from layers.cache import LayerCache
from zoo.alive_bytes import AliveBytes, rounded
from zoo.arguments import int_at_least
from zoo.causal_lm import CausalLM
from zoo.config import ModelConfig
from zoo.families import build
from zoo.gpu_memory import gpu_memory
from zoo.prefill import next_logits, piece_size, prefill
from zoo.sampling import Sampling, choose

# Workspaces of cuBLAS: 32 MiB on Hopper for every stream that it has seen, those of the prefill,
# of the warm-up, of the capture and of what runs beside attention; and small tensors, the captured
# graph's among them.
_WORKSPACES = 5 * 2**25
# Of what a piece or a step allocates: free blocks of the allocator that nothing fits into. With a
# tenth, 2,560 rows of pythia-160m were said to fit into 79 GiB, where 2,499 did.
_FRAGMENTS = 0.35
# From so many rows on, pieces have their least size: more rows read more tokens at once.
_MANY_ROWS = 128
_META = torch.device("meta")


def max_batch(
    model: CausalLM,
    max_seq_len: int,
    memory: int | None = None,
    *,
    sampling: Sampling | None = None,
    cache_dtype: str | torch.dtype | None = None,
) -> int:
    """The largest batch whose prefill and decoding fit into a GPU; any smaller one fits too.

    It is counted for our kernels (so not for float64, which they do not run), without `compile`
    and without a draft model.

    Args:
        model: on any device; on "meta" it needs no memory itself. Its dtype counts.
        max_seq_len: tokens that a row of the cache can hold, prompt and text together;
            `zoo.generate` rounds it up to a multiple of 512. It may be above the model's context,
            as in `model.new_cache`: `zoo bench` measures random weights there.
        memory: bytes that PyTorch may allocate for all this, the weights among them, whether they
            are loaded or not. CUDA's own context, about half a GiB, is not. None, where there is
            a GPU: what this process can still have there, and what the model already has.
        sampling: None: greedy; other kinds need more for the choice of a token.
        cache_dtype: as `model.new_cache`.

    Returns:
        Rows, at least 1.

    Raises:
        ValueError: not even one row fits (the message says what it needs), `memory` or
            `max_seq_len` is no int or below 1, or there is no GPU to ask what is free.
    """
    memory = _free(model) if memory is None else int_at_least(1, "memory, in bytes,", memory)
    needs = _Needs(model, max_seq_len, sampling, cache_dtype)
    # Monotone: as many batches fit as rows of the largest one.
    most = range(1, memory // needs.row_bytes + 1)
    rows = bisect.bisect_right(most, memory, key=needs.up_to)
    if rows == 0:
        raise ValueError(
            f"one row of {max_seq_len:,} tokens needs {needs.up_to(1):,} bytes, "
            f"{needs.weights:,} of them for weights, and there are {memory:,}; a shorter "
            "max_seq_len, a smaller dtype or fewer layers with full attention need less"
        )
    return rows


def memory_of(
    model: CausalLM,
    batch_size: int,
    max_seq_len: int,
    *,
    sampling: Sampling | None = None,
    cache_dtype: str | torch.dtype | None = None,
) -> int:
    """Bytes that `batch_size` rows, or fewer, need at most on a GPU.

    Weights, cache, the prompts' ids, and a piece of the prefill or a step, whichever needs more.
    Fewer rows are read in longer pieces, which may need more: it is the most that any number of
    rows up to `batch_size` needs, so that it never falls as `batch_size` grows.

    Args:
        model, max_seq_len, sampling, cache_dtype: as `max_batch`.
        batch_size: B.

    Raises:
        ValueError: `batch_size` or `max_seq_len` is no int or below 1.
    """
    batch_size = int_at_least(1, "batch_size", batch_size)
    return _Needs(model, max_seq_len, sampling, cache_dtype).up_to(batch_size)


def weight_bytes(model: CausalLM) -> int:
    """What the parameters hold, one that embedding and head share once."""
    return sum(rounded(parameter.nbytes) for parameter in model.parameters())


def _free(model: CausalLM) -> int:
    """What this process can have on its GPU, and what the model has there."""
    device = model.device
    if device.type == "cpu" or not torch.cuda.is_available():
        raise ValueError(
            f"memory must be given for a model on {device}: the bytes that the GPU has for it, "
            "such as 24 * 2**30"
        )
    own = weight_bytes(model) if device.type == "cuda" else 0
    gpu = device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return sum(gpu_memory(gpu)) + own


class _Needs:
    """Bytes by batch size, for one model and context."""

    def __init__(
        self,
        model: CausalLM,
        max_seq_len: int,
        sampling: Sampling | None,
        cache_dtype: str | torch.dtype | None,
    ) -> None:
        self._max_seq_len = int_at_least(1, "max_seq_len", max_seq_len)
        dtype = model.embed_tokens.weight.dtype
        with _META:
            self._whole = build(model.config, "auto").to(dtype)
            self._small = build(_one_layer_of_each_type(model.config), "auto").to(dtype)
        for block in self._small.layers:
            block.attention.attend = _OnGpu(block.attention.attend)  # type: ignore[union-attr, arg-type]
        self._cache_dtype, self._sampling = cache_dtype, sampling or Sampling()
        self._found: dict[int, int] = {}
        self.weights = weight_bytes(model)
        self.row_bytes = self._cache(self._whole, 1).nbytes

    def up_to(self, batch_size: int) -> int:
        """The most that so many rows or fewer need."""
        return max(map(self._exactly, self._candidates(batch_size)))

    def _candidates(self, batch_size: int) -> list[int]:
        """`batch_size`, and fewer rows of which more tokens are read at once than of any more."""
        found, most = [], 0
        for rows in (batch_size, *range(min(batch_size, _MANY_ROWS) - 1, 0, -1)):
            tokens = rows * self._piece(rows)
            if tokens > most:
                found.append(rows)
                most = tokens
        return found

    def _exactly(self, rows: int) -> int:
        if rows not in self._found:
            computing = int(self._computing(rows) * (1 + _FRAGMENTS))
            self._found[rows] = self.weights + self._caching(rows) + computing + _WORKSPACES
        return self._found[rows]

    def _caching(self, rows: int) -> int:
        with torch.no_grad(), AliveBytes() as alive:
            self._cache(self._whole, rows)
        return alive.peak

    def _computing(self, rows: int) -> int:
        """What is alive besides weights and cache: a model of fewer layers needs as much."""
        model, cache = self._small, self._cache(self._small, rows)
        with torch.no_grad(), AliveBytes() as alive:
            lengths = torch.empty_like(cache.length)
            ids = lengths.new_empty(rows, self._max_seq_len)
            seen = lengths.new_empty(rows, model.config.vocab_size, dtype=torch.bool)
            # Two pieces: the second one finds the logits of the first.
            logits = prefill(model, ids[:, : 2 * self._piece(rows)], lengths, cache)
            self._choose(logits, seen)
            self._choose(next_logits(model, ids[:, :1], cache, lengths), seen)
        return alive.peak

    def _piece(self, rows: int) -> int:
        return min(piece_size(rows, _META), self._max_seq_len)

    def _cache(self, model: CausalLM, rows: int) -> ModelCache:
        return model.new_cache(rows, self._max_seq_len, cache_dtype=self._cache_dtype)

    def _choose(self, logits: Tensor, seen: Tensor) -> None:
        greedy = self._sampling.greedy
        noise = None if greedy else torch.empty_like(logits, dtype=torch.float32)
        choose(logits, seen, self._sampling, noise)


def _one_layer_of_each_type(config: ModelConfig) -> ModelConfig:
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    kinds = tuple(dict.fromkeys(config.layer_types))
    return dataclasses.replace(config, num_hidden_layers=len(kinds), layer_types=kinds)


class _OnGpu(nn.Module):
    """Stands for an attention on the meta device and allocates what that does on a GPU."""

    def __init__(self, attend: FullAttention | WindowAttention) -> None:
        super().__init__()
        self.attend = attend
        self.new_cache = attend.new_cache

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: LayerCache
    ) -> Tensor:
        """Arguments and result as those of the attention: [B, H, T, D]."""
        assert context.cache is not None and context.count is not None
        B, H, T, D = q.shape
        length, count = context.cache.length, context.count
        if T == 1:  # the decode kernel, where one program has all of a row and head
            q.new_empty(B, H, D + 2, dtype=torch.float32)
        elif isinstance(cache, EvaCache):
            rows = cache.sink_k.shape[2] + cache.slots + T
            # What the piece's kernels lay out, and summaries where a cache stores another dtype.
            keys_and_values = [k.new_empty(B, k.shape[1], rows, D) for _ in range(2)]
            keys_and_values += [x[:, :, :-1].to(k.dtype) for x in (cache.k_rfa, cache.v_rfa)]
            out = torch.empty_like(q)
            del keys_and_values  # not before: all of it is alive then
            return out
        else:
            copies = cache.write(k, v, length, count)  # where it stores another dtype
            out = torch.empty_like(q)
            del copies  # not before, likewise
            return out
        return torch.empty_like(q)
