"""The blocks of Llama, GPT-NeoX and Phi, their parameters under the published names.

Dims: B batch, T tokens, E hidden, H query heads, G key/value heads, D head dim, N all tokens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from .attention_zoo_eva import Positions, build_attention
from .configuration_zoo_eva import ZooEvaConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


class Call(NamedTuple):
    """What every layer needs to know; cos and sin are [B or 1, 1, T, rotated dims]."""

    cos: Tensor
    sin: Tensor
    at: Positions
    cache: DynamicCache | None


def head_dim(config: ZooEvaConfig) -> int:
    """D."""
    return int(getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))


def rotary(config: ZooEvaConfig, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles at position [B or 1, T]: [B or 1, 1, T, rotated dims]."""
    rope = config.rope_parameters
    wide = torch.promote_types(dtype, torch.float32)
    dim = int(head_dim(config) * rope["partial_rotary_factor"])
    exponent = torch.arange(0, dim, 2, device=position.device, dtype=wide) / dim
    frequency = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "llama3":  # long wavelengths are stretched
        wavelength, low, high = (
            2 * math.pi / frequency,
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )
        turns = rope["original_max_position_embeddings"] / wavelength
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
    angle = position.to(wide)[:, None, :, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, call: Call) -> Tensor:
    """Rotates the first dims of each head of x [B, H, T, D]."""
    dim = call.cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * call.cos + torch.cat([-second, first], dim=-1) * call.sin
    return torch.cat([turned, rest], dim=-1)


class Attention(nn.Module):
    """What lies between the projections: rotation, cache, attention."""

    def __init__(self, config: ZooEvaConfig, layer: int) -> None:
        super().__init__()
        H: int = config.num_attention_heads
        self.G: int = getattr(config, "num_key_value_heads", H)
        self.D = head_dim(config)
        self.layer = layer
        kind, eva = config.attention_types[layer], config.eva or {}
        self.attend = build_attention(kind, eva, H, self.G, self.D)

    def between(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """q [B, H, T, D], k and v [B, G, T, D] to the heads' outputs [B, T, H * D]."""
        q, k = rotate(q, call), rotate(k, call)
        past = q
        if call.cache is not None and not self.attend.needs_past_queries:
            k, v = call.cache.update(k, v, self.layer)
        elif call.cache is not None:
            # The cache holds two tensors a layer: the R = H / G queries of a group go along with
            # its value, [B, G, N, D + R * D].
            queries = q.unflatten(1, (self.G, -1)).transpose(2, 3).flatten(3)
            k, both = call.cache.update(k, torch.cat([v, queries], dim=3), self.layer)
            v, queries = both[..., : self.D], both[..., self.D :]
            past = queries.unflatten(3, (-1, self.D)).transpose(2, 3).flatten(1, 2)
        return self.attend(q, k, v, past, call.at).transpose(1, 2).flatten(2)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, heads * D] to [B, heads, T, D]."""
        return x.unflatten(-1, (-1, self.D)).transpose(1, 2)


class LlamaAttention(Attention):
    """Published names of Llama."""

    def __init__(self, config: ZooEvaConfig, layer: int) -> None:
        super().__init__(config, layer)
        E, H, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.q_proj = nn.Linear(E, H * self.D, bias=bias)
        self.k_proj = nn.Linear(E, self.G * self.D, bias=bias)
        self.v_proj = nn.Linear(E, self.G * self.D, bias=bias)
        self.o_proj = nn.Linear(H * self.D, E, bias=bias)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = (self.split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.between(q, k, v, call))


class PhiAttention(Attention):
    """Published names of Phi."""

    def __init__(self, config: ZooEvaConfig, layer: int) -> None:
        super().__init__(config, layer)
        E, H = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(E, H * self.D)
        self.k_proj = nn.Linear(E, self.G * self.D)
        self.v_proj = nn.Linear(E, self.G * self.D)
        self.dense = nn.Linear(H * self.D, E)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = (self.split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.dense(self.between(q, k, v, call))


class GPTNeoXAttention(Attention):
    """Published names of GPT-NeoX, whose projection interleaves q, k and v by head."""

    def __init__(self, config: ZooEvaConfig, layer: int) -> None:
        super().__init__(config, layer)
        E, bias = config.hidden_size, config.attention_bias
        self.query_key_value = nn.Linear(E, 3 * E, bias=bias)
        self.dense = nn.Linear(E, E, bias=bias)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (-1, 3 * self.D)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=-1)
        return self.dense(self.between(q, k, v, call))


class MLP(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)), under the family's names."""

    def __init__(self, config: ZooEvaConfig, names: tuple[str, ...], *, bias: bool = True) -> None:
        super().__init__()
        E, I = config.hidden_size, config.intermediate_size  # noqa: E741
        *ups, down = names
        for name in ups:
            self.add_module(name, nn.Linear(E, I, bias=bias))
        self.add_module(down, nn.Linear(I, E, bias=bias))
        self.activation: Callable[[Tensor], Tensor] = _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        first, *others, down = self.children()
        h = self.activation(first(x))
        for up in others:
            h = h * up(x)
        return down(h)


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ZooEvaConfig, layer: int) -> None:
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(E, eps=eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(E, eps=eps)
        self.mlp = MLP(config, ("gate_proj", "up_proj", "down_proj"), bias=config.mlp_bias)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), call)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPTNeoXBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)); in sequence where the config says so."""

    def __init__(self, config: ZooEvaConfig, layer: int) -> None:
        super().__init__()
        E, eps = config.hidden_size, config.layer_norm_eps
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(E, eps=eps)
        self.attention = GPTNeoXAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(E, eps=eps)
        self.mlp = MLP(config, ("dense_h_to_4h", "dense_4h_to_h"))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        attended = x + self.attention(self.input_layernorm(x), call)
        return attended + self.mlp(self.post_attention_layernorm(x if self.parallel else attended))


class PhiBlock(nn.Module):
    """x + attention(y) + mlp(y) with y = norm(x)."""

    def __init__(self, config: ZooEvaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = PhiAttention(config, layer)
        self.mlp = MLP(config, ("fc1", "fc2"))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y = self.input_layernorm(x)
        return x + self.self_attn(y, call) + self.mlp(y)
