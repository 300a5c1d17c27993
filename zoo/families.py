"""From `model_type` to the module that defines a family; a family is imported when first used."""

import importlib
from collections.abc import Mapping

from flasheva import Impl
from zoo.causal_lm import CausalLM
from zoo.config import ModelConfig

# model_type of config.json: module, config class, model class.
_FAMILIES = {
    "gemma3_text": ("zoo.gemma3", "Gemma3Config", "Gemma3"),
    "gpt_neox": ("zoo.gpt_neox", "GPTNeoXConfig", "GPTNeoX"),
    "llama": ("zoo.llama", "LlamaConfig", "Llama"),
    "phi": ("zoo.phi", "PhiConfig", "Phi"),
}


def read_config(hf_config: Mapping[str, object]) -> ModelConfig:
    """The family's config from a config.json.

    Raises:
        ValueError: an unknown `model_type`, or a field that is missing or not supported.
    """
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(_FAMILIES)}, not {kind!r}")
    module, config_class, _ = _FAMILIES[kind]
    config: ModelConfig = getattr(importlib.import_module(module), config_class).from_hf(hf_config)
    return config


def build(config: ModelConfig, impl: Impl) -> CausalLM:
    """The family's model, on torch's default device, with PyTorch's initial weights."""
    module, _, model_class = _FAMILIES[config.model_type]
    model: CausalLM = getattr(importlib.import_module(module), model_class)(config, impl=impl)
    return model


def preset(family: str, name: str) -> dict[str, object]:
    """The config.json of a published model, kept for use without the hub."""
    presets: dict[str, dict[str, object]] = importlib.import_module(_FAMILIES[family][0]).PRESETS
    return {"model_type": family, **presets[name]}
