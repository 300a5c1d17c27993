"""Phi-1.5 (arXiv 2309.05463): attention and MLP in parallel on one normalised input.

What differs from llama.py: one LayerNorm a block feeds both branches, biases everywhere (the
output head too), a plain GELU MLP, and RoPE on half of each head.

Dims: B batch, T tokens, E hidden, H query heads, G key/value heads, D head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor, nn

from flasheva import EvaConfig, Impl
from layers import (
    MLP,
    Activation,
    Context,
    RopeConfig,
    RotaryAngles,
    apply_rotary,
    beside,
    build_attention,
)
from zoo.causal_lm import CausalLM
from zoo.config import FieldReader, check_heads, check_layer_types


@dataclass(frozen=True, kw_only=True)
class PhiConfig:
    """Field names as in Hugging Face's config.json, and `eva` for the layers that are not full."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(partial_rotary_factor=0.5))
    hidden_act: Activation = "gelu_new"
    tie_word_embeddings: bool = False
    layer_types: tuple[str, ...]
    eva: EvaConfig = field(default_factory=EvaConfig)

    model_type: ClassVar[str] = "phi"

    def __post_init__(self) -> None:
        check_layer_types(self.layer_types, self.num_hidden_layers)
        check_heads(self.num_attention_heads, self.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, object]) -> Self:
        """Reads a config.json; ValueError names a field that is missing or not supported."""
        read = FieldReader(config)
        if read.bool("qk_layernorm", False):
            raise ValueError("config field 'qk_layernorm' must be false: no published Phi has it")
        heads = read.int("num_attention_heads")
        return cls(
            vocab_size=read.int("vocab_size"),
            hidden_size=read.int("hidden_size"),
            intermediate_size=read.int("intermediate_size"),
            num_hidden_layers=read.int("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.int("num_key_value_heads", heads),
            max_position_embeddings=read.int("max_position_embeddings"),
            layer_norm_eps=read.float("layer_norm_eps", 1e-5),
            rope=RopeConfig.from_hf(config, partial_rotary_factor=0.5),
            hidden_act=read.activation("hidden_act", "gelu_new"),
            tie_word_embeddings=read.bool("tie_word_embeddings", False),
            layer_types=read.layer_types(),
            eva=read.eva(),
        )


class PhiAttention(nn.Module):
    """Projections and RoPE round `attend`, which is full, EVA or window attention."""

    def __init__(self, config: PhiConfig, layer: int, impl: Impl) -> None:
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(E, H * D)
        self.k_proj = nn.Linear(E, G * D)
        self.v_proj = nn.Linear(E, G * D)
        self.dense = nn.Linear(H * D, E)
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
        return self.dense(out.transpose(1, 2).flatten(2))


class PhiBlock(nn.Module):
    """x + attention(y) + mlp(y) with y = norm(x)."""

    def __init__(self, config: PhiConfig, layer: int, impl: Impl) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PhiAttention(config, layer, impl)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
        y = self.input_layernorm(x)
        # A step on a GPU computes the MLP meanwhile: it does not wait for attention.
        mlp = beside(self.mlp, y, ahead=y)
        attended = self.attention(y, rope, context)
        return x + attended + mlp.join(after=attended)


class Phi(CausalLM):
    """The language model: ids in, logits out."""

    ignored_suffixes = (".rotary_emb.inv_freq",)

    def __init__(self, config: PhiConfig, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            PhiBlock(config, layer, impl) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @staticmethod
    def hf_name(name: str) -> str:
        """The name in published checkpoints of our parameter `name`."""
        if name.startswith("lm_head."):
            return name
        if name.startswith("norm."):
            name = name.replace("norm.", "final_layernorm.")
        for ours, theirs in (
            (".attention.", ".self_attn."),
            (".mlp.up_proj.", ".mlp.fc1."),
            (".mlp.down_proj.", ".mlp.fc2."),
        ):
            name = name.replace(ours, theirs)
        return f"model.{name}"


# What the config.json of each published model says, for use without the hub.
PRESETS: dict[str, dict[str, object]] = {
    "phi-1.5": {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
    },
}
