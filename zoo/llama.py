"""Llama (arXiv 2302.13971), SmolLM2, TinyLlama, Llama 3.2: pre-norm, SwiGLU, grouped queries.

Read it top to bottom: configuration, attention, block, model, names in published checkpoints.
Which attention a layer has is `layer_types[i]`; everything inside it is in `layers/`.

Dims: B batch, T tokens, E hidden, H query heads, G key/value heads, D head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor, nn

from flasheva import EvaConfig, Impl
from layers import (
    Activation,
    Context,
    GatedMLP,
    RopeConfig,
    RotaryAngles,
    apply_rotary,
    build_attention,
)
from zoo.causal_lm import CausalLM
from zoo.config import FieldReader, check_heads, check_layer_types


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Field names as in Hugging Face's config.json, and `eva` for the layers that are not full."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    hidden_act: Activation = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    layer_types: tuple[str, ...]
    eva: EvaConfig = field(default_factory=EvaConfig)

    model_type: ClassVar[str] = "llama"

    def __post_init__(self) -> None:
        check_layer_types(self.layer_types, self.num_hidden_layers)
        check_heads(self.num_attention_heads, self.num_key_value_heads)

    @classmethod
    def from_hf(cls, config: Mapping[str, object]) -> Self:
        """Reads a config.json; ValueError names a field that is missing or not supported."""
        read = FieldReader(config)
        heads, hidden = read.int("num_attention_heads"), read.int("hidden_size")
        return cls(
            vocab_size=read.int("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.int("intermediate_size"),
            num_hidden_layers=read.int("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.int("num_key_value_heads", heads),
            head_dim=read.int("head_dim", hidden // heads),
            max_position_embeddings=read.int("max_position_embeddings"),
            rms_norm_eps=read.float("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(config),
            hidden_act=read.activation("hidden_act", "silu"),
            attention_bias=read.bool("attention_bias", False),
            mlp_bias=read.bool("mlp_bias", False),
            tie_word_embeddings=read.bool("tie_word_embeddings", False),
            layer_types=read.layer_types(),
            eva=read.eva(),
        )


class LlamaAttention(nn.Module):
    """Projections and RoPE round `attend`, which is full, EVA or window attention."""

    def __init__(self, config: LlamaConfig, layer: int, impl: Impl) -> None:
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, G, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.head_dim = D
        self.q_proj = nn.Linear(E, H * D, bias=bias)
        self.k_proj = nn.Linear(E, G * D, bias=bias)
        self.v_proj = nn.Linear(E, G * D, bias=bias)
        self.o_proj = nn.Linear(H * D, E, bias=bias)
        self.attend = build_attention(
            config.layer_types[layer],
            num_attention_heads=H,
            num_key_value_heads=G,
            head_dim=D,
            eva=config.eva,
            impl=impl,
        )

    def forward(self, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, rope), apply_rotary(k, rope)
        out = self.attend(q, k, v, context, context.layer_cache)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int, impl: Impl) -> None:
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(E, eps=eps)
        self.attention = LlamaAttention(config, layer, impl)
        self.post_attention_layernorm = nn.RMSNorm(E, eps=eps)
        self.mlp = GatedMLP(E, config.intermediate_size, config.hidden_act, bias=config.mlp_bias)

    def forward(self, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), rope, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(CausalLM):
    """The language model: ids in, logits out."""

    ignored_suffixes = (".rotary_emb.inv_freq",)

    def __init__(self, config: LlamaConfig, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaBlock(config, layer, impl) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @staticmethod
    def hf_name(name: str) -> str:
        """The name in published checkpoints of our parameter `name`."""
        if name.startswith("lm_head."):
            return name
        return "model." + name.replace(".attention.", ".self_attn.")


def _smollm2(**fields: object) -> dict[str, object]:
    return {
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **fields,
    }


def _llama32(**fields: object) -> dict[str, object]:
    return {
        "vocab_size": 128256,
        "intermediate_size": 8192,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        **fields,
    }


# What the config.json of each published model says, for use without the hub.
PRESETS: dict[str, dict[str, object]] = {
    # 7.0 M: 8 blocks of 737,792, and 4,096 embeddings of 256 that the head shares. The widest that
    # leaves two adapters room in 30 MB; heads of 32, the least that every implementation takes.
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": _smollm2(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "smollm2-360m": _smollm2(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    ),
    "smollm2-1.7b": _smollm2(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        rope_theta=130000.0,
    ),
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    "llama-3.2-1b": _llama32(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
    ),
    "llama-3.2-3b": _llama32(
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
    ),
}
