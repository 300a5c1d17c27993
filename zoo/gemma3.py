"""Gemma 3 (arXiv 2503.19786), its text model: most layers see a window, norms are everywhere.

What differs from llama.py: a norm before and after attention and MLP, norms of q and k, norms
whose stored weight is what is added to 1, embeddings scaled by sqrt(E), GeGLU, and two kinds of
layers in the published model. "sliding_attention" sees the last `sliding_window` tokens, with a
RoPE of its own; these layers always stay so. "full_attention" sees everything, and is what EVA
takes the place of.

Dims: B batch, T tokens, E hidden, H query heads, G key/value heads, D head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flasheva import EvaConfig, Impl
from layers import (
    LAYER_TYPES,
    SLIDING_ATTENTION,
    Activation,
    Context,
    GatedMLP,
    RopeConfig,
    RotaryAngles,
    apply_rotary,
    build_attention,
    rotary_angles,
)
from zoo.causal_lm import CausalLM
from zoo.config import FieldReader, check_heads, check_layer_types

_THETA, _SLIDING_THETA = 1_000_000.0, 10_000.0


@dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """Field names as in Hugging Face's config.json, but for `rope`, `sliding_rope` and `eva`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    sliding_window: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(rope_theta=_THETA))
    sliding_rope: RopeConfig = field(default_factory=lambda: RopeConfig(rope_theta=_SLIDING_THETA))
    hidden_activation: Activation = "gelu_pytorch_tanh"
    query_pre_attn_scalar: int
    tie_word_embeddings: bool = True
    layer_types: tuple[str, ...]
    eva: EvaConfig = field(default_factory=EvaConfig)

    model_type: ClassVar[str] = "gemma3_text"

    def __post_init__(self) -> None:
        known = (*LAYER_TYPES, SLIDING_ATTENTION)
        check_layer_types(self.layer_types, self.num_hidden_layers, known)
        check_heads(self.num_attention_heads, self.num_key_value_heads)
        if self.query_pre_attn_scalar != self.head_dim:
            raise ValueError(
                f"config field 'query_pre_attn_scalar' must be head_dim={self.head_dim}, "
                f"not {self.query_pre_attn_scalar}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, object]) -> Self:
        """Reads a config.json; ValueError names a field that is missing or not supported."""
        read = FieldReader(config)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(name) is not None:
                raise ValueError(f"config field {name!r} must be null: no Gemma 3 has it")
        for name in ("attention_bias", "use_bidirectional_attention"):
            if read.bool(name, False):
                raise ValueError(f"config field {name!r} must be false, not true")
        depth, period = read.int("num_hidden_layers"), read.int("sliding_window_pattern", 6)
        published = [
            "full_attention" if layer % period == period - 1 else SLIDING_ATTENTION
            for layer in range(depth)
        ]
        head_dim = read.int("head_dim", 256)
        rope, sliding_rope = _read_ropes(config)
        return cls(
            vocab_size=read.int("vocab_size"),
            hidden_size=read.int("hidden_size"),
            intermediate_size=read.int("intermediate_size"),
            num_hidden_layers=depth,
            num_attention_heads=read.int("num_attention_heads"),
            num_key_value_heads=read.int("num_key_value_heads"),
            head_dim=head_dim,
            max_position_embeddings=read.int("max_position_embeddings"),
            sliding_window=read.int("sliding_window"),
            rms_norm_eps=read.float("rms_norm_eps", 1e-6),
            rope=rope,
            sliding_rope=sliding_rope,
            hidden_activation=read.activation("hidden_activation", "gelu_pytorch_tanh"),
            query_pre_attn_scalar=read.int("query_pre_attn_scalar", 256),
            tie_word_embeddings=read.bool("tie_word_embeddings", True),
            layer_types=read.layer_types(published),
            eva=read.eva(),
        )


def _read_ropes(config: Mapping[str, object]) -> tuple[RopeConfig, RopeConfig]:
    """Of full and of sliding layers: `rope_parameters` by layer type, or the older fields."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        full, sliding = (
            RopeConfig.from_hf({"rope_theta": theta, "rope_parameters": parameters.get(kind)})
            for kind, theta in (("full_attention", _THETA), (SLIDING_ATTENTION, _SLIDING_THETA))
        )
        return full, sliding
    theta = FieldReader(config).float("rope_local_base_freq", _SLIDING_THETA)
    return RopeConfig.from_hf({"rope_theta": _THETA, **config}), RopeConfig(rope_theta=theta)


class Gemma3Norm(nn.RMSNorm):
    """RMSNorm with a scale of 1 + weight, in float32 at least."""

    def reset_parameters(self) -> None:
        """A scale of 1."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = 1 + self.weight.to(wide)
        return F.rms_norm(x.to(wide), self.normalized_shape, scale, self.eps).to(x.dtype)


class Gemma3Attention(nn.Module):
    """Projections, norms of q and k, and RoPE round `attend`: full, sliding, EVA or window."""

    def __init__(self, config: Gemma3Config, layer: int, impl: Impl) -> None:
        super().__init__()
        E, D, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(E, H * D, bias=False)
        self.k_proj = nn.Linear(E, G * D, bias=False)
        self.v_proj = nn.Linear(E, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, E, bias=False)
        self.q_norm, self.k_norm = Gemma3Norm(D, eps=eps), Gemma3Norm(D, eps=eps)
        self.attend = build_attention(
            config.layer_types[layer],
            num_attention_heads=H,
            num_key_value_heads=G,
            head_dim=D,
            eva=config.eva,
            sliding_window=config.sliding_window,
            impl=impl,
        )

    def forward(self, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(self.q_norm(q), rope), apply_rotary(self.k_norm(k), rope)
        out = self.attend(q, k, v, context, context.layer_cache)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Gemma3Block(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: Gemma3Config, layer: int, impl: Impl) -> None:
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Gemma3Norm(E, eps=eps)
        self.attention = Gemma3Attention(config, layer, impl)
        self.post_attention_layernorm = Gemma3Norm(E, eps=eps)
        self.pre_feedforward_layernorm = Gemma3Norm(E, eps=eps)
        self.mlp = GatedMLP(E, config.intermediate_size, config.hidden_activation, bias=False)
        self.post_feedforward_layernorm = Gemma3Norm(E, eps=eps)

    def forward(self, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
        attended = self.attention(self.input_layernorm(x), rope, context)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma3(CausalLM):
    """The language model: ids in, logits out."""

    def __init__(self, config: Gemma3Config, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.config: Gemma3Config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Gemma3Block(config, layer, impl) for layer in range(config.num_hidden_layers)
        )
        self.norm = Gemma3Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """What the first block takes: [B, T, E]."""
        x: Tensor = self.embed_tokens(ids)
        return x * x.new_full((), self.config.hidden_size**0.5)  # rounded, as it was trained

    def rotary(self, context: Context, dtype: torch.dtype) -> list[RotaryAngles]:
        """The rotary angles that each block takes: sliding layers have their own."""
        config = self.config
        full, sliding = (
            rotary_angles(kind, context.positions, config.head_dim, dtype)
            for kind in (config.rope, config.sliding_rope)
        )
        return [sliding if kind == SLIDING_ATTENTION else full for kind in config.layer_types]

    @staticmethod
    def hf_name(name: str) -> str:
        """The name in published checkpoints of our parameter `name`."""
        if name.startswith("lm_head."):
            return name
        return "model." + name.replace(".attention.", ".self_attn.")


# What the config.json of each published model says, for use without the hub.
PRESETS: dict[str, dict[str, object]] = {
    "gemma3-270m": {
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
    },
}
