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

Names and values inside [eva] are checked by `flasheva.EvaConfig`, which needs torch; this
package imports none.
"""

import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

from recipes.placement import Placement, Rule, check_layers, exact_layers, layer_types

Attention = Literal["eva_attention", "window_attention"]
EvaValue = int | float | str | bool

_T = TypeVar("_T")


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
class Recipe:
    """How a pretrained model becomes a hybrid.

    Attributes:
        name: the file's name without ".toml".
        base: the model that is converted.
        eva: fields of `flasheva.EvaConfig`, read-only; what is absent takes its default there.
        layers: which layers stay exact, and what the others are.
        description: one sentence for lists, may be empty.
    """

    name: str
    base: str
    eva: Mapping[str, EvaValue]
    layers: Layers
    description: str = ""

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


class _Table:
    """One table of the file: typed access, with errors that name a key in full."""

    def __init__(self, values: dict[str, object], path: str, known: tuple[str, ...]) -> None:
        self._values = values
        self._path = path
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                where = f" in [{path}]" if path else ""
                raise ValueError(f"unknown key {key!r}{where}; {hint}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, kind: type[_T], what: str, default: _T | None = None) -> _T:
        """The value of `key`; without a default, the key is required."""
        path = f"{self._path}.{key}" if self._path else key
        if key not in self._values:
            if default is None:
                raise ValueError(f"missing key {path!r}, {what}")
            return default
        value = self._values[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{path} must be {what}, not {value!r}")
        return value


def _eva(values: dict[str, object]) -> EvaTable:
    for key, value in values.items():
        if not isinstance(value, EvaValue):
            raise ValueError(f"eva.{key} must be a number, a string or a boolean, not {value!r}")
    return EvaTable(cast(dict[str, EvaValue], values))


def _placement(values: dict[str, object]) -> Placement:
    table = _Table(values, "layers.placement", ("rule", "count", "seed"))
    return Placement(
        rule=cast(Rule, table.get("rule", str, "the name of a rule")),  # checked by Placement
        count=table.get("count", int, "an integer"),
        seed=table.get("seed", int, "an integer") if "seed" in table else None,
    )


def _layers(values: dict[str, object]) -> Layers:
    table = _Table(values, "layers", ("exact", "placement", "attention"))
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


def _parse(text: str, name: str, source: str) -> Recipe:
    try:
        table = _Table(tomllib.loads(text), "", ("base", "description", "eva", "layers"))
        return Recipe(
            name=name,
            base=table.get("base", str, "the name of a model"),
            description=table.get("description", str, "a string", ""),
            eva=_eva(table.get("eva", dict, "a table", {})),
            layers=_layers(table.get("layers", dict, "a table")),
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
