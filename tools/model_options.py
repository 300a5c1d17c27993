"""Options that say which model a command runs, and `load_model`, which loads it.

Nothing here imports torch before a command runs.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from recipes import exact_layers, is_converted, layer_types, parse_layers, sliding_layers
from tools.options import option

if TYPE_CHECKING:
    from flasheva import EvaConfig
    from zoo import CausalLM
    from zoo.config import ModelConfig

_MODEL, _ATTENTION = "Model", "Attention"


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which weights."""

    weights: Annotated[
        str,
        option(
            _MODEL,
            "auto (the Hugging Face cache, an installed package, the hub; with the name's "
            "adapter, if this package has one), published (without it), random, or a folder or "
            ".gguf file.",
        ),
    ] = "auto"
    revision: Annotated[str | None, option(_MODEL, "Branch, tag or commit on the hub.")] = None


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Where and how the model runs."""

    device: Annotated[
        str | None, option(_MODEL, "Such as cpu or cuda:0.", default="cuda if present")
    ] = None
    dtype: Annotated[
        str | None,
        option(
            _MODEL,
            "float32, bfloat16, float16 or float64.",
            default="float32 on a CPU, the checkpoint's on a GPU",
        ),
    ] = None
    impl: Annotated[
        Literal["auto", "triton", "flex", "reference"], option(_MODEL, "How EVA layers compute.")
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What differs from the attention that the name, the recipe or the checkpoint has."""

    layers: Annotated[
        str | None,
        option(
            _ATTENTION,
            "The layers with full attention, such as 7,17-18,20, or none; the others get "
            "--attention.",
        ),
    ] = None
    attention: Annotated[
        Literal["eva_attention", "window_attention"] | None,
        option(
            _ATTENTION,
            "Of the layers without full attention; window_attention has no summaries.",
            default="with --layers, eva_attention",
        ),
    ] = None
    window_size: Annotated[int | None, option(_ATTENTION, "Tokens that a query sees exactly.")] = (
        None
    )
    chunk_size: Annotated[
        int | None, option(_ATTENTION, "Tokens that share one summary; divides the window size.")
    ] = None
    window_type: Annotated[
        Literal["sliding", "block"] | None, option(_ATTENTION, "How the window moves.")
    ] = None
    sink_size: Annotated[
        int | None,
        option(_ATTENTION, "First tokens that stay exact: a multiple of the chunk size, or 0."),
    ] = None
    summary_map: Annotated[
        Literal["linear", "layernorm", "pooled"] | None,
        option(_ATTENTION, "From the means of a chunk to its summary."),
    ] = None
    summary_bias_init: Annotated[
        float | None,
        option(_ATTENTION, "Bias of untrained summaries, in units of log(chunk size)."),
    ] = None

    def layer_types(self, config: "ModelConfig") -> tuple[str, ...]:
        """The type of each layer in a model of this `config`.

        Raises:
            ValueError: layers that cannot be read or that the model does not have, or an
                `attention` that no layer would get.
        """
        if self.layers is not None:
            depth, sliding = config.num_hidden_layers, sliding_layers(config.layer_types)
            exact = exact_layers(parse_layers(self.layers), depth, sliding)
            return layer_types(exact, depth, self.attention or "eva_attention", sliding)
        if self.attention is None:
            return config.layer_types
        _refuse_if_unconverted(config.layer_types, "--attention")
        full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
        depth, sliding = config.num_hidden_layers, sliding_layers(config.layer_types)
        return layer_types(full, depth, self.attention, sliding)

    def eva(self, config: "ModelConfig", layer_types: tuple[str, ...]) -> "EvaConfig":
        """The options of these `layer_types` in a model of this `config`.

        Sinks of one chunk, the usual number, stay one chunk when the chunk size changes.

        Raises:
            ValueError: a value out of range, or an option that no layer would use.
        """
        own = ("layers", "attention")  # all others are fields of EvaConfig
        given = {k: v for k, v in vars(self).items() if k not in own and v is not None}
        for name in given:
            _refuse_if_unconverted(layer_types, "--" + name.replace("_", "-"))
        if "window_type" in given:
            given["window"] = given.pop("window_type")
        if "chunk_size" in given and config.eva.sink_size == config.eva.chunk_size:
            given.setdefault("sink_size", given["chunk_size"])
        return dataclasses.replace(config.eva, **given)


def layers_by_type(layer_types: Sequence[str]) -> dict[str, str]:
    """The layers of each type, such as "7,17-18,20": what `--layers` reads."""
    return {
        kind: _compact([i for i, other in enumerate(layer_types) if other == kind])
        for kind in dict.fromkeys(layer_types)
    }


def configured(
    name: str, source: SourceOptions, attention: AttentionOptions
) -> tuple["EvaConfig | None", tuple[str, ...] | None]:
    """What `zoo.load` takes as `eva` and `layer_types`; None where nothing was asked for.

    Raises:
        ValueError: an unknown name, or options that do not fit this model.
    """
    if attention == AttentionOptions():
        return None, None
    from zoo.description import describe

    config = describe(name, revision=source.revision, weights=source.weights)
    layer_types = attention.layer_types(config)
    eva = attention.eva(config, layer_types)
    return eva, None if layer_types == config.layer_types else layer_types


def load_model(
    name: str, source: SourceOptions, attention: AttentionOptions, runtime: RuntimeOptions
) -> "CausalLM":
    """`zoo.load` with the options of a command line.

    Raises:
        ValueError: an unknown name, options that do not fit, weights that cannot be had.
    """
    return load_configured(name, source, runtime, *configured(name, source, attention))


def load_configured(
    name: str,
    source: SourceOptions,
    runtime: RuntimeOptions,
    eva: "EvaConfig | None",
    layer_types: Sequence[str] | None,
) -> "CausalLM":
    """`zoo.load` with this attention, and all else from a command line."""
    import zoo

    return zoo.load(
        name,
        device=runtime.device,
        dtype=runtime.dtype,
        eva=eva,
        layer_types=layer_types,
        impl=runtime.impl,
        revision=source.revision,
        weights=source.weights,
    )


def _compact(layers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _refuse_if_unconverted(layer_types: tuple[str, ...], option_name: str) -> None:
    if not is_converted(layer_types):
        every = (
            "every layer that can be converted" if sliding_layers(layer_types) else "every layer"
        )
        raise ValueError(
            f"{option_name} has no effect, because {every} has full attention; choose with "
            "--layers which ones keep it, such as --layers none"
        )
