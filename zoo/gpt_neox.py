"""GPT-NeoX (arXiv 2204.06745), the architecture of Pythia (arXiv 2304.01373).

What differs from llama.py: attention and MLP in parallel on the same input (with a norm each),
LayerNorm and biases, one fused projection that interleaves q, k and v by head, RoPE on a quarter
of each head, and no grouped queries.

Dims: B batch, T tokens, E hidden, H heads, D head dim.
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
from zoo.config import FieldReader, check_layer_types


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig:
    """Field names as in Hugging Face's config.json, and `eva` for the layers that are not full."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(partial_rotary_factor=0.25))
    hidden_act: Activation = "gelu"
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    layer_types: tuple[str, ...]
    eva: EvaConfig = field(default_factory=EvaConfig)

    model_type: ClassVar[str] = "gpt_neox"

    def __post_init__(self) -> None:
        check_layer_types(self.layer_types, self.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Every query head has keys and values of its own."""
        return self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, object]) -> Self:
        """Reads a config.json; ValueError names a field that is missing or not supported."""
        read = FieldReader(config)
        return cls(
            vocab_size=read.int("vocab_size"),
            hidden_size=read.int("hidden_size"),
            intermediate_size=read.int("intermediate_size"),
            num_hidden_layers=read.int("num_hidden_layers"),
            num_attention_heads=read.int("num_attention_heads"),
            max_position_embeddings=read.int("max_position_embeddings"),
            layer_norm_eps=read.float("layer_norm_eps", 1e-5),
            rope=RopeConfig.from_hf(config, partial_rotary_factor=0.25),
            hidden_act=read.activation("hidden_act", "gelu"),
            use_parallel_residual=read.bool("use_parallel_residual", True),
            attention_bias=read.bool("attention_bias", True),
            tie_word_embeddings=read.bool("tie_word_embeddings", False),
            layer_types=read.layer_types(),
            eva=read.eva(),
        )


class GPTNeoXAttention(nn.Module):
    """The fused projection and RoPE round `attend`, which is full, EVA or window attention."""

    def __init__(self, config: GPTNeoXConfig, layer: int, impl: Impl) -> None:
        super().__init__()
        E, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(E, 3 * E, bias=bias)
        self.dense = nn.Linear(E, E, bias=bias)
        self.attend = build_attention(
            config.layer_types[layer],
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eva=config.eva,
            impl=impl,
        )

    def forward(self, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=-1)
        q, k = apply_rotary(q, rope), apply_rotary(k, rope)
        out = self.attend(q, k, v, context, context.layer_cache)
        return self.dense(out.transpose(1, 2).flatten(2))


class GPTNeoXBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)); in sequence where the config says so."""

    def __init__(self, config: GPTNeoXConfig, layer: int, impl: Impl) -> None:
        super().__init__()
        E, eps = config.hidden_size, config.layer_norm_eps
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(E, eps=eps)
        self.attention = GPTNeoXAttention(config, layer, impl)
        self.post_attention_layernorm = nn.LayerNorm(E, eps=eps)
        self.mlp = MLP(E, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
        if not self.parallel:
            x = x + self.attention(self.input_layernorm(x), rope, context)
            return x + self.mlp(self.post_attention_layernorm(x))
        y = self.input_layernorm(x)
        # A step on a GPU computes the MLP meanwhile: it does not wait for attention.
        mlp = beside(self.mlp, self.post_attention_layernorm(x), ahead=y)
        attended = self.attention(y, rope, context)
        return x + attended + mlp.join(after=attended)


class GPTNeoX(CausalLM):
    """The language model: ids in, logits out."""

    ignored_suffixes = (
        ".attention.bias",
        ".attention.masked_bias",
        ".attention.rotary_emb.inv_freq",
    )

    def __init__(self, config: GPTNeoXConfig, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            GPTNeoXBlock(config, layer, impl) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @staticmethod
    def hf_name(name: str) -> str:
        """The name in published checkpoints of our parameter `name`."""
        if name.startswith("lm_head."):
            return name.replace("lm_head.", "embed_out.")
        for ours, theirs in (
            ("embed_tokens.", "embed_in."),
            ("norm.", "final_layer_norm."),
        ):
            if name.startswith(ours):
                name = name.replace(ours, theirs)
        name = name.replace(".mlp.up_proj.", ".mlp.dense_h_to_4h.")
        return "gpt_neox." + name.replace(".mlp.down_proj.", ".mlp.dense_4h_to_h.")


def _pythia(
    hidden_size: int, layers: int, heads: int, vocab_size: int = 50304
) -> dict[str, object]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
    }


# What the config.json of each published model says, for use without the hub.
PRESETS: dict[str, dict[str, object]] = {
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, 50432),
    "pythia-12b": _pythia(5120, 36, 40, 50688),
}
