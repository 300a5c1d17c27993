"""What a name means: where its weights come from, and which attention each layer gets."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from flasheva import EvaConfig
from recipes import (
    Layers,
    Recipe,
    default_placement,
    find_recipe,
    is_converted,
    read_recipe,
    sliding_layers,
)
from recipes import layer_types as arrange
from zoo.config import ModelConfig
from zoo.registry import split_name, unknown_name

log = logging.getLogger("zoo")
_said: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Target:
    """What a name means: one of base, path and repo, and what becomes of its layers."""

    label: str
    base: str | None = None
    path: Path | None = None
    repo: str | None = None
    all_eva: bool = False
    default_hybrid: bool = False
    recipe: Recipe | None = None


def resolve(name_or_path: str | Path) -> Target:
    """The meaning of a registered name, a recipe file, a local path or "org/name".

    Raises:
        ValueError: it means nothing; the message lists near names.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if not name.strip():
        raise ValueError(f"the name {name!r} is empty; see `zoo list`")
    if found := split_name(name):
        base, variant = found
        recipe = find_recipe(name) if variant else None
        return Target(
            name,
            base=base,
            all_eva=variant == "-eva" and recipe is None,
            default_hybrid=variant == "-eva-hybrid" and recipe is None,
            recipe=recipe,
        )
    if path.suffix == ".toml":
        recipe = read_recipe(path)
        beside = path.parent / recipe.base  # a folder may be named relative to its recipe
        base_name = str(beside) if "/" in recipe.base and beside.exists() else recipe.base
        if Path(base_name).suffix == ".toml":
            raise ValueError(f"{path}: base must be a model, not another recipe {recipe.base!r}")
        return dataclasses.replace(resolve(base_name), label=name, recipe=recipe)
    if _exists(path):
        return Target(name, path=path)
    looks_like_path = name.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors")
    if looks_like_path or isinstance(name_or_path, Path):
        raise ValueError(f"no such file or folder: {name}")
    if name.count("/") == 1 and all(name.split("/")) and len(name.split()) == 1:
        return Target(name, repo=name)
    raise ValueError(unknown_name(name))


def configure(
    target: Target,
    saved: ModelConfig,
    eva: EvaConfig | None,
    layer_types: Sequence[str] | None,
) -> ModelConfig:
    """The model's config: `saved`, changed by the name or recipe, changed by the arguments.

    Raises:
        ValueError: a recipe or layer types that do not fit the model.
    """
    depth, sliding = saved.num_hidden_layers, sliding_layers(saved.layer_types)
    types, options = saved.layer_types, saved.eva
    if target.recipe is not None:
        types = target.recipe.layer_types(depth, sliding)
        try:
            options = EvaConfig.from_dict(target.recipe.eva)
        except ValueError as error:
            raise ValueError(f"recipe {target.recipe.name!r}: {error}") from None
    elif target.base is not None and not target.all_eva and not target.default_hybrid:
        # As published, whatever folder the weights are in.
        types = arrange(range(depth), depth, "", sliding)
    elif target.all_eva:
        types = arrange((), depth, "eva_attention", sliding)
    elif target.default_hybrid:
        layers = Layers(exact=default_placement(depth - len(sliding)))
        recipe = Recipe(name=target.label, base="", eva={}, layers=layers)
        types = recipe.layer_types(depth, sliding)
    if layer_types is not None:
        types = tuple(layer_types)
        _check_sliding(types, sliding)
    assert dataclasses.is_dataclass(saved) and not isinstance(saved, type)
    return dataclasses.replace(saved, layer_types=types, eva=eva or options)


def _check_sliding(types: tuple[str, ...], sliding: frozenset[int]) -> None:
    """Raises ValueError unless the same layers slide: their weights know no other attention."""
    for layer in sorted(sliding_layers(types) ^ sliding):
        if layer < len(types):  # another depth is refused by the family's config
            kind = "sliding_attention" if layer in sliding else "another attention"
            raise ValueError(
                f"layer_types[{layer}] must be {kind}, as published, not {types[layer]!r}"
            )


def same_attention(
    types: Sequence[str], eva: EvaConfig, other_types: Sequence[str], other_eva: EvaConfig
) -> bool:
    """Whether a trained model computes the same with both."""
    only_before_training = ("summary_bias_init", "training_noise")
    ones, others = eva.to_dict(), other_eva.to_dict()
    differ = {name for name in ones if ones[name] != others[name]}.difference(only_before_training)
    return tuple(types) == tuple(other_types) and (not is_converted(types) or not differ)


def say_default_placement(target: Target, config: ModelConfig) -> None:
    """Warns, once, that a hybrid's exact layers were placed by a rule and not by a search."""
    if target.default_hybrid:
        exact = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
        _warn_once(
            f"{target.label}: its exact layers have not been searched for; "
            f"using {len(exact)} evenly spaced ones, {exact}"
        )


def say_left_out(target: Target) -> None:
    """Warns, once, that a name's adapter was trained with another attention than is wanted."""
    _warn_once(
        f"{target.label}: its adapter was trained with other layers or EVA options than these and "
        "is left out"
    )


def say_untrained(target: Target, layers: int) -> None:
    """Warns, once, that a model was converted just now."""
    recipe = ""
    if target.recipe is not None and not target.recipe.stages:  # or it trains them
        recipe = f"; recipe {target.recipe.name!r} uses them so"
    _warn_once(
        f"{target.label}: the EVA parameters of {layers} layers are untrained, at their initial "
        f"values{recipe}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError):  # a name too long for a file; ~ of an unknown user
        return False


def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)
