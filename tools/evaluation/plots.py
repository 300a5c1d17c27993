"""write_plots: needles by context and depth, and the loss by position, as PNG files.

Beside each picture is a file of JSON lines with the numbers that are drawn in it.
"""

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tools.benchmarks.plot import save
from tools.evaluation.outcome import Outcome, is_perplexity, scores
from tools.evaluation.positions import LOSS_BY_POSITION

Models = Mapping[str, Sequence[Outcome]]


@dataclass(frozen=True, kw_only=True)
class NeedlePoint:
    """The score from 0 to 1 of one model at one context and depth, whatever else differs."""

    task: str
    metric: str
    model: str
    context: int
    depth: float
    value: float
    error: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """The loss of one model with `first` to `last` tokens before: nats a token; n windows."""

    model: str
    first: int
    last: int
    loss: float
    error: float | None
    n: int


def check_plots(folder: Path | None) -> None:
    """Raises ValueError unless `write_plots` could write to `folder`; creates nothing."""
    if folder is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib; pip install 'flasheva-zoo[plot]'")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"plots go to a folder, not to the file {folder}")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(f"cannot write to {there}: permission denied")


def write_plots(folder: Path, models: Models) -> list[Path]:
    """Draws what there is to draw.

    Args:
        folder: made if need be.
        models: the outcomes of each model.

    Returns:
        The PNG files: one for each task with contexts and depths, one for the loss by position.
        The numbers are beside them, with the ending .jsonl.

    Raises:
        ValueError: there is neither.
    """
    maps: dict[str, list[NeedlePoint]] = {}
    for point in needle_points(models):
        maps.setdefault(f"{point.task}-{point.metric}", []).append(point)
    losses = loss_points(models)
    if not maps and not losses:
        raise ValueError(
            "there is nothing to plot: no task with contexts and depths, no loss by position"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, points in maps.items():
        path = folder / f"{name.replace('/', '-')}.png"
        write_heat_map(path, points)
        _write_points(path, points)
        written.append(path)
    if losses:
        path = folder / f"{LOSS_BY_POSITION}.png"
        write_loss_plot(path, losses)
        _write_points(path, losses)
        written.append(path)
    return written


def needle_points(models: Models) -> list[NeedlePoint]:
    """Accuracies of tasks whose cells have a context and a depth."""
    points = []
    for model, outcomes in models.items():
        drawn = [
            dataclasses.replace(x, cell={name: x.cell[name] for name in ("context", "depth")})
            for x in outcomes
            if {"context", "depth"} <= x.cell.keys() and x.metric.startswith("acc")
        ]
        for score in scores(drawn):
            points.append(
                NeedlePoint(
                    task=score.task,
                    metric=score.metric,
                    model=model,
                    context=cast("int", score.cell["context"]),
                    depth=cast("float", score.cell["depth"]),
                    value=score.value,
                    error=score.error,
                    n=score.n,
                )
            )
    return points


def loss_points(models: Models) -> list[LossPoint]:
    """The outcomes of "loss_by_position" (positions.py), bin by bin."""
    points = []
    for model, outcomes in models.items():
        of_task = [x for x in outcomes if x.task == LOSS_BY_POSITION and is_perplexity(x.metric)]
        for score in scores(of_task):
            first, _, last = str(score.cell["position"]).partition("-")
            points.append(
                LossPoint(
                    model=model,
                    first=int(first),
                    last=int(last),
                    loss=math.log(score.value),
                    # That of a perplexity is the loss's times the perplexity.
                    error=None if score.error is None else score.error / score.value,
                    n=score.n,
                )
            )
    return points


def write_heat_map(path: Path, points: Sequence[NeedlePoint]) -> None:
    """Draws the scores of one task as a PNG file, context by depth, a panel for each model."""
    from matplotlib.figure import Figure  # without pyplot, which has global state

    models = list(dict.fromkeys(point.model for point in points))
    contexts = sorted({point.context for point in points})
    depths = sorted({point.depth for point in points})
    width = max(1.5 + len(models) * (1.2 + 0.55 * len(contexts)), 4)
    figure = Figure(figsize=(width, max(1.6 + 0.35 * len(depths), 3)), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for ax, model in zip(axes, models, strict=True):
        grid = [[math.nan] * len(contexts) for _ in depths]
        for point in (point for point in points if point.model == model):
            row, column = depths.index(point.depth), contexts.index(point.context)
            grid[row][column] = point.value
            style = {"ha": "center", "va": "center", "fontsize": "x-small"}
            colour = "black" if point.value > 0.5 else "white"
            ax.text(column, row, f"{point.value:.2f}", color=colour, **style)
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        ax.set_xticks(range(len(contexts)), [str(context) for context in contexts], rotation=45)
        ax.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        ax.set_xlabel("context, tokens")
        ax.set_title(model, fontsize="small")
    axes[0].set_ylabel("depth")
    figure.colorbar(image, ax=list(axes), label=points[0].metric)
    figure.suptitle(points[0].task)
    save(figure, path)


def write_loss_plot(path: Path, points: Sequence[LossPoint]) -> None:
    """Draws the loss by position as a PNG file, a line a model; bands are one standard error."""
    from matplotlib.figure import Figure  # without pyplot, which has global state

    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    ax = figure.subplots()
    for model in dict.fromkeys(point.model for point in points):
        line = sorted((p for p in points if p.model == model), key=lambda point: point.first)
        middle = [math.sqrt(point.first * point.last) for point in line]
        (drawn,) = ax.plot(middle, [point.loss for point in line], marker="o", label=model)
        ax.fill_between(
            middle,
            [point.loss - (point.error or 0) for point in line],
            [point.loss + (point.error or 0) for point in line],
            color=drawn.get_color(),
            alpha=0.2,
        )
    ax.set(xlabel="tokens before the predicted one", ylabel="loss, nats a token")
    ax.set_xscale("log", base=2)
    edges = sorted({point.first for point in points})
    ax.set_xticks(edges, [str(edge) for edge in edges])
    ax.grid(visible=True, which="both", alpha=0.2)
    ax.legend(fontsize="small")
    figure.suptitle("Loss by position")
    save(figure, path)


def _write_points(path: Path, points: Sequence[NeedlePoint] | Sequence[LossPoint]) -> None:
    """The numbers of a picture, beside it."""
    lines = [json.dumps(dataclasses.asdict(point), ensure_ascii=False) for point in points]
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
