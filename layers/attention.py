"""build_attention: from the name in `layer_types` to the layer that attends."""

from typing import Literal, get_args

from flasheva import EvaConfig, Impl
from layers.eva_attention import EvaAttention, WindowAttention
from layers.full_attention import FullAttention

LayerType = Literal["full_attention", "eva_attention", "window_attention"]
LAYER_TYPES: tuple[str, ...] = get_args(LayerType)
# Of families that are published with a window in some layers: Hugging Face's own name.
SLIDING_ATTENTION = "sliding_attention"


def build_attention(
    layer_type: str,
    *,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    eva: EvaConfig,
    sliding_window: int | None = None,
    impl: Impl = "auto",
) -> FullAttention | WindowAttention:
    """The attention of one layer, between the projections.

    Args:
        layer_type: one of `LAYER_TYPES`; with a `sliding_window` also "sliding_attention".
        num_attention_heads, num_key_value_heads, head_dim: H, G, D.
        eva: options of EVA and window attention.
        sliding_window: tokens that a query of "sliding_attention" sees, itself included.
        impl: see `flasheva.eva_attention`.

    Raises:
        ValueError: an unknown `layer_type`.
    """
    if layer_type == "full_attention":
        return FullAttention(num_key_value_heads, head_dim, impl)
    kinds = {"eva_attention": EvaAttention, "window_attention": WindowAttention}
    if layer_type == SLIDING_ATTENTION and sliding_window is not None:
        # In steps of one token and without sinks, our window is theirs.
        window = EvaConfig(window_size=sliding_window, chunk_size=1, sink_size=0)
        return WindowAttention(window, num_attention_heads, num_key_value_heads, head_dim, impl)
    if layer_type not in kinds:
        raise ValueError(f"layer type must be one of {', '.join(LAYER_TYPES)}, not {layer_type!r}")
    return kinds[layer_type](eva, num_attention_heads, num_key_value_heads, head_dim, impl)
