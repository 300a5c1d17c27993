"""CachedModel: a model that reads rows in pieces onto a cache.

Onto a cache of the weights' dtype that gives the numbers of whole rows. A cache of another dtype
changes what a token sees of the past, but not of its own piece: pieces of one token are what
generated text goes through, longer ones are faster and hide a part of the loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo import CausalLM


class CachedModel:
    """What `score_tokens` needs, through a cache.

    Args:
        model: from `zoo.load`.
        cache_dtype: see `zoo.CausalLM.new_cache`.
        piece_size: tokens of a row that are read at a time.

    Raises:
        ValueError: a `cache_dtype` that cannot be had, or a `piece_size` that is not positive.
    """

    def __init__(
        self, model: CausalLM, cache_dtype: str | torch.dtype | None, piece_size: int
    ) -> None:
        if piece_size < 1:
            raise ValueError(f"piece_size must be at least 1, not {piece_size}")
        model.new_cache(1, 1, cache_dtype=cache_dtype)
        self._model, self._cache_dtype, self._piece_size = model, cache_dtype, piece_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model.device

    @property
    def lm_head(self) -> Callable[[Tensor], Tensor]:
        """From hidden states to logits."""
        return self._model.lm_head

    def hidden_states(self, ids: Tensor, /) -> Tensor:
        """What `lm_head` takes of rows ids [B, T], read in pieces: [B, T, E]."""
        cache = self._model.new_cache(*ids.shape, cache_dtype=self._cache_dtype)
        pieces = ids.split(self._piece_size, dim=1)
        return torch.cat([self._model.hidden_states(piece, cache) for piece in pieces], 1)
