"""Reading config.json: typed fields under Hugging Face's names, errors that name the field."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, get_args

from flasheva import EvaConfig
from layers import LAYER_TYPES, Activation, RopeConfig
from recipes import is_converted

_ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "phi": "PhiForCausalLM",
}
# Older spellings of what `rope_parameters` and `dtype` say now.
_OLD_FIELDS = (
    *("rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"),
    *("rope_local_base_freq", "torch_dtype"),
)


class ModelConfig(Protocol):
    """What every family's configuration has; field names as in Hugging Face's config.json."""

    model_type: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def rope(self) -> RopeConfig: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def layer_types(self) -> tuple[str, ...]: ...
    @property
    def eva(self) -> EvaConfig: ...


def to_hf(config: ModelConfig, original: Mapping[str, object], dtype: str) -> dict[str, object]:
    """A config.json: `original`'s fields (token ids and so on), and ours in their places.

    `eva` is written only for a converted model, so that the folder of an unmodified one is an
    ordinary Hugging Face folder.
    """
    assert dataclasses.is_dataclass(config)
    ours = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    rope, eva, layer_types = ours.pop("rope").to_hf(), ours.pop("eva"), ours.pop("layer_types")
    sliding_rope = ours.pop("sliding_rope", None)
    if sliding_rope is not None:
        rope = {"full_attention": rope, "sliding_attention": sliding_rope.to_hf()}
    fields = {key: value for key, value in original.items() if key not in _OLD_FIELDS}
    fields |= ours | {
        "model_type": config.model_type,
        "architectures": [_ARCHITECTURES[config.model_type]],
        "rope_parameters": rope,
        "dtype": dtype,
    }
    for name in ("layer_types", "eva"):
        fields.pop(name, None)
    if set(layer_types) != {"full_attention"} or sliding_rope is not None:
        fields["layer_types"] = list(layer_types)
    if is_converted(layer_types):
        fields["eva"] = eva.to_dict()
    return fields


class FieldReader:
    """Typed access to a config.json; a default makes a field optional (null counts as absent)."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config = config

    def int(self, name: str, default: int | None = None) -> int:
        """An integer field."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"config field {name!r} must be an integer, not {value!r}")
        if value < 1:  # all are sizes or counts
            raise ValueError(f"config field {name!r} must be at least 1, not {value}")
        return value

    def float(self, name: str, default: float | None = None) -> float:
        """A number field."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"config field {name!r} must be a number, not {value!r}")
        return float(value)

    def bool(self, name: str, default: bool) -> bool:
        """A true/false field."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config field {name!r} must be true or false, not {value!r}")
        return value

    def activation(self, name: str, default: Activation) -> Activation:
        """The name of an activation function."""
        value = self._get(name, default)
        for known in get_args(Activation):
            if value == known:
                return known
        known_names = ", ".join(get_args(Activation))
        raise ValueError(f"config field {name!r} must be one of {known_names}, not {value!r}")

    def layer_types(self, default: Sequence[str] = ()) -> tuple[str, ...]:
        """`layer_types`; absent: `default`, or full attention everywhere."""
        full = ["full_attention"] * self.int("num_hidden_layers")
        value = self._get("layer_types", list(default) or full)
        if not isinstance(value, list | tuple):
            raise ValueError(f"config field 'layer_types' must be a list, not {value!r}")
        return tuple(str(kind) for kind in value)

    def eva(self) -> EvaConfig:
        """The `eva` object that `zoo.save` writes; absent: the defaults."""
        value = self._get("eva", {})
        if not isinstance(value, Mapping):
            raise ValueError(f"config field 'eva' must be an object, not {value!r}")
        return EvaConfig.from_dict(value)

    def _get(self, name: str, default: object) -> object:
        value = self._config.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"config field {name!r} is missing")
        return value


def check_layer_types(
    layer_types: tuple[str, ...], num_hidden_layers: int, known: Sequence[str] = LAYER_TYPES
) -> None:
    """Raises ValueError unless there is one `known` layer type per layer."""
    if len(layer_types) != num_hidden_layers:
        raise ValueError(
            f"layer_types must name {num_hidden_layers} layers, not {len(layer_types)}"
        )
    for layer, kind in enumerate(layer_types):
        if kind not in known:
            raise ValueError(
                f"layer_types[{layer}] must be one of {', '.join(known)}, not {kind!r}"
            )


def check_heads(num_attention_heads: int, num_key_value_heads: int) -> None:
    """Raises ValueError unless every key/value head serves as many query heads as the others."""
    if num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads must divide num_attention_heads={num_attention_heads}, "
            f"not {num_key_value_heads}"
        )
