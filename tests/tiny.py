"""Tiny models of the three families, with weights that make every term of a block matter."""

import functools

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from flasheva import EvaConfig
from zoo import CausalLM, Tokenizer
from zoo.config import ModelConfig
from zoo.families import build, read_config
from zoo.weights.filling import fill_random

FAMILIES = ("llama", "gpt_neox", "phi")
VOCAB_SIZE = 512
END = "<|endoftext|>"
TEXT = """The server listens on the loopback address and answers one request after another.
A cache keeps what was asked before, so that the next reader need not wait for the same thing.
Numbers such as 2048, 512 and 31 count tokens; words such as naïve, café and Straße have accents.
"""
SHORT_WINDOW = EvaConfig(window_size=8, chunk_size=4)  # boundaries come often


def hf_config(family: str, **fields: object) -> dict[str, object]:
    """A config.json; fields that all families have."""
    grouped = {} if family == "gpt_neox" else {"num_key_value_heads": 2}
    sizes: dict[str, object] = {
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    return sizes | grouped | fields


def config(family: str, **fields: object) -> ModelConfig:
    """The family's own config."""
    return read_config(hf_config(family, **fields))


def mixed(family: str, eva: EvaConfig = SHORT_WINDOW, **fields: object) -> dict[str, object]:
    """A config.json with one layer of each type."""
    types = ["eva_attention", "full_attention", "window_attention"]
    return hf_config(family, layer_types=types, eva=eva.to_dict(), **fields)


def make_model(
    config: dict[str, object], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> CausalLM:
    """A model from a config.json, as `zoo.load` would leave it, without a tokenizer."""
    with torch.device("meta"):
        model = build(read_config(config), "auto")
    fill_random(model, torch.device("cpu"), dtype)
    scramble(model, seed)
    model.hf_config = config
    return model.eval()


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 0) -> None:
    """Random values for every parameter, biases and norms too, of sizes that keep logits apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if ".attend." in name:
            value = parameter.float() + 0.1 * noise
        elif parameter.ndim > 1:
            # Small embeddings, so that even with a tied head the text does not repeat its input.
            value = noise * (0.4 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5)
        else:
            value = 0.2 * noise + (1.0 if "norm" in name and "weight" in name else 0.0)
        parameter.copy_(value)


@functools.cache
def tokenizer_json() -> str:
    """A tokenizer.json built as GPT-NeoX's is: NFC, byte-level BPE, <|endoftext|> first."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,  # an embedding has more rows than the vocabulary, as Pythia's
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend.to_str()


def make_tokenizer() -> Tokenizer:
    """The same, as a model has it."""
    return Tokenizer(Backend.from_str(tokenizer_json()), special={"eos_token": END})
