"""print_summaries, write_sweep_plots: what a sweep has found, as a table and as pictures.

Both read the rows of results and nothing else. Beside each picture is a file of JSON lines with
the numbers that are drawn in it.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

from tools.benchmarks.plot import save
from tools.display import print_table
from tools.placement.summary import Summary, Value, summaries

_Row = Mapping[str, object]
_REFERENCES = ("none", "all")
# So many layers each have their number below a bar; of more, numbers would touch.
_NAMED = 12


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What one exact layer adds to a score."""

    objective: str
    layer: int
    value: float


def print_summaries(found: Sequence[Summary]) -> None:
    """One row for each placement; * where none is better in everything."""
    rows = [
        [
            "*" if x.best else "",
            x.name,
            str(x.count),
            x.layers,
            "" if x.window is None else f"{x.window}/{x.chunk}",
            _shown(x.perplexity, 2),
            _shown(x.retrieval, 3),
            "" if x.of_full is None else f"{x.of_full:.3f} ({x.cells})",
            "" if x.cache_bytes is None else f"{x.cache_bytes / 2**20:.2f} MiB",
            "" if x.tokens_per_second is None else f"{x.tokens_per_second:,.0f}",
        ]
        for x in found
    ]
    names = ["", "rule", "exact", "layers", "window/chunk", "perplexity", "retrieval, ± 95 %"]
    print_table([*names, "of full (cells)", "cache of a row", "tokens/s"], rows)


def write_sweep_plots(folder: Path, rows: Iterable[_Row]) -> list[Path]:
    """Draws what there is to draw.

    Args:
        folder: made if need be.
        rows: from `placement_rows`.

    Returns:
        The PNG files: retrieval.png against the number of exact layers, by rule; importance.png
        of each layer by itself; windows.png over window and chunk sizes. Numbers lie beside them.

    Raises:
        ValueError: there is no row of a placement.
    """
    kept = list(rows)
    found = [x for x in summaries(kept) if x.retrieval is not None]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    sizes = dict.fromkeys((x.window, x.chunk) for x in found if x.window is not None)
    first = next(iter(sizes), None)
    line = [x for x in found if x.window is None or (x.window, x.chunk) == first]
    if any(x.rule not in _REFERENCES for x in line):
        written.append(folder / "retrieval.png")
        _draw_retrieval(written[-1], line)
        _write_points(written[-1], line)
    single = _importance(kept)
    if single:
        written.append(folder / "importance.png")
        _draw_importance(written[-1], summaries(kept)[0].model, single)
        _write_points(written[-1], single)
    chosen = _map_of(found)
    if len(sizes) > 1 and chosen:
        written.append(folder / "windows.png")
        _draw_windows(written[-1], chosen)
        _write_points(written[-1], chosen)
    return written


def _draw_retrieval(path: Path, found: Sequence[Summary]) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot, which has global state

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    ax = figure.subplots()
    lines = {rule: _by_count(found, rule) for rule in dict.fromkeys(x.rule for x in found)}
    rules = [rule for rule in lines if rule not in _REFERENCES]
    # As the lines end, from top to bottom; beside each other, for rules that find the same layers.
    rules.sort(key=lambda rule: -lines[rule][max(lines[rule])][1])
    every = sorted({count for rule in rules for count in lines[rule]})
    apart = 0.6 * min((b - a for a, b in pairwise(every)), default=1) / len(rules)
    for number, rule in enumerate(rules):
        counts = sorted(lines[rule])
        low, means, high = zip(*(lines[rule][count] for count in counts), strict=True)
        beside = apart * (number - (len(rules) - 1) / 2)
        ax.errorbar(
            *([count + beside for count in counts], means),
            yerr=[
                [mean - end for mean, end in zip(means, low, strict=True)],
                [end - mean for mean, end in zip(means, high, strict=True)],
            ],
            color=colormaps["tab20"](number % 20),
            marker="osD^v"[number % 5],
            markersize=4,
            capsize=2,
            linewidth=1,
            label=rule,
        )
    for x in found:
        if x.rule in _REFERENCES:
            style = {"none": ":", "all": "--"}[x.rule]
            label = {"none": "no exact layer", "all": "full attention"}[x.rule]
            ax.axhline(_value(x.retrieval), color="black", linestyle=style, label=label)
    ax.set(xlabel="exact layers", ylabel="retrieval, judge half", ylim=(-0.02, 1.02))
    ax.set_xticks(every)
    ax.grid(visible=True, axis="y", alpha=0.2)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    sizes = (f", window {x.window}, chunks of {x.chunk}" for x in found if x.window is not None)
    figure.suptitle(found[0].model + next(sizes, ""))
    save(figure, path)


def _by_count(found: Sequence[Summary], rule: str) -> dict[int, tuple[float, float, float]]:
    """By number of exact layers: the lowest end of an interval, the mean, the highest end."""
    points: dict[int, list[Summary]] = {}
    for x in found:
        if x.rule == rule:
            points.setdefault(x.count, []).append(x)
    return {
        # Of several seeds their own intervals say less than what lies between them.
        count: (
            min(_value(x.retrieval) - _half(x.retrieval) for x in group),
            _mean([_value(x.retrieval) for x in group]),
            max(_value(x.retrieval) + _half(x.retrieval) for x in group),
        )
        for count, group in points.items()
    }


def _draw_importance(path: Path, model: str, single: Sequence[Importance]) -> None:
    from matplotlib.figure import Figure

    objectives = list(dict.fromkeys(x.objective for x in single))
    figure = Figure(figsize=(7.5, 1 + 2 * len(objectives)), layout="constrained")
    axes = figure.subplots(len(objectives), 1, squeeze=False, sharex=True)[:, 0]
    for ax, objective in zip(axes, objectives, strict=True):
        chosen = [x for x in single if x.objective == objective]
        ax.bar([x.layer for x in chosen], [x.value for x in chosen])
        unit = "" if objective == "both" else ", nats"
        ax.set_ylabel(f"{objective}{unit}", fontsize="small")
        ax.grid(visible=True, axis="y", alpha=0.2)
    layers = sorted({x.layer for x in single})
    if len(layers) <= _NAMED:
        axes[-1].set_xticks(layers)
    axes[-1].set_xlabel("the one exact layer")
    figure.suptitle(f"{model}: what one exact layer adds to the score")
    save(figure, path)


def _draw_windows(path: Path, found: Sequence[Summary]) -> None:
    from matplotlib.figure import Figure

    windows = sorted({cast("int", x.window) for x in found})
    chunks = sorted({cast("int", x.chunk) for x in found})
    counts = sorted({x.count for x in found})
    drawn = {"retrieval": "Greens"}
    if all(x.perplexity is not None for x in found):
        drawn["perplexity"] = "Greens_r"
    size = (1 + 4 * len(drawn), 1 + 2.5 * len(counts))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(counts), len(drawn), squeeze=False)
    for count, axes in zip(counts, grid, strict=True):
        for ax, (metric, colours) in zip(axes, drawn.items(), strict=True):
            values = [[float("nan")] * len(windows) for _ in chunks]
            for x in found:
                if x.count == count:
                    row = chunks.index(cast("int", x.chunk))
                    column = windows.index(cast("int", x.window))
                    values[row][column] = value = _value(getattr(x, metric))
                    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7}
                    ax.text(column, row, f"{value:.2f}", ha="center", va="center", bbox=box)
            ax.imshow(values, aspect="auto", cmap=colours)
            ax.set_xticks(range(len(windows)), [str(x) for x in windows])
            ax.set_yticks(range(len(chunks)), [str(x) for x in chunks])
            title = f"{metric}, exact layers: {count}"
            ax.set(xlabel="window, tokens", ylabel="chunk, tokens", title=title)
    figure.suptitle(f"{found[0].model}, {found[0].name} (darker is better)")
    save(figure, path)


def _map_of(found: Sequence[Summary]) -> list[Summary]:
    """The placements of the rule that has most pairs of sizes and numbers of layers.

    Where all layers are exact there are no sizes.
    """
    groups: dict[tuple[str, int | None], list[Summary]] = {}
    for x in found:
        if x.rule not in _REFERENCES and x.window is not None:
            groups.setdefault((x.rule, x.seed), []).append(x)
    return max(groups.values(), key=len, default=[])


def _importance(rows: Iterable[_Row]) -> list[Importance]:
    found = {}
    for row in rows:
        if row["metric"] == "importance":
            case = cast("Mapping[str, object]", row["case"])
            single = Importance(
                objective=str(case["objective"]),
                layer=cast("int", case["layer"]),
                value=cast("float", row["value"]),
            )
            found[single.objective, single.layer] = single
    return list(found.values())


def _write_points(path: Path, points: Sequence[Summary] | Sequence[Importance]) -> None:
    """The numbers of a picture, beside it."""
    lines = [json.dumps(dataclasses.asdict(point), ensure_ascii=False) for point in points]
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _shown(value: Value | None, digits: int) -> str:
    if value is None:
        return ""
    half = "" if value.half is None else f" ± {value.half:.{digits}f}"
    return f"{value.value:.{digits}f}{half}"


def _value(value: Value | None) -> float:
    assert value is not None
    return value.value


def _half(value: Value | None) -> float:
    return 0.0 if value is None or value.half is None else value.half


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
