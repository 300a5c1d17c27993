"""decode_table: recorded runs of `zoo bench decode` as the Markdown table of docs/decoding.md."""

from collections.abc import Iterable, Mapping
from typing import cast

OURS = "zoo_eva"
_COLUMNS = {
    "throughput": ("tok/s", "{:,.0f}"),
    "time_per_token": ("ms a step", "{:.3f}"),
    "time_to_first_token": ("ms to the first", "{:,.0f}"),
    "peak_memory_prefill": ("peak MiB, prefill", "{:,.0f}"),
    "peak_memory_decode": ("decode", "{:,.0f}"),
    "cache": ("cache MiB", "{:,.0f}"),
    "roofline": ("roofline", "{:.0%}"),
}
_JOB = ("model", "batch", "prompt", "new")
_SETTINGS = ("W", "P", "layers", "cache_dtype", "prefill_chunk")
# What goes without saying.
_USUAL = {("layers", "none"), ("cache_dtype", "none"), ("prefill_chunk", "none")}

Row = Mapping[str, object]


def decode_table(rows: Iterable[Row]) -> str:
    """A line for each engine and size, and how many times ours is faster at that size.

    Of two rows of the same measurement the last counts. "Ours" is the first EVA engine of a size.

    Raises:
        ValueError: there are no such rows, or they come from several devices.
    """
    found: dict[tuple[tuple[object, ...], str], dict[str, float]] = {}
    devices = set()
    for row in rows:
        if row["bench"] != "decode":
            continue
        case = cast("Mapping[str, object]", row["case"])
        devices.add(row["device"])
        settings = [(name, case[name]) for name in _SETTINGS if name in case]
        said = [f"{name} {value}" for name, value in settings if (name, value) not in _USUAL]
        name = ", ".join([str(row["impl"]), *said])
        key = (tuple(case[name] for name in _JOB), name)
        found.setdefault(key, {})[str(row["metric"])] = cast("float", row["value"])
    if not found:
        raise ValueError("a table needs rows of `zoo bench decode`; there are none")
    if len(devices) > 1:
        raise ValueError(f"rows of a table share the device; here are {len(devices)}")
    head = ["model", "rows", "prompt + new", "engine"]
    head += [title for title, _ in _COLUMNS.values()] + [f"{OURS} is faster"]
    lines = [head, ["---"] * len(head)]
    for (job, name), metrics in found.items():
        model, batch, prompt, new = job
        cells = [str(model), str(batch), f"{prompt} + {new}", name]
        cells += [
            form.format(metrics[metric]) if metric in metrics else ""
            for metric, (_, form) in _COLUMNS.items()
        ]
        ours = next((x for (j, n), x in found.items() if j == job and n.startswith(OURS)), None)
        ratio = ""
        if ours is not None and ours is not metrics:
            ratio = f"{ours['throughput'] / metrics['throughput']:.2f} x"
        lines.append([*cells, ratio])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
