"""write_plot: time against the number of tokens, both logarithmic, one line for each kernel.

Shapes differ in batch and heads, so what is drawn is the time of one head of one row.
"""

import importlib.util
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from tools.results import check_appendable

_MARKERS = "osD^v*"


class Point(NamedTuple):
    """One measured time.

    Attributes:
        panel: the pass.
        label: implementation, then window and whatever else tells lines apart.
        D, T: head dim and tokens.
        us: microseconds for one head of one row.
        spread: of `us`.
    """

    panel: str
    label: str
    D: int
    T: int
    us: float
    spread: float

    @property
    def impl(self) -> str:
        return self.label.split()[0]


def check_plot(path: Path | None) -> None:
    """Raises ValueError or OSError unless `write_plot` could write to `path`."""
    if path is None:
        return
    if path.suffix != ".png":
        raise ValueError(f"a plot is a .png file, not {path}")
    check_appendable(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib; pip install 'flasheva-zoo[plot]'")


def read_rows(path: Path) -> list[Mapping[str, object]]:
    """The rows of a JSON lines file that `append_result` wrote.

    Raises:
        ValueError: a line is not one.
    """
    rows: list[Mapping[str, object]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not {"bench", "case", "metric", "device"} <= row.keys():
            raise ValueError(f"line {number} of {path} is no row of results")
        rows.append(row)
    return rows


def points(rows: Iterable[Mapping[str, object]]) -> list[Point]:
    """The times of kernels in rows of results; of two of the same measurement, the last.

    Raises:
        ValueError: there are none, or they come from more than one device.
    """
    times = [row for row in rows if (row["bench"], row["metric"]) == ("kernels", "time")]
    devices = {str(row["device"]) for row in times}
    if len(devices) != 1:
        names = ", ".join(sorted(devices)) or "none"
        raise ValueError(f"a plot needs times of kernels on one device; here: {names}")
    graphs = any(_case(row).get("cuda_graph") for row in times)
    found = [_point(row, graphs) for row in times]
    return sorted({point[:4]: point for point in found}.values())


def _case(row: Mapping[str, object]) -> Mapping[str, int | str | None]:
    return cast("Mapping[str, int | str | None]", row["case"])


def _point(row: Mapping[str, object], graphs: bool) -> Point:
    """What is drawn of a row; `graphs`: whether eager calls are the exception in the picture."""
    case = _case(row)
    B, H, G, T, D = (cast("int", case[dim]) for dim in "BHGTD")
    label = [str(row["impl"])]
    if case["window"] is not None:
        label.append(f"{case['window']} {case['W']}/{case['P']}")
    label += ["no sinks"] if case["S"] == 0 else []
    label += [f"G = H / {H // G}"] if G != H else []
    label += ["bias"] if case.get("bias") else []
    label += [str(case["dtype"])] if case["dtype"] != "bfloat16" else []
    label += ["eager"] if graphs and not case.get("cuda_graph") else []
    us, spread = (1e3 * cast("float", row[key]) / (B * H) for key in ("value", "spread"))
    return Point(str(case["pass"]), " ".join(label), D, T, us, spread)


def write_plot(path: Path, drawn: Sequence[Point], title: str) -> None:
    """Draws points as a PNG file, a panel for each pass and a marker for each head dim."""
    from matplotlib.figure import Figure  # without pyplot, which has global state

    panels: dict[str, dict[tuple[str, int], list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in drawn:
        panels[point.panel][point.label, point.D].append(point)
    impls = dict.fromkeys(point.impl for point in drawn)
    colours = {impl: f"C{index % 10}" for index, impl in enumerate(impls)}
    dims = sorted({point.D for point in drawn})
    markers = dict(zip(dims, itertools.cycle(_MARKERS), strict=False))
    figure = Figure(figsize=(6.5 * len(panels), 5.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (panel, lines) in zip(axes, panels.items(), strict=True):
        for (label, D), line in lines.items():
            ax.errorbar(
                [point.T for point in line],
                [point.us for point in line],
                yerr=[point.spread for point in line],
                color=colours[line[0].impl],
                marker=markers[D],
                linestyle=":" if "no sinks" in label else "--" if " block" in label else "-",
                label=f"{label}, D {D}" if len(dims) > 1 else label,
            )
        ax.set(xlabel="tokens", ylabel="µs for one head of one row")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(panel.replace("_", " + "))
        ax.grid(visible=True, which="both", alpha=0.2)
        ax.legend(fontsize="x-small")
    figure.suptitle(title)
    save(figure, path)


class Drawing(Protocol):
    """A figure of matplotlib, which need not be installed."""

    def savefig(self, path: Path, /, *, format: str, dpi: int) -> None:
        """Writes it."""


def save(figure: Drawing, path: Path) -> None:
    """Writes a PNG file: a kill does not leave half a picture in the place of an old one."""
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png", dpi=150)
    os.replace(unfinished, path)
