"""Exact causal attention over everything: PyTorch's SDPA, our kernels where rows are not plain."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flasheva import Impl, full_attention_packed, full_attention_piece, full_attention_step
from layers.cache import KVCache, LayerCache
from layers.context import Context


class FullAttention(nn.Module):
    """softmax(s q k^T) v over all earlier tokens of the document.

    Args:
        num_key_value_heads, head_dim: G, D.
        impl: "auto" and "triton" take the kernels for packed rows and onto a cache where they
            can run.
    """

    def __init__(self, num_key_value_heads: int, head_dim: int, impl: Impl = "auto") -> None:
        super().__init__()
        self.impl: Impl = impl
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim

    def new_cache(
        self,
        *,
        batch_size: int,
        max_seq_len: int,
        max_rollback: int,
        dtype: torch.dtype,
        cache_dtype: str | torch.dtype | None,
        device: torch.device,
    ) -> KVCache:
        """A static cache; it can go back as far as it likes."""
        del max_rollback
        return KVCache(
            batch_size=batch_size,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_seq_len=max_seq_len,
            dtype=dtype,
            cache_dtype=cache_dtype,
            device=device,
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: LayerCache | None
    ) -> Tensor:
        """q: [B, H, T, D]; k, v: [B, G, T, D]; returns [B, H, T, D]."""
        gqa = q.shape[1] != k.shape[1]
        if cache is None:
            if context.seq_start is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
            packed = full_attention_packed(q, k, v, seq_start=context.seq_start, impl=self.impl)
            if packed is not None:
                return packed
            key = torch.arange(k.shape[2], device=q.device)
            query = key[:, None]
            mask = (key <= query) & (key >= context.seq_start[:, :, None])
        else:
            if not isinstance(cache, KVCache) or cache.dtype != k.dtype:
                raise ValueError("this cache was made by another model; use model.new_cache")
            assert context.cache is not None and context.count is not None
            length, count = context.cache.length, context.count
            step = full_attention_step(
                *(q, k, v, cache.k, cache.v),
                length=length,
                count=count,
                arrived=cache.arrived,
                impl=self.impl,
            )
            if step is not None:
                return step
            k, v = cache.write(k, v, length, count)
            piece = full_attention_piece(q, k, v, length=length, impl=self.impl)
            if piece is not None:
                return piece
            mask = torch.arange(k.shape[2], device=q.device) <= context.positions[:, :, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=gqa)
