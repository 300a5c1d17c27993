"""A zoo of hybrid language models: FlashEVA layers mixed with full attention, layer by layer.

    import zoo
    model = zoo.load("smollm2-135m-instruct-eva-hybrid")
    print(zoo.generate(model, "Once upon a time", max_new_tokens=40)[0].text)
"""

from zoo.causal_lm import CausalLM
from zoo.generate import Generation, Sampling, generate, stream
from zoo.loading import load, save
from zoo.registry import list_names as list  # noqa: A004  # zoo.list() is the documented name
from zoo.tokenizer import Tokenizer

__all__ = ["CausalLM", "Generation", "Sampling", "Tokenizer", "generate", "list", "load", "save", "stream"]
