"""The schema of a recipe: what is converted, with which attention, and which layers stay exact.

`find_recipe(name)` reads a recipe that ships with this package (`names()` lists them),
`read_recipe(path)` one of a user's, `parse_recipe(text, name=...)` one in memory. The format:

    base = "smollm2-135m-instruct"        # what is converted: a name that zoo.load takes
    description = "..."                   # optional
    [eva]                                 # optional: fields of flasheva.EvaConfig
    window_size = 256
    [layers]
    exact = [7, 18, 23]                   # the layers that keep full attention, may be []; or
    # placement = { rule = "uniform", count = 5 }
    attention = "eva_attention"           # of the other layers; or "window_attention"
    [search]                              # optional: how `exact` was found; `zoo place` writes it
    rule = "greedy_retrieval"
    order = [18, 7, 23]                   # the layers as they were taken
    [[stages]]                            # optional: how it is fine-tuned, see recipes/stages.py
    name = "distill"

Names and values inside [eva] are checked by `flasheva.EvaConfig`, which needs torch; this
package imports none.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, cast, get_args

from recipes.placement import (
    SEARCHED,
    Placement,
    Rule,
    check_layers,
    exact_layers,
    layer_types,
)
from recipes.stages import Stage, read_stages
from recipes.tables import Table

Attention = Literal["eva_attention", "window_attention"]
EvaValue = int | float | str | bool


class EvaTable(Mapping[str, EvaValue]):
    """The [eva] table, read-only (and, unlike types.MappingProxyType, it can be pickled)."""

    def __init__(self, values: Mapping[str, EvaValue]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> EvaValue:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"EvaTable({self._values!r})"


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Which layers are exact, and what the others are.

    Attributes:
        exact: the layers that keep full attention, or the rule that places them.
        attention: the type of all other layers, as in a model's `layer_types`.

    Raises:
        ValueError: negative or repeated layers, an unknown attention.
    """

    exact: tuple[int, ...] | Placement
    attention: Attention = "eva_attention"

    def __post_init__(self) -> None:
        if not isinstance(self.exact, Placement):
            check_layers(self.exact)
        if self.attention not in get_args(Attention):
            choices = ", ".join(repr(choice) for choice in get_args(Attention))
            raise ValueError(f"attention must be one of {choices}, not {self.attention!r}")


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a list of exact layers was found. It changes nothing about the model.

    Attributes:
        rule: one of `recipes.placement.SEARCHED`.
        order: the layers as they were taken, the first one first.
        score: of the layers together, higher is better; None where it was not computed.
        score_none, score_all: of no exact layer and of all of them, or None.
        items: prompts or windows that the score is a mean over; 0 where nobody says.
        searched_on: what these were, a line each.
        command: what searched, as one would type it.

    Raises:
        ValueError: an unknown rule, negative or repeated layers.
    """

    rule: str
    order: tuple[int, ...] = ()
    score: float | None = None
    score_none: float | None = None
    score_all: float | None = None
    items: int = 0
    searched_on: tuple[str, ...] = ()
    command: str = ""

    def __post_init__(self) -> None:
        if self.rule not in SEARCHED:
            near = difflib.get_close_matches(self.rule, SEARCHED, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SEARCHED)}"
            raise ValueError(f"search.rule must be a searched rule, not {self.rule!r}; {hint}")
        check_layers(self.order)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a pretrained model becomes a hybrid.

    Attributes:
        name: the file's name without ".toml".
        base: the model that is converted.
        eva: fields of `flasheva.EvaConfig`, read-only; what is absent takes its default there.
        layers: which layers stay exact, and what the others are.
        description: one sentence for lists, may be empty.
        search: how the exact layers were found, or None.
        stages: how the model is fine-tuned, in this order. They change nothing about the model.

    Raises:
        ValueError: `search` found other layers than those listed, or two stages have one name.
    """

    name: str
    base: str
    eva: Mapping[str, EvaValue]
    layers: Layers
    description: str = ""
    search: Search | None = None
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        named = [stage.name for stage in self.stages]
        for name in named:
            if named.count(name) > 1:
                raise ValueError(f"{named.count(name)} stages have the name {name!r}")
        if self.search is None or not self.search.order:
            return
        exact = self.layers.exact
        if isinstance(exact, Placement) or sorted(self.search.order) != sorted(exact):
            raise ValueError(
                f"search.order {list(self.search.order)} has other layers than layers.exact; a "
                "placement that was changed by hand has no [search]"
            )

    def layer_types(self, num_layers: int, sliding: Collection[int] = ()) -> tuple[str, ...]:
        """The type of each layer: "full_attention" where exact, `layers.attention` elsewhere.

        Layers that are `sliding` in the published model stay so.

        Raises:
            ValueError: the recipe does not fit a model of `num_layers` layers.
        """
        try:
            exact = exact_layers(self.layers.exact, num_layers, sliding)
        except ValueError as error:
            raise ValueError(f"recipe {self.name!r}: {error}") from None
        return layer_types(exact, num_layers, self.layers.attention, sliding)


def eva_table(values: dict[str, object]) -> EvaTable:
    """An [eva] table, whose names and values `flasheva.EvaConfig` checks.

    Raises:
        ValueError: a value of a kind that none of them is.
    """
    for key, value in values.items():
        if not isinstance(value, EvaValue):
            raise ValueError(f"eva.{key} must be a number, a string or a boolean, not {value!r}")
    return EvaTable(cast(dict[str, EvaValue], values))


def _placement(values: dict[str, object]) -> Placement:
    table = Table(values, "layers.placement", ("rule", "count", "seed"))
    return Placement(
        rule=cast(Rule, table.get("rule", str, "the name of a rule")),  # checked by Placement
        count=table.get("count", int, "an integer"),
        seed=table.get("seed", int, "an integer") if "seed" in table else None,
    )


def _layers(values: dict[str, object]) -> Layers:
    table = Table(values, "layers", ("exact", "placement", "attention"))
    if ("exact" in table) == ("placement" in table):
        raise ValueError(
            f"[layers] has {'both' if 'exact' in table else 'neither'} of 'exact' and "
            "'placement'; give one of them, such as exact = [7, 18, 23]"
        )
    exact: tuple[int, ...] | Placement
    if "exact" in table:
        exact = tuple(table.get("exact", list, "an array of integers"))  # checked by Layers
    else:
        exact = _placement(table.get("placement", dict, "a table"))
    attention = table.get("attention", str, "a string", "eva_attention")
    return Layers(exact=exact, attention=cast(Attention, attention))  # checked by Layers


def _search(values: dict[str, object]) -> Search:
    known = tuple(field.name for field in dataclasses.fields(Search))
    table = Table(values, "search", known)

    def score(key: str) -> float | None:
        return float(table.get(key, (int, float), "a number")) if key in table else None

    return Search(
        rule=table.get("rule", str, "the name of a rule"),
        order=tuple(table.get("order", list, "an array of integers", [])),  # checked by Search
        score=score("score"),
        score_none=score("score_none"),
        score_all=score("score_all"),
        items=table.get("items", int, "an integer", 0),
        searched_on=table.strings("searched_on"),
        command=table.get("command", str, "a string", ""),
    )


def _parse(text: str, name: str, source: str) -> Recipe:
    try:
        known = ("base", "description", "eva", "layers", "search", "stages")
        table = Table(tomllib.loads(text), "", known)
        return Recipe(
            name=name,
            base=table.get("base", str, "the name of a model"),
            description=table.get("description", str, "a string", ""),
            eva=eva_table(table.get("eva", dict, "a table", {})),
            layers=_layers(table.get("layers", dict, "a table")),
            search=_search(table.get("search", dict, "a table")) if "search" in table else None,
            stages=read_stages(table.get("stages", list, "tables under [[stages]]", [])),
        )
    except ValueError as error:  # also of tomllib
        raise ValueError(f"{source}: {error}") from None


def parse_recipe(text: str, *, name: str) -> Recipe:
    """Parses the text of a recipe.

    Raises:
        ValueError: in one line, the first mistake and where it is.
    """
    return _parse(text, name, f"recipe {name!r}")


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file; its name is the file's without ".toml".

    Raises:
        ValueError: in one line, the path and what is wrong: no such file, not UTF-8, not TOML, an
            unknown key (the nearest known one is named), a wrong type or value.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"cannot read recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (at byte {error.start})") from None
    return _parse(text, path.stem, str(path))


def names() -> tuple[str, ...]:
    """The names of the shipped recipes, sorted."""
    files = (file.name for file in resources.files("recipes").iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def find_recipe(name: str) -> Recipe | None:
    """The shipped recipe of that name, or None."""
    if name not in names():  # so that a name such as "../x" opens nothing
        return None
    file = resources.files("recipes") / f"{name}.toml"
    return _parse(file.read_text(encoding="utf-8"), name, f"recipes/{name}.toml")
