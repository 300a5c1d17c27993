"""write_decode_plot: throughput and peak memory of decoding against the context."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from tools.benchmarks.decode_table import recorded
from tools.benchmarks.plot import save

_PANELS = {"tokens a second": "throughput", "peak memory, GiB": "peak"}


def write_decode_plot(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Draws rows of `zoo bench decode` as a PNG file: a line for each model, batch and engine.

    The context is prompt and new tokens together; the peak is that of prefill and decoding.

    Raises:
        ValueError: as `recorded`.
    """
    from matplotlib.figure import Figure  # without pyplot, which has global state

    found = recorded(rows)
    lines: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for run, metrics in sorted(found.runs.items()):
        peaks = [metrics[name] for name in metrics if name.startswith("peak_memory")]
        values = {**metrics, **({"peak": max(peaks) / 1024} if peaks else {})}
        label = f"{run.model}, {run.dtype}, {run.batch} rows, {run.engine}"
        for panel, name in _PANELS.items():
            if name in values:
                lines[panel][label].append((run.prompt + run.new, values[name]))
    figure = Figure(figsize=(6.5 * len(lines), 5.5), layout="constrained")
    axes = figure.subplots(1, len(lines), squeeze=False)[0]
    for ax, (panel, drawn) in zip(axes, lines.items(), strict=True):
        for label, points in drawn.items():
            ax.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        ax.set(xlabel="context, tokens", ylabel=panel)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.grid(visible=True, which="both", alpha=0.2)
        ax.legend(fontsize="x-small")
    figure.suptitle(found.device)
    save(figure, path)
