"""Recipes of hybrids: TOML files, their typed schema, and the placement of exact layers.

No torch here: a recipe says what to build, and `zoo` builds it.
"""

from recipes.placement import (
    Placement,
    default_placement,
    exact_layers,
    is_converted,
    layer_types,
    parse_layers,
    sliding_layers,
)
from recipes.schema import (
    Layers,
    Recipe,
    Search,
    find_recipe,
    names,
    parse_recipe,
    read_recipe,
)
from recipes.stages import LOSSES, Lora, LossName, Stage, StageDtype
from recipes.writing import recipe_text, write_recipe

__all__ = [
    "LOSSES",
    "Layers",
    "Lora",
    "LossName",
    "Placement",
    "Recipe",
    "Search",
    "Stage",
    "StageDtype",
    "default_placement",
    "exact_layers",
    "find_recipe",
    "is_converted",
    "layer_types",
    "names",
    "parse_layers",
    "parse_recipe",
    "read_recipe",
    "recipe_text",
    "sliding_layers",
    "write_recipe",
]
