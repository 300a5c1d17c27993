"""A zoo of hybrid language models: FlashEVA layers mixed with full attention, layer by layer.

import zoo
model = zoo.load("smollm2-135m-instruct-eva-hybrid")
print(zoo.generate(model, "Once upon a time", max_new_tokens=40)[0].text)
"""

import importlib
from typing import TYPE_CHECKING

from zoo.registry import list_names as list

if TYPE_CHECKING:
    from zoo.adapters import save_adapter
    from zoo.causal_lm import CausalLM
    from zoo.description import describe
    from zoo.generation import Generation, generate, stream
    from zoo.loading import load, save
    from zoo.memory import max_batch, memory_of
    from zoo.sampling import Sampling
    from zoo.text.tokenizer import Tokenizer

__all__ = [
    "CausalLM",
    "Generation",
    "Sampling",
    "Tokenizer",
    "describe",
    "generate",
    "list",
    "load",
    "max_batch",
    "memory_of",
    "save",
    "save_adapter",
    "stream",
]

# Imported when first used: `zoo --help` and `zoo list` need no torch, which takes seconds.
_MODULES = {
    "CausalLM": "causal_lm",
    "Generation": "generation",
    "Sampling": "sampling",
    "Tokenizer": "text.tokenizer",
    "describe": "description",
    "generate": "generation",
    "load": "loading",
    "max_batch": "memory",
    "memory_of": "memory",
    "save": "loading",
    "save_adapter": "adapters",
    "stream": "generation",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"zoo.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
