"""Building blocks of the models: rotary embeddings, MLPs, the kinds of attention, caches."""

from layers.attention import LAYER_TYPES, SLIDING_ATTENTION, LayerType, build_attention
from layers.cache import ModelCache
from layers.context import Context
from layers.eva_attention import EvaAttention, WindowAttention
from layers.full_attention import FullAttention
from layers.mlp import MLP, Activation, GatedMLP
from layers.rotary import RopeConfig, RotaryAngles, apply_rotary, rotary_angles
from layers.side_stream import beside, is_unhooked

__all__ = [
    "LAYER_TYPES",
    "MLP",
    "SLIDING_ATTENTION",
    "Activation",
    "Context",
    "EvaAttention",
    "FullAttention",
    "GatedMLP",
    "LayerType",
    "ModelCache",
    "RopeConfig",
    "RotaryAngles",
    "WindowAttention",
    "apply_rotary",
    "beside",
    "build_attention",
    "is_unhooked",
    "rotary_angles",
]
