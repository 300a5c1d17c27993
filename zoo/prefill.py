"""prefill: reads the prompts of a batch in pieces of bounded size, and what a piece or step runs.

Logits are made of one token a row, never of a whole prompt.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from layers import ModelCache
from zoo.captured_piece import PieceReader
from zoo.causal_lm import Block, CausalLM
from zoo.compile_apart import compile_apart
from zoo.compiled_blocks import compiled_blocks

# Tokens of a row in a piece, and of all rows together: they bound the memory of a prefill, which
# memory.py counts for a GPU on the meta device. Not fewer than a quarter of a usual window, which
# every piece moves.
_PIECE = {"cpu": 512, "cuda": 2048, "meta": 2048}
_PIECE_OF_ALL = 2**13
_LEAST_PIECE = 64

NextLogits = Callable[[CausalLM, Tensor, ModelCache, Tensor], Tensor]


def next_logits(
    model: CausalLM,
    ids: Tensor,
    cache: ModelCache,
    lengths: Tensor,
    blocks: Sequence[Block] | None = None,
) -> Tensor:
    """Reads `lengths` [B] of the tokens [B, T]; logits [B, V] behind the last one of each row."""
    hidden = model.hidden_states(ids, cache, lengths=lengths, blocks=blocks)
    last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
    return model.lm_head(hidden.gather(1, last).squeeze(1))


def compiled_pieces(model: CausalLM) -> NextLogits:
    """`next_logits` for pieces of prompts, whose blocks are compiled."""
    return partial(next_logits, blocks=compiled_blocks(model))


_handles: WeakKeyDictionary[CausalLM, dict[Hashable, NextLogits]] = WeakKeyDictionary()


def compiled_step(model: CausalLM, cache: ModelCache) -> NextLogits:
    """`next_logits` for steps, compiled as a whole, one handle per model and kind of cache.

    Each needs up to 4 graphs: one row or several, caches of the first size or of any.
    """
    handles = _handles.setdefault(model, {})
    if cache.kind not in handles:
        handles[cache.kind] = compile_apart(next_logits)
    return handles[cache.kind]


def piece_size(batch_size: int, device: torch.device, tokens: int | None = None) -> int:
    """Tokens of each row in a piece: of few rows many, of many rows at least 64.

    `tokens` is how many a piece has of all rows together, at most; None: 8,192.
    """
    most = _PIECE.get(device.type, _PIECE["cpu"])
    return max(_LEAST_PIECE, min(most, (tokens or _PIECE_OF_ALL) // batch_size // 16 * 16))


def prefill(
    model: CausalLM,
    ids: Tensor,
    lengths: Tensor,
    cache: ModelCache,
    run: NextLogits = next_logits,
    *,
    pad: bool = False,
    tokens: int | None = None,
) -> Tensor:
    """Reads all prompts into the cache, a piece of every row at a time.

    Args:
        model: of the cache.
        ids: int64 [B, T], prompts from the left, behind them anything.
        lengths: int64 [B], of the prompts.
        cache: what the rows hold already, perhaps nothing.
        run: `next_logits`, or `compiled_pieces` of the model.
        pad: give the last piece the size of the others, for which `run` is compiled; the cache
            must have room for such a piece.
        tokens: of all rows in a piece, see `piece_size`.

    Returns:
        Logits [B, V] behind each row's last token.
    """
    B, T = ids.shape
    size = piece_size(B, ids.device, tokens)
    if pad:
        ids = torch.nn.functional.pad(ids, (0, -T % size))
    logits: Tensor | None = None
    reader = PieceReader(partial(run, model), cache, pieces=-(-ids.shape[1] // size))
    for start in range(0, ids.shape[1], size):
        piece = ids[:, start : start + size]
        count = (lengths - start).clamp(0, piece.shape[1])
        new = reader.read(piece, count)
        # A row's logits are those of the piece that holds its last token.
        logits = new if logits is None else torch.where((count > 0)[:, None], new, logits)
    assert logits is not None
    return logits
