"""`zoo info`: what a model is made of, and how much its cache needs."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from recipes import is_converted
from tools.display import print_json, print_table
from tools.entry import run_command
from tools.model_options import AttentionOptions, SourceOptions, configured, layers_by_type
from tools.options import DEFAULT_MODEL, Json, ModelName, with_options

if TYPE_CHECKING:
    from tools.model_size import ModelSize
    from zoo.config import ModelConfig


@with_options
def info(
    source: SourceOptions,
    attention: AttentionOptions,
    name: ModelName = DEFAULT_MODEL,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="In one row of the cache.",
            show_default="the longest that the model knows",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"],
        typer.Option(help="Of the cache, and with --memory of the weights."),
    ] = "float32",
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="Of a GPU, weights included: how many rows of --context fit?",
            show_default="no such question",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Shows sizes, layers and bytes of cache, without loading any weights."""
    eva, layer_types = configured(name, source, attention)
    import torch

    from tools.model_size import largest_batch, measure_size
    from zoo.description import describe

    config = describe(
        name, eva=eva, layer_types=layer_types, revision=source.revision, weights=source.weights
    )
    longest = config.max_position_embeddings
    if context is None:
        context = longest
    if not 1 <= context <= longest:
        raise ValueError(f"--context must be 1 to {longest}, the model's context, not {context}")
    kept = getattr(torch, dtype)
    size = measure_size(config, context, kept)
    fits = None
    if memory is not None:
        if not 0 < memory < float("inf"):
            raise ValueError(f"--memory must be a number of GiB above 0, not {memory}")
        if dtype == "float64":
            raise ValueError(
                "--memory counts for our kernels: --dtype must be another than float64"
            )
        fits = _Fits(memory, largest_batch(config, context, kept, int(memory * 2**30)))
    if json:
        print_json(_as_json(name, config, size, dtype, fits))
    else:
        _show(name, config, size, dtype, fits)


class _Fits(NamedTuple):
    """Rows of a batch in GiB of memory."""

    memory: float
    rows: int


def _as_json(
    name: str, config: "ModelConfig", size: "ModelSize", dtype: str, fits: _Fits | None
) -> dict[str, object]:
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    return {
        "model": name,
        "model_type": config.model_type,
        "parameters": size.parameters,
        "eva_parameters": size.eva_parameters,
        "config": dataclasses.asdict(config),
        "layers": layers_by_type(config.layer_types),
        "cache": {
            "context": size.context,
            "dtype": dtype,
            "bytes": size.cache_bytes,
            "bytes_with_full_attention": size.full_cache_bytes,
            "layer_bytes": {kind: found.cache_bytes for kind, found in size.kinds.items()},
            "layer_bytes_per_token": {
                kind: found.cache_bytes / size.context for kind, found in size.kinds.items()
            },
        },
        **({} if fits is None else {"memory_gib": fits.memory, "max_batch": fits.rows}),
    }


def _show(
    name: str, config: "ModelConfig", size: "ModelSize", dtype: str, fits: _Fits | None
) -> None:
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    print(f"{name}: {config.model_type}, {size.parameters:,} parameters", end="")
    print(f", {size.eva_parameters:,} of them for EVA" if size.eva_parameters else "")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    hidden = ("layer_types", "rope", "eva")
    print(_listed({key: value for key, value in values.items() if key not in hidden}))
    print(f"rope: {_listed(dataclasses.asdict(config.rope))}")
    if is_converted(config.layer_types):
        print(f"eva: {_listed(dataclasses.asdict(config.eva))}")
    print(f"\nCache of one row of {size.context:,} tokens in {dtype}\n")
    layers = layers_by_type(config.layer_types)
    rows = [
        (
            kind,
            layers.get(kind, "none"),
            f"{found.cache_bytes / size.context:,.1f}",
            f"{found.cache_bytes:,}",
            f"{found.cache_bytes * found.layers:,}",
        )
        for kind, found in size.kinds.items()
    ]
    columns = ("attention", "layers", "bytes a token and layer", "bytes a layer", "bytes")
    print_table(columns, rows)
    times = size.full_cache_bytes / size.cache_bytes
    print(
        f"\nIn all {size.cache_bytes:,} bytes; with full attention as published "
        f"{size.full_cache_bytes:,}, {times:.2f} times as many"
    )
    if fits is not None:
        print(f"A batch in {fits.memory:g} GiB of a GPU has at most {fits.rows:,} such rows")


def _listed(values: dict[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


if __name__ == "__main__":
    sys.exit(run_command(info, "info"))
