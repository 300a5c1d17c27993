"""The config.json that a GGUF file's metadata amounts to, one function per architecture."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Heads(NamedTuple):
    """Numbers of query heads and of key/value heads."""

    query: int
    key_value: int


def read_heads(metadata: Mapping[str, object], path: Path, architecture: str) -> Heads:
    """The head counts, which must be the same in every layer."""
    fields = _Fields(metadata, path, architecture)
    query = fields.int("attention.head_count")
    return Heads(query, fields.int("attention.head_count_kv", query))


def llama_config(
    metadata: Mapping[str, object],
    path: Path,
    *,
    rope_factors: Tensor | None,
    vocab_size: int,
    tied: bool,
) -> dict[str, object]:
    """Fields under Hugging Face's names.

    Args:
        metadata: the file's keys and values.
        path: for messages.
        rope_factors: [D / 2] what each RoPE frequency is divided by, or None.
        vocab_size: rows of the embedding, where the metadata does not say.
        tied: whether the output projection is the embedding.

    Raises:
        ValueError: a field is missing, has another type, or asks for what llama has not.
    """
    fields = _Fields(metadata, path, "llama")
    theta = fields.float("rope.freq_base", 10000.0)
    config = _sizes(fields, metadata, path, vocab_size, tied) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": theta,
    }
    if rope_factors is not None:
        config["rope_scaling"] = _llama3_scaling(rope_factors, theta, path)
    return config


def gemma3_config(
    metadata: Mapping[str, object], path: Path, *, vocab_size: int, tied: bool
) -> dict[str, object]:
    """Fields under Hugging Face's names; arguments and errors as those of `llama_config`.

    What the metadata leaves out is what llama.cpp takes for it.
    """
    fields = _Fields(metadata, path, "gemma3")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if metadata.get(f"gemma3.{name}"):
            raise ValueError(f"{path} has gemma3.{name}, which is not supported")
    config = _sizes(fields, metadata, path, vocab_size, tied)
    return config | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["head_dim"],
        "rope_theta": fields.float("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": fields.float("rope.freq_base_swa", 10_000.0),
        "sliding_window": fields.int("attention.sliding_window"),
        "sliding_window_pattern": fields.int("attention.sliding_window_pattern", 6),
    }


def _sizes(
    fields: "_Fields", metadata: Mapping[str, object], path: Path, vocab_size: int, tied: bool
) -> dict[str, object]:
    """What all architectures have."""
    heads = read_heads(metadata, path, fields.architecture)
    hidden = fields.int("embedding_length")
    head_dim = fields.int("attention.key_length", hidden // heads.query)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.int(name, head_dim) != head_dim:
            raise ValueError(f"{path} has {name} {fields.int(name)}, only {head_dim} is supported")
    scaling = metadata.get(f"{fields.architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{path} has RoPE scaling of type {scaling!r}, which is not supported")
    config: dict[str, object] = {
        "hidden_size": hidden,
        "intermediate_size": fields.int("feed_forward_length"),
        "num_hidden_layers": fields.int("block_count"),
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.key_value,
        "head_dim": head_dim,
        "rms_norm_eps": fields.float("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.int("context_length"),
        "vocab_size": fields.int("vocab_size", vocab_size),
        "tie_word_embeddings": tied,
    }
    for name in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config


def _llama3_scaling(factors: Tensor, theta: float, path: Path) -> dict[str, object]:
    """The `rope_scaling` of Llama 3.1 and later whose factors these are, checked one by one.

    llama.cpp stores what each frequency is divided by instead of the rule: 1 for wavelengths
    below 8192 / 4 tokens, `factor` above 8192, and a blend in 1 / wavelength between.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = factors.max().item()
    half = factors.numel()
    wavelength = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if not torch.allclose(factors.double(), expected, rtol=1e-4, atol=0):
        raise ValueError(f"{path} scales RoPE frequencies by another rule than Llama 3.1's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


class _Fields:
    """Typed access to the keys of an architecture; a default makes a key optional."""

    def __init__(self, metadata: Mapping[str, object], path: Path, architecture: str) -> None:
        self._metadata, self._path, self.architecture = metadata, path, architecture

    def int(self, name: str, default: int | None = None) -> int:
        value = self._metadata.get(key := f"{self.architecture}.{name}", default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{self._path} has {key} = {value!r}, expected one integer")
        return value

    def float(self, name: str, default: float | None = None) -> float:
        """A float32 as the decimal that was meant: 1e-05 and not 9.9999997e-06."""
        value = self._metadata.get(key := f"{self.architecture}.{name}", default)
        if not isinstance(value, float):
            raise ValueError(f"{self._path} has {key} = {value!r}, expected one number")
        return float(str(np.float32(value)))
