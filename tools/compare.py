"""`zoo compare`: which differences between models are more than noise?"""

import dataclasses
import json as json_text
import logging
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.display import print_json, print_table
from tools.entry import run_command
from tools.options import Json

if TYPE_CHECKING:
    from tools.evaluation.compare import Comparison
    from tools.evaluation.outcome import Outcome
    from tools.evaluation.outcome_files import Outcomes

log = logging.getLogger("zoo")


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Written by `zoo evaluate --samples`; .xz is read, too."
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Compare these, the first of them with each other one; may be repeated.",
            show_default="all in the files",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="Only this, such as accuracy; may be repeated.",
            show_default="all",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="PART,PART",
            help="Parts of a cell to report by, such as context,depth; none: one row a task.",
            show_default="all",
        ),
    ] = None,
    relative: Annotated[
        bool,
        typer.Option(
            "--relative",
            help="Instead: which part of the first model's accuracy each one has, a mean over the "
            "recall tasks without what is void.",
        ),
    ] = False,
    beyond: Annotated[
        int, typer.Option(metavar="TOKENS", help="With --relative: of longer prompts only.")
    ] = 0,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    json: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Draw needles by context and depth, and the loss by position; numbers beside.",
            show_default="no plots",
        ),
    ] = None,
) -> None:
    """Compares models item by item, each with the first.

    Intervals hold 95 % of paired bootstrap resamples of the items that both models have. A
    difference whose interval holds 0 is noise. Intervals are not corrected for their number: one
    in twenty that are noise will not say so. A cell of a recall task is void where a model with
    full attention among those of the files scores below 0.5.
    """
    from tools.evaluation.compare import compare_models
    from tools.evaluation.outcome_files import read_outcomes
    from tools.evaluation.plots import check_plots, write_plots

    if beyond and not relative:
        raise ValueError("--beyond is for --relative; --by context reports every length")
    if relative and (by or metric or plot):
        raise ValueError("--relative is one number a model: leave out --by, --metric and --plot")
    check_plots(plot)
    read = read_outcomes(files)
    models = _chosen(read.models, model)
    if relative:
        _print_relative(read, models, beyond, resamples, seed, json=json)
        return
    if plot is None and len(models) < min(2, len(read.models)):
        others = ", ".join(name for name in read.models if name not in models)
        raise ValueError(f"a comparison needs two models; give --model for another one: {others}")
    if plot is None or len(models) > 1:
        rows = compare_models(
            models, by=_parts(by), metrics=metric or None, resamples=resamples, seed=seed
        )
        base = next(iter(models))
        void = _void(read, _parts(by))
        # Models of full attention alone are judged by nothing but themselves.
        exempt = read.full if base in read.full else frozenset[str]()
        voids = [row.model not in exempt and _in_cells(row, void) for row in rows]
        if json:
            for row, is_void in zip(rows, voids, strict=True):
                fields = {"base": base, **dataclasses.asdict(row), "noise": row.noise}
                fields |= {"few": row.few, "void": is_void}
                print_json(fields | {"resamples": resamples, "seed": seed})
        else:
            _print_rows(base, rows, voids)
        _warn(base, rows, {name: _items(outcomes, metric) for name, outcomes in models.items()})
    if plot is not None:
        for path in write_plots(plot, models):
            print(path, file=sys.stderr if json else sys.stdout)


def _void(read: "Outcomes", by: Sequence[str] | None) -> Set[tuple[str, str]]:
    """Judged by the first model with full attention, also where it is not compared."""
    from tools.evaluation.void import void_cells

    full = next((name for name in read.models if name in read.full), None)
    return set() if full is None else void_cells(read.models[full], by)


def _print_relative(
    read: "Outcomes",
    models: Mapping[str, Sequence["Outcome"]],
    beyond: int,
    resamples: int,
    seed: int,
    *,
    json: bool,
) -> None:
    from tools.evaluation.relative import relative_accuracy

    void = _void(read, ["context"])
    rows = relative_accuracy(models, void, beyond=beyond, resamples=resamples, seed=seed)
    base = next(iter(models))
    if json:
        for row in rows:
            fields = {"base": base, **dataclasses.asdict(row), "beyond": beyond}
            print_json(fields | {"resamples": resamples, "seed": seed})
        return
    print_table(
        ["model", "tasks", "n", "of the base", "95 %"],
        [
            [
                *(row.model, str(len(row.tasks)), str(row.n), f"{row.value:.1%}"),
                f"{row.low:.1%} to {row.high:.1%}",
            ]
            for row in rows
        ],
    )
    tasks = ", ".join(dict.fromkeys(task for row in rows for task in row.tasks))
    print(f"base: {base}; tasks: {tasks}")


def _chosen(
    models: Mapping[str, Sequence["Outcome"]], names: Sequence[str] | None
) -> Mapping[str, Sequence["Outcome"]]:
    for name in names or ():
        if name not in models:
            raise ValueError(f"no model {name!r} in the files; there: {', '.join(models)}")
    return models if not names else {name: models[name] for name in names}


def _parts(by: str | None) -> list[str] | None:
    if by is None:
        return None
    parts = [part.strip() for part in by.split(",") if part.strip()]
    if not parts:
        raise ValueError("--by names no part of a cell, such as context; none pools a task")
    return [] if parts == ["none"] else parts


def _in_cells(row: "Comparison", cells: Set[tuple[str, str]]) -> bool:
    from tools.evaluation.record import cell_text

    return row.metric == "accuracy" and (row.task, cell_text(row.cell)) in cells


def _print_rows(base: str, rows: Sequence["Comparison"], voids: Sequence[bool]) -> None:
    print_table(
        ["task", "cell", "metric", "n", "base", "model", "score", "difference", "95 %", ""],
        [
            [
                row.task,
                ", ".join(f"{name} {value}" for name, value in row.cell.items()),
                row.metric,
                str(row.n),
                f"{row.base_score:.3f}",
                row.model,
                f"{row.score:.3f}",
                f"{row.difference:+.3f}",
                "" if row.low is None else f"{row.low:+.3f} to {row.high:+.3f}",
                "void" if void else _verdict(row),
            ]
            for row, void in zip(rows, voids, strict=True)
        ],
    )
    counted = [row for row, void in zip(rows, voids, strict=True) if not void]
    clear = sum(not row.noise for row in counted)
    print(f"base: {base}")
    print(
        f"{clear} of {len(counted)} differences are more than noise; if all were noise, "
        f"some {len(counted) / 20:.1f} would look so"
    )
    if len(counted) < len(rows):
        print(f"{len(rows) - len(counted)} more are void: full attention scores below 0.5 there")


def _verdict(row: "Comparison") -> str:
    if row.noise:
        return "noise"
    return "higher" if row.difference > 0 else "lower"


def _warn(
    base: str, rows: Sequence["Comparison"], items: Mapping[str, Mapping[str, set[str]]]
) -> None:
    """Says what the table does not rest on."""
    few = [row for row in rows if row.few]
    if few:
        log.warning(
            "%d of %d rows have few items (as few as %d): their intervals are too narrow",
            *(len(few), len(rows), min(row.n for row in few)),
        )
    for name, theirs in items.items():
        for task in dict.fromkeys([*items[base], *theirs]):
            left = items[base].get(task, set()) ^ theirs.get(task, set())
            if left:
                ours = len(left & items[base].get(task, set()))
                log.warning(
                    "%s: %d outcomes of %s and %d of %s have no pair and are left out",
                    *(task, ours, base, len(left) - ours, name),
                )


def _items(outcomes: Sequence["Outcome"], metrics: Sequence[str] | None) -> dict[str, set[str]]:
    """By task, what is paired."""
    found: dict[str, set[str]] = {}
    for x in outcomes:
        if not metrics or x.metric in metrics:
            key = json_text.dumps([x.cell, x.item, x.metric], sort_keys=True)
            found.setdefault(x.task, set()).add(key)
    return found


if __name__ == "__main__":
    sys.exit(run_command(compare, "compare"))
