"""write_recipe: a recipe as the TOML file that `read_recipe` reads."""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from recipes.placement import Placement
from recipes.schema import Recipe, Search
from recipes.stages import stage_values

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def recipe_text(recipe: Recipe) -> str:
    """The recipe as TOML; `parse_recipe` gives it back, but for its name."""
    lines = [f"base = {_value(recipe.base)}"]
    if recipe.description:
        lines.append(f"description = {_value(recipe.description)}")
    if recipe.eva:
        lines += ["", "[eva]", *_lines(recipe.eva)]
    lines += ["", "[layers]"]
    if isinstance(recipe.layers.exact, Placement):
        rule = {k: v for k, v in vars(recipe.layers.exact).items() if v is not None}
        lines.append(f"placement = {_value(rule)}")
    else:
        lines.append(f"exact = {_value(recipe.layers.exact)}")
    lines.append(f"attention = {_value(recipe.layers.attention)}")
    if recipe.search is not None:
        given = {x.name: getattr(recipe.search, x.name) for x in dataclasses.fields(recipe.search)}
        absent = vars(Search(rule=recipe.search.rule))
        filled = {k: v for k, v in given.items() if k == "rule" or v != absent[k]}
        lines += ["", "[search]", *_lines(filled)]
    for stage in recipe.stages:
        lines += ["", "[[stages]]", *_lines(stage_values(stage))]
    return "\n".join(lines) + "\n"


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe; a file that is there is replaced as a whole, or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(recipe_text(recipe))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _lines(values: Mapping[str, object]) -> Iterator[str]:
    return (f"{_key(key)} = {_value(value)}" for key, value in values.items())


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _value(key)


def _value(value: object) -> str:
    """A value as TOML, whose strings are those of JSON, but for one character."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_lines(value))} }}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
