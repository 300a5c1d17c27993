"""`zoo curves`: what `zoo finetune` recorded step by step, of several runs in one picture."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tools.entry import run_command

_COLUMNS = ("stage", "step", "tokens")


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The mean of a metric over some steps of a run.

    Attributes:
        run: see `run_name`.
        stage: of the recipe.
        tokens: that the stage has trained on at the last of these steps.
        value: the mean.
        n: how many steps.
    """

    run: str
    stage: str
    tokens: int
    value: float
    n: int


def curves(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="metrics.jsonl of runs; .xz, .gz and .zst are read, too."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Numbers are put beside it.")],
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="Such as logit_kl, grad_norm or perplexity.")
    ] = "loss",
    stage: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the recipe.", show_default="each run's last"),
    ] = None,
    mean: Annotated[int, typer.Option(help="Steps that are one point.")] = 1,
    log: Annotated[bool, typer.Option("--log", help="Draw the metric logarithmically.")] = False,
) -> None:
    """Draws a metric of a stage against the tokens trained on; needs matplotlib."""
    from tools.benchmarks.plot import check_plot
    from zoo.weights.atomic import write_text

    check_plot(out)
    numbers = out.with_suffix(".jsonl")
    # Also of a run that is not drawn: its own file has this name.
    if numbers.name == "metrics.jsonl" or numbers.resolve() in [path.resolve() for path in files]:
        raise ValueError(
            f"the numbers beside {out} would replace {numbers}, what a run recorded; give --out "
            "another name"
        )
    if mean < 1:
        raise ValueError(f"mean must be at least 1, not {mean}")
    by_run: dict[str, Path] = {}
    for path in files:
        other = by_run.setdefault(run_name(path), path)
        if other is not path:
            raise ValueError(
                f"{other} and {path} would both be called {run_name(path)!r} in the picture; "
                "rename one of them"
            )
    points = [point for path in files for point in curve(path, metric, stage, mean)]
    write_curves(out, points, metric, log=log)
    write_text(numbers, "".join(json.dumps(dataclasses.asdict(point)) + "\n" for point in points))


def run_name(path: Path) -> str:
    """What a run is called: its folder's name, or that of a file that is not metrics.jsonl."""
    name = path.name.partition(".")[0]
    return path.absolute().parent.name if name == "metrics" else name


def curve(path: Path, metric: str, stage: str | None, mean: int) -> list[CurvePoint]:
    """The points of one run, in its order; the last may be of fewer steps.

    Args:
        path: a file that `zoo finetune` wrote.
        metric: steps without it count as none.
        stage: None: the last one that the file has.
        mean: steps that are one point.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or has no such stage or metric.
    """
    rows = _rows(path)
    named = stage or str(rows[-1]["stage"])
    of_stage = [row for row in rows if row["stage"] == named]
    if not of_stage:
        stages = ", ".join(dict.fromkeys(str(row["stage"]) for row in rows))
        raise ValueError(f"{path} has no stage {named!r}; its stages are {stages}")
    found = [row for row in of_stage if _is_number(row.get(metric))]
    if not found:
        names = dict.fromkeys(name for row in of_stage for name in row if name not in _COLUMNS)
        raise ValueError(f"{path} has no {metric!r} in stage {named!r}, but {', '.join(names)}")
    points = []
    for first in range(0, len(found), mean):
        part = found[first : first + mean]
        points.append(
            CurvePoint(
                run=run_name(path),
                stage=named,
                tokens=int(part[-1]["tokens"]),
                value=sum(float(row[metric]) for row in part) / len(part),
                n=len(part),
            )
        )
    return points


def write_curves(path: Path, points: Sequence[CurvePoint], metric: str, *, log: bool) -> None:
    """Draws a PNG file, a line a run; `log`: with a logarithmic axis for the metric."""
    from matplotlib.figure import Figure  # without pyplot, which has global state

    from tools.benchmarks.plot import save

    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    for number, run in enumerate(dict.fromkeys(point.run for point in points)):
        line = [point for point in points if point.run == run]
        # After ten of them colours come again.
        dashes = ("-", "--", ":")[number // 10 % 3]
        ax.plot([p.tokens / 1e6 for p in line], [p.value for p in line], dashes, label=run)
    ax.set(xlabel="millions of tokens", ylabel=metric)
    if log:
        ax.set_yscale("log")
    ax.grid(visible=True, which="both", alpha=0.2)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.suptitle(", ".join(dict.fromkeys(point.stage for point in points)))
    save(figure, path)


def _rows(path: Path) -> list[dict[str, float | str]]:
    """The lines of a file of metrics; one that a kill has cut is none."""
    from tools.text_files import read_lines

    rows = []
    for line in read_lines(path).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(row, dict)
            and isinstance(row.get("stage"), str)
            and _is_number(row.get("step"))
            and _is_number(row.get("tokens"))
        ):
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no metrics of `zoo finetune`")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    raise SystemExit(run_command(curves, "curves"))
