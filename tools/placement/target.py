"""load_branches: the model of a search; new_recipe: what a search leaves behind."""

import dataclasses
from pathlib import Path

from flasheva import EvaConfig
from layers import SLIDING_ATTENTION
from recipes import Layers, Placement, Recipe, Search, layer_types, sliding_layers
from recipes.placement import LayerSet
from tools.measurement import implementation, model_case
from tools.model_options import (
    AttentionOptions,
    RuntimeOptions,
    SourceOptions,
    load_configured,
)
from tools.placement.branches import Branches
from tools.placement.settings import SearchSettings
from tools.results import device_name
from zoo.config import ModelConfig
from zoo.description import describe
from zoo.target import resolve


def bare_config(name: str, source: SourceOptions, attention: AttentionOptions) -> ModelConfig:
    """The model's config without an exact layer.

    Raises:
        ValueError: an unknown name, or options that do not fit.
    """
    config = describe(name, revision=source.revision, weights=source.weights)
    other = attention.attention or _other(config)
    sliding = sliding_layers(config.layer_types)
    types = layer_types((), config.num_hidden_layers, other, sliding)
    eva = attention.eva(config, types)
    return dataclasses.replace(config, layer_types=types, eva=eva)  # type: ignore[type-var]


def load_branches(
    name: str, source: SourceOptions, attention: AttentionOptions, runtime: RuntimeOptions
) -> Branches:
    """A model to search, with weights.

    Raises:
        ValueError: an unknown name, options that do not fit, weights that cannot be had.
    """
    config = bare_config(name, source, attention)
    return branches_of(name, source, runtime, config.eva, config.layer_types)


def branches_of(
    name: str,
    source: SourceOptions,
    runtime: RuntimeOptions,
    eva: EvaConfig,
    layer_types: tuple[str, ...],
) -> Branches:
    """The same for a given attention."""
    model = load_configured(name, source, runtime, eva, layer_types)
    return Branches(model, runtime.impl)


def search_case(
    name: str, branches: Branches, runtime: RuntimeOptions, settings: SearchSettings
) -> dict[str, object]:
    """What the scores of a search depend on."""
    longest = max(*settings.contexts, settings.window)
    return model_case(name, branches.model) | {
        "impl": implementation(branches.model, runtime.impl, longest),
        "device": device_name(branches.model.device),
        "search": settings.case(),
    }


def new_recipe(
    name: str,
    config: ModelConfig,
    layers: LayerSet,
    *,
    search: Search | None = None,
    rule: Placement | None = None,
) -> Recipe:
    """The recipe of a placement.

    Args:
        name: of the model that was searched.
        config: its config without an exact layer.
        layers: the exact ones.
        search: how they were found.
        rule: or what names them.
    """
    sliding = sliding_layers(config.layer_types)
    (other,) = {kind for i, kind in enumerate(config.layer_types) if i not in sliding}
    how = f"placed by {search.rule}" if search else "placed by a rule, without a search"
    placeable = config.num_hidden_layers - len(sliding)
    return Recipe(
        name=Path(name).stem,
        base=_base(name),
        description=f"{len(layers)} of {placeable} layers exact, {how}",
        eva=config.eva.to_dict(),  # type: ignore[arg-type]
        layers=Layers(exact=rule or layers, attention=other),  # type: ignore[arg-type]
        search=search,
    )


def _other(config: ModelConfig) -> str:
    """What the layers get that are not exact: what the model has, or else EVA."""
    kinds = set(config.layer_types) - {"full_attention", SLIDING_ATTENTION}
    return kinds.pop() if len(kinds) == 1 else "eva_attention"


def _base(name: str) -> str:
    """What a recipe names as its base: no recipe itself, and a path that holds anywhere."""
    target = resolve(name)
    if target.base is not None:
        return target.base
    if target.path is not None:
        return str(target.path.expanduser().resolve())
    assert target.repo is not None
    return target.repo
