"""Configuration of a language model in which some layers have EVA or window attention."""

from transformers import PreTrainedConfig


class ZooEvaConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is Any to mypy
    """Fields of the family's own config.json, and what its layers attend to.

    Not called `layer_types`, which transformers checks against the kinds that it knows.

    Attributes:
        attention_types: of each layer, "full_attention", "eva_attention" or "window_attention".
        eva: options of the latter two: `window_size`, `chunk_size`, `window` ("sliding" or
            "block"), `sink_size`, `summary_map` ("linear", "layernorm" or "pooled"),
            `summary_bias`, `training_noise`.
    """

    attention_types: list[str] | tuple[str, ...] = ()
    eva: dict[str, int | float | str | bool] | None = None


# A class each: transformers keeps one model class for a class of configurations.
class ZooEvaLlamaConfig(ZooEvaConfig):
    """Llama."""

    model_type = "zoo_eva_llama"


class ZooEvaGPTNeoXConfig(ZooEvaConfig):
    """GPT-NeoX."""

    model_type = "zoo_eva_gpt_neox"


class ZooEvaPhiConfig(ZooEvaConfig):
    """Phi."""

    model_type = "zoo_eva_phi"
