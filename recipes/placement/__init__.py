"""Which layers keep full attention: rules that name them, and searches that find them.

`rules` places layers in a model of any depth without looking at it. `search` looks for layers that
raise a score, which somebody else computes: it knows nothing of models.
"""

from recipes.placement.rules import (
    SEARCHED,
    Placement,
    Rule,
    check_layers,
    default_placement,
    exact_layers,
    is_converted,
    layer_types,
    parse_layers,
    sliding_layers,
)
from recipes.placement.search import (
    Found,
    LayerSet,
    Scores,
    drop_one,
    greedy,
    most_missed,
    one_by_one,
    ratio_of_drops,
    restore_one,
    top,
)

__all__ = [
    "SEARCHED",
    "Found",
    "LayerSet",
    "Placement",
    "Rule",
    "Scores",
    "check_layers",
    "default_placement",
    "drop_one",
    "exact_layers",
    "greedy",
    "is_converted",
    "layer_types",
    "most_missed",
    "one_by_one",
    "parse_layers",
    "ratio_of_drops",
    "restore_one",
    "sliding_layers",
    "top",
]
