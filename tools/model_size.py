"""measure_size: parameters and bytes of cache of a model, from its configuration alone.

Both are counted on a model and a cache that really are built, on the meta device, where tensors
have shapes but no memory: there is no second formula that could disagree with the first.
"""

import dataclasses
from dataclasses import dataclass

import torch

from layers import LAYER_TYPES
from recipes import sliding_layers
from zoo.config import ModelConfig
from zoo.families import build
from zoo.memory import max_batch


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The layers of one type.

    Attributes:
        layers: how many there are.
        cache_bytes: of the cache of one of them.
    """

    layers: int
    cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """How large a model is, and its cache for one row of `context` tokens.

    Attributes:
        parameters: all; a matrix that embedding and head share counts once.
        eva_parameters: those of them that only EVA layers have.
        context: tokens of the row.
        kinds: by layer type, those that the model does not have included.
        cache_bytes: of all layers.
        full_cache_bytes: of the same model as published, with full attention where it is here
            something else.
    """

    parameters: int
    eva_parameters: int
    context: int
    kinds: dict[str, LayerKind]
    cache_bytes: int
    full_cache_bytes: int


def measure_size(config: ModelConfig, context: int, dtype: torch.dtype) -> ModelSize:
    """Builds the model without memory and counts.

    Args:
        config: from `zoo.describe`.
        context: tokens of the row that the cache holds.
        dtype: of the cache.

    Raises:
        ValueError: `context` is not positive.
    """
    parameters, layer_bytes = _count(config, context, dtype)
    sliding = sliding_layers(config.layer_types)
    kinds = {}
    for kind in dict.fromkeys((*LAYER_TYPES, *config.layer_types)):
        everywhere = _with_layer_types(config, (kind,) * config.num_hidden_layers)
        _, (cache_bytes, *_) = _count(everywhere, context, dtype)
        kinds[kind] = LayerKind(layers=config.layer_types.count(kind), cache_bytes=cache_bytes)
    return ModelSize(
        parameters=sum(parameters.values()),
        eva_parameters=sum(n for name, n in parameters.items() if ".attend." in name),
        context=context,
        kinds=kinds,
        cache_bytes=sum(layer_bytes),
        full_cache_bytes=sum(
            kinds["sliding_attention" if layer in sliding else "full_attention"].cache_bytes
            for layer in range(config.num_hidden_layers)
        ),
    )


def largest_batch(config: ModelConfig, context: int, dtype: torch.dtype, memory: int) -> int:
    """`zoo.max_batch` of a model without weights.

    Args:
        config, context: as `measure_size`.
        dtype: of weights and cache.
        memory: bytes.

    Raises:
        ValueError: as `zoo.max_batch`.
    """
    with torch.device("meta"):
        model = build(config, "auto").to(dtype)
    return max_batch(model, context, memory)


def _count(
    config: ModelConfig, context: int, dtype: torch.dtype
) -> tuple[dict[str, int], list[int]]:
    """Elements of each parameter, and bytes of each layer's cache."""
    with torch.device("meta"):
        model = build(config, "auto").to(dtype)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    cache = model.new_cache(1, context)
    return parameters, [sum(t.nbytes for t in layer.tensors()) for layer in cache.layers]


def _with_layer_types(config: ModelConfig, layer_types: tuple[str, ...]) -> ModelConfig:
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    return dataclasses.replace(config, layer_types=layer_types)
