"""Context: what every layer of a model needs to know about the tokens of one call."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layers.cache import LayerCache, ModelCache


@dataclass(frozen=True)
class Context:
    """Made once a call by `Context.of`; each block is handed that `of_layer`.

    Attributes:
        positions: int [B or 1, T], of the tokens in their own documents (for RoPE).
        seq_start: int [B, T], where each token's document begins in its row, or None.
        cache: the model's cache, or None.
        count: int [B], how many of the T tokens of each row are real; None without a cache.
        layer_cache: the cache of the block's layer, or None.
    """

    positions: Tensor
    seq_start: Tensor | None
    cache: ModelCache | None
    count: Tensor | None
    layer_cache: LayerCache | None = None

    @classmethod
    def of(
        cls,
        ids: Tensor,
        cache: ModelCache | None,
        seq_start: Tensor | None,
        lengths: Tensor | None,
    ) -> "Context":
        """Checks a model's arguments and derives positions from them.

        Raises:
            ValueError: shapes that do not fit, or packed documents together with a cache.
        """
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must be [B, T] with T >= 1, not {list(ids.shape)}")
        B, T = ids.shape
        if lengths is not None and lengths.shape != (B,):
            raise ValueError(f"lengths must be [{B}], one per row, not {list(lengths.shape)}")
        if seq_start is not None and seq_start.shape != (B, T):
            raise ValueError(f"seq_start must be [{B}, {T}], not {list(seq_start.shape)}")
        if seq_start is not None and seq_start.is_floating_point():
            raise ValueError(f"seq_start must hold integers, not {seq_start.dtype}")
        index = torch.arange(T, device=ids.device)[None]
        if cache is None:
            positions = index if seq_start is None else index - seq_start
            return cls(positions, seq_start, None, None)
        if seq_start is not None:
            raise ValueError("a cache holds one document per row: pass cache or seq_start")
        if cache.length.shape != (B,):
            raise ValueError(f"the cache has {len(cache.length)} rows, but ids has {B}")
        if cache.max_seq_len < T:
            raise ValueError(f"{T} tokens do not fit into a cache of {cache.max_seq_len}")
        if lengths is None:
            count = torch.full_like(cache.length, T)
        else:
            count = lengths.long()
            in_range = ((count >= 0) & (count <= T)).all()
            torch._assert_async(in_range, "lengths must be between 0 and the tokens given")
        cache.assert_room(count)
        return cls(cache.length[:, None] + index, None, cache, count)

    def of_layer(self, layer: int) -> "Context":
        """That of one layer, whose number blocks do not know: compiled code fits them all."""
        return self if self.cache is None else replace(self, layer_cache=self.cache.layers[layer])

    def finish(self) -> None:
        """Counts the new tokens, once every layer has stored them."""
        if self.cache is not None and self.count is not None:
            self.cache.advance(self.count)
