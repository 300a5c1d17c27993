"""`zoo list`: the registered names."""

import fnmatch
import sys
from typing import Annotated, NamedTuple

import typer

from tools.display import print_json, print_table
from tools.entry import run_command
from tools.options import Json, with_options


class Size(NamedTuple):
    """Of a published model, before any layer is converted."""

    layers: int
    parameters: int


# By preset. A test counts them on the models themselves; they are written down here because
# that takes seconds, which a list must not.
SIZES = {
    "tiny": Size(8, 6_951_168),
    "pythia-70m": Size(6, 70_426_624),
    "pythia-160m": Size(12, 162_322_944),
    "pythia-410m": Size(24, 405_334_016),
    "pythia-1b": Size(16, 1_011_781_632),
    "pythia-1.4b": Size(24, 1_414_647_808),
    "pythia-2.8b": Size(32, 2_775_208_960),
    "pythia-6.9b": Size(32, 6_857_302_016),
    "pythia-12b": Size(36, 11_846_072_320),
    "smollm2-135m": Size(30, 134_515_008),
    "smollm2-360m": Size(32, 361_821_120),
    "smollm2-1.7b": Size(24, 1_711_376_384),
    "tinyllama-1.1b": Size(22, 1_100_048_384),
    "llama-3.2-1b": Size(16, 1_235_814_400),
    "llama-3.2-3b": Size(28, 3_212_749_824),
    "phi-1.5": Size(24, 1_418_270_720),
    "gemma3-270m": Size(18, 268_098_176),
}


@with_options
def list_models(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN", help="Part of the name, or a pattern such as 'pythia-*-hybrid'."
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Lists the models that have a name here.

    NAME is a model as published, NAME-eva has EVA attention in every layer, NAME-eva-hybrid keeps
    full attention in some. Parameters are those of the published model. Weights are as published,
    trained in this package, or, of a conversion, untrained: those of the published model, with
    EVA's own parameters at their initial values.
    """
    from zoo.registry import BASES, is_embedded, list_names, split_name

    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = [name for name in list_names() if fnmatch.fnmatchcase(name, glob.lower())]
    if not names:
        raise ValueError(f"no registered name matches {pattern!r}; `zoo list` shows all of them")
    rows = []
    for name in names:
        found = split_name(name)
        assert found is not None
        base = BASES[found[0]]
        size = SIZES[base.preset]
        weights = "published" if found[1] == "" else "untrained"
        weights = "trained" if is_embedded(name) else weights
        rows.append((name, base.family, size.layers, size.parameters, weights, base.repo))
    columns = ("name", "family", "layers", "parameters", "weights", "repository")
    if json:
        for row in rows:
            print_json(dict(zip(columns, row, strict=True)))
    else:
        shown = [(*row[:2], str(row[2]), f"{row[3] / 1e6:,.1f} M", *row[4:]) for row in rows]
        print_table(columns, shown)


if __name__ == "__main__":
    sys.exit(run_command(list_models, "list"))
