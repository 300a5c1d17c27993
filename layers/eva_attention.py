"""EVA attention as a layer: the summary maps' parameters, and the same without summaries."""

import math

import torch
from torch import Tensor, nn

from flasheva import (
    AffineMap,
    AffineMaps,
    EvaCache,
    EvaConfig,
    Impl,
    PooledMaps,
    SummaryMaps,
    eva_attention,
    eva_attention_with_cache,
)
from layers.cache import LayerCache
from layers.context import Context


class WindowAttention(nn.Module):
    """Window and sinks only: what EVA sees exactly, without its summaries.

    Args:
        config: window, chunk and sinks (the summary options have no effect).
        num_attention_heads, num_key_value_heads, head_dim: H, G, D.
        impl: see `flasheva.eva_attention`.
    """

    def __init__(
        self,
        config: EvaConfig,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        impl: Impl,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.impl: Impl = impl

    def maps(self) -> SummaryMaps | None:
        """The parameters of the summary maps, or None for a layer without summaries."""
        return None

    def bias(self) -> Tensor | None:
        """[H], added to the logits of summaries, or None."""
        return None

    def noise(self, k: Tensor) -> Tensor | None:
        """[B, G, T // P, D] for omega in training, or None."""
        return None

    def new_cache(
        self,
        *,
        batch_size: int,
        max_seq_len: int,
        max_rollback: int,
        dtype: torch.dtype,
        cache_dtype: str | torch.dtype | None,
        device: torch.device,
    ) -> EvaCache:
        """The fixed-size cache of this layer."""
        return EvaCache(
            self.config,
            batch_size=batch_size,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_seq_len=max_seq_len,
            summaries=self.maps() is not None,
            max_rollback=max_rollback,
            dtype=dtype,
            cache_dtype=cache_dtype,
            device=device,
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: LayerCache | None
    ) -> Tensor:
        """q: [B, H, T, D]; k, v: [B, G, T, D]; returns [B, H, T, D]."""
        if cache is None:
            return eva_attention(
                *(q, k, v, self.config, self.maps()),
                bias=self.bias(),
                seq_start=context.seq_start,
                noise=self.noise(k),
                impl=self.impl,
            )
        if not (
            isinstance(cache, EvaCache)
            and (cache.config, cache.summaries) == (self.config, self.maps() is not None)
            and cache.dtype == k.dtype
        ):
            raise ValueError("this cache was made by another model; use model.new_cache")
        assert context.cache is not None and context.count is not None
        return eva_attention_with_cache(
            *(q, k, v, self.maps(), cache),
            length=context.cache.length,
            count=context.count,
            bias=self.bias(),
            impl=self.impl,
        )


class EvaAttention(WindowAttention):
    """Window, sinks and one summary per older chunk (FlashEVA, arXiv 2511.00576).

    Parameters, for `summary_map` "linear": `q_map`, `k_map` (identity); "layernorm": also
    `q_norm`, `k_norm`; "pooled": `mu`, `phi` [G, D]. `summary_bias` [H] if configured.
    """

    def __init__(
        self,
        config: EvaConfig,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        impl: Impl,
    ) -> None:
        super().__init__(config, num_attention_heads, num_key_value_heads, head_dim, impl)
        D = head_dim
        if config.summary_map == "pooled":
            self.mu = nn.Parameter(torch.empty(num_key_value_heads, D))
            self.phi = nn.Parameter(torch.empty(num_key_value_heads, D))
        else:
            self.q_map, self.k_map = nn.Linear(D, D), nn.Linear(D, D)
        if config.summary_map == "layernorm":
            self.q_norm, self.k_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        if config.summary_bias:
            self.summary_bias = nn.Parameter(torch.empty(num_attention_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values: identity for "linear", as published for "layernorm" and "pooled"."""
        config = self.config
        if config.summary_map == "pooled":
            for parameter in (self.mu, self.phi):  # as EvaByte
                parameter.normal_().clamp_(-1, 1).mul_(self.head_dim**-0.5)
        else:
            for linear in (self.q_map, self.k_map):
                linear.reset_parameters()
                if config.summary_map == "linear":
                    nn.init.eye_(linear.weight)
                    nn.init.zeros_(linear.bias)
        if config.summary_map == "layernorm":
            self.q_norm.reset_parameters()
            self.k_norm.reset_parameters()
        if config.summary_bias:
            self.summary_bias.fill_(config.summary_bias_init * math.log(config.chunk_size))

    def maps(self) -> SummaryMaps:
        """The parameters as the attention takes them."""
        if self.config.summary_map == "pooled":
            return PooledMaps(self.mu, self.phi)
        q, k = (self.q_map.weight, self.q_map.bias), (self.k_map.weight, self.k_map.bias)
        if self.config.summary_map == "linear":
            return AffineMaps(AffineMap(*q), AffineMap(*k))
        return AffineMaps(
            AffineMap(*q, self.q_norm.weight, self.q_norm.bias),
            AffineMap(*k, self.k_norm.weight, self.k_norm.bias),
        )

    def bias(self) -> Tensor | None:
        """[H], added to the logits of summaries, or None."""
        return self.summary_bias if self.config.summary_bias else None

    def noise(self, k: Tensor) -> Tensor | None:
        """N(0, 1) clipped to [-1, 1], [B, G, T // P, D]; None in evaluation or if not wanted."""
        if not (self.training and self.config.training_noise):
            return None
        shape = (*k.shape[:2], k.shape[2] // self.config.chunk_size, k.shape[3])
        return torch.randn(shape, device=k.device, dtype=torch.float32).clamp_(-1, 1)
