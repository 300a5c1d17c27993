"""Which layers keep full attention: `exact_layers` turns a placement rule into layer numbers.

Layers count from 0. `Placement` is a rule, `exact_layers` applies it to a depth, `parse_layers`
reads a list such as "7,17-18,20" from a command line, and `default_placement` is what a model
gets whose placement nobody has searched for.

Some models are published with sliding-window attention in most layers. Those stay so, in every
model made of it; only the others are placed.
"""

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

Rule = Literal["uniform", "first", "last", "random"]

_SLIDING = "sliding_attention"  # Hugging Face's name

# Rules that need a model: `zoo place` runs them and writes the layers that they find.
SEARCHED = (
    "greedy_retrieval",
    "greedy_both",
    "greedy_perplexity",
    "greedy_kl",
    "restore_retrieval",
    "restore_perplexity",
    "restore_kl",
    "drop_retrieval",
    "halo",
    "gates_retrieval",
    "gates_kl",
)

# Four digits are enough for any depth, and "0-999999999999" cannot fill the memory.
_LAYER_OR_RANGE = re.compile(r"([0-9]{1,4})(?:\s*-\s*([0-9]{1,4}))?")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A rule that places `count` exact layers in a model of any depth.

    Attributes:
        rule: "uniform" (spread evenly), "first" (the first `count`), "last" (the last `count`) or
            "random" (drawn without replacement).
        count: number of exact layers, at least 1.
        seed: what "random" draws with; None for the other rules.

    Raises:
        ValueError: an unknown rule, a count below 1, a seed that is missing or has no use.
    """

    rule: Rule
    count: int
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.rule in SEARCHED:
            raise ValueError(
                f"rule {self.rule!r} is a search over a model; run it with `zoo place` and list "
                "the layers that it finds in `exact`"
            )
        if self.rule not in get_args(Rule):
            rules = ", ".join(repr(rule) for rule in get_args(Rule))
            raise ValueError(f"rule must be one of {rules}, not {self.rule!r}")
        if not _is_int(self.count) or self.count < 1:
            raise ValueError(f"count must be an integer of at least 1, not {self.count!r}")
        if self.rule != "random":
            if self.seed is not None:
                raise ValueError(f"seed is for rule 'random' only; remove it for {self.rule!r}")
        elif not _is_int(self.seed) or self.seed < 0:  # random.Random takes -1 and 1 for the same
            raise ValueError(
                f"rule 'random' needs a seed, an integer of at least 0, not {self.seed!r}"
            )


def check_layers(layers: Sequence[int]) -> None:
    """Checks a list of layers whose model is not known yet.

    Raises:
        ValueError: a layer that is no integer, negative or listed twice.
    """
    for position, layer in enumerate(layers):
        if not _is_int(layer) or layer < 0:
            raise ValueError(f"a layer must be an integer of at least 0, not {layer!r}")
        if layer in layers[:position]:
            raise ValueError(f"layer {layer} is listed twice")


def parse_layers(text: str) -> tuple[int, ...]:
    """Reads layers and ranges (both ends included), "7,17-18,20", or "none".

    Returns:
        The layers in ascending order; `exact_layers` checks them against a model.

    Raises:
        ValueError: text of another form, a range that runs backwards, a layer listed twice.
    """
    if text.strip() == "none":
        return ()
    layers: list[int] = []
    for part in text.split(","):
        match = _LAYER_OR_RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"cannot read {part.strip()!r} in the layers {text!r}; "
                "write layers and ranges, such as 7,17-18,20, or none"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"range {part.strip()} runs backwards; write {last}-{first}")
        layers.extend(range(first, last + 1))
    check_layers(layers)
    return tuple(sorted(layers))


def is_converted(layer_types: Sequence[str]) -> bool:
    """Whether some layer has another attention than the published model."""
    return not set(layer_types) <= {"full_attention", _SLIDING}


def sliding_layers(layer_types: Sequence[str]) -> frozenset[int]:
    """The layers that slide in the published model, and in every model made of it."""
    return frozenset(i for i, kind in enumerate(layer_types) if kind == _SLIDING)


def layer_types(
    exact: Collection[int], num_layers: int, other: str, sliding: Collection[int] = ()
) -> tuple[str, ...]:
    """The type of each layer: `exact` ones have full attention, `sliding` ones slide."""
    return tuple(
        _SLIDING if layer in sliding else "full_attention" if layer in exact else other
        for layer in range(num_layers)
    )


def default_placement(num_layers: int) -> Placement:
    """The placement without a search: uniform, a sixth of the layers (to nearest), at least 1.

    `num_layers` are those that can be placed.
    """
    return Placement(rule="uniform", count=max(1, (num_layers + 3) // 6))


def exact_layers(
    rule: Placement | tuple[int, ...], num_layers: int, sliding: Collection[int] = ()
) -> tuple[int, ...]:
    """Applies a placement rule, or checks a list of layers, for a model of `num_layers` layers.

    Those that are `sliding` are never exact, and a rule does not count them. With L other layers
    and k of them exact,

    - uniform: the middle of each of k equal stretches, `floor((i + 0.5) * L / k)`, i = 0 .. k - 1:
      6 of 30 are 2, 7, 12, 17, 22, 27;
    - random: the first k of a shuffle of the L layers that depends on the seed alone, so that with
      one seed the layers for k are among those for k + 1.

    Returns:
        The exact layers in ascending order, without repetition.

    Raises:
        ValueError: layers that the model does not have, more of them than it has, or a list with
            negative, repeated or sliding layers.
    """
    if not isinstance(rule, Placement):
        check_layers(rule)
        missing = [layer for layer in rule if layer >= num_layers]
        if missing:
            raise ValueError(
                f"no layer {', '.join(map(str, missing))} in a model of {num_layers} layers; "
                f"valid are 0 to {num_layers - 1}"
            )
        wrong = [layer for layer in sorted(rule) if layer in sliding]
        if wrong:
            others = [layer for layer in range(num_layers) if layer not in sliding]
            raise ValueError(
                f"layer {', '.join(map(str, wrong))} has sliding-window attention as published "
                f"and keeps it; exact may be {', '.join(map(str, others)) or 'none'}"
            )
        return tuple(sorted(rule))

    places = [layer for layer in range(num_layers) if layer not in sliding]
    if rule.count > len(places):
        among = f"{len(places)} layers that do not slide" if sliding else f"{num_layers} layers"
        raise ValueError(
            f"cannot place {rule.count} exact layers in a model of {among}; "
            f"count may be 1 to {len(places)}"
        )
    return tuple(places[index] for index in _place(rule, len(places)))


def _place(rule: Placement, num_layers: int) -> tuple[int, ...]:
    count = rule.count
    match rule.rule:
        case "uniform":
            return tuple((2 * i + 1) * num_layers // (2 * count) for i in range(count))
        case "first":
            return tuple(range(count))
        case "last":
            return tuple(range(num_layers - count, num_layers))
        case "random":
            # random() is the one method that Python promises to keep the same for a seed on every
            # version and platform (docs.python.org/3/library/random.html); sample() is not.
            generator = random.Random(rule.seed)
            keys = [generator.random() for _ in range(num_layers)]
            return tuple(sorted(sorted(range(num_layers), key=keys.__getitem__)[:count]))


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
