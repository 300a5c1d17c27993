"""FlashEVA attention: exact keys nearby, one random-feature summary per chunk of the rest."""

from flasheva.api import (
    eva_attention,
    eva_attention_with_cache,
    full_attention_packed,
    full_attention_piece,
    full_attention_step,
)
from flasheva.cache import EvaCache
from flasheva.choice import Impl, resolve_impl
from flasheva.config import EvaConfig
from flasheva.summary import AffineMap, AffineMaps, PooledMaps, SummaryMaps, chunk_summaries

__all__ = [
    "AffineMap",
    "AffineMaps",
    "EvaCache",
    "EvaConfig",
    "Impl",
    "PooledMaps",
    "SummaryMaps",
    "chunk_summaries",
    "eva_attention",
    "eva_attention_with_cache",
    "full_attention_packed",
    "full_attention_piece",
    "full_attention_step",
    "resolve_impl",
]
