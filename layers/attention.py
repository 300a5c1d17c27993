"""build_attention: from the name in `layer_types` to the layer that attends."""

from typing import Literal, get_args

from flasheva import EvaConfig, Impl
from layers.eva_attention import EvaAttention, WindowAttention
from layers.full_attention import FullAttention

LayerType = Literal["full_attention", "eva_attention", "window_attention"]
LAYER_TYPES: tuple[str, ...] = get_args(LayerType)


def build_attention(
    layer_type: str,
    *,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    eva: EvaConfig,
    impl: Impl = "auto",
) -> FullAttention | WindowAttention:
    """The attention of one layer, between the projections.

    Raises:
        ValueError: `layer_type` is not one of `LAYER_TYPES`.
    """
    if layer_type == "full_attention":
        return FullAttention(num_key_value_heads, head_dim, impl)
    kinds = {"eva_attention": EvaAttention, "window_attention": WindowAttention}
    if layer_type not in kinds:
        raise ValueError(f"layer type must be one of {', '.join(LAYER_TYPES)}, not {layer_type!r}")
    return kinds[layer_type](eva, num_attention_heads, num_key_value_heads, head_dim, impl)
