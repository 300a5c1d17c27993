"""recorded, decode_table: runs of `zoo bench decode`, and the table of docs/decoding.md."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

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
_JOB = ("model", "batch", "prompt", "new", "dtype")
_SETTINGS = ("W", "P", "layers", "prefill_chunk", "compile")
# What goes without saying.
_USUAL = {("layers", "none"), ("prefill_chunk", "none"), ("compile", True)}

Row = Mapping[str, object]


class Run(NamedTuple):
    """An engine and a size; `engine` says what is not as usual."""

    model: str
    batch: int
    prompt: int
    new: int
    dtype: str
    engine: str


class Recorded(NamedTuple):
    """What was measured of each run, by metric, and on which device."""

    runs: dict[Run, dict[str, float]]
    device: str


def recorded(rows: Iterable[Row]) -> Recorded:
    """The runs of `zoo bench decode`; of two rows of the same measurement the last counts.

    Raises:
        ValueError: there are none, one is incomplete, or they come from several devices.
    """
    found: dict[Run, dict[str, float]] = {}
    devices = set()
    for row in rows:
        if row["bench"] != "decode":
            continue
        case = cast("Mapping[str, object]", row["case"])
        if "impl" not in row or not case.keys() >= set(_JOB):
            raise ValueError(f"a row of decoding has impl and {', '.join(_JOB)}; one has not")
        devices.add(str(row["device"]))
        settings = [(name, case[name]) for name in _SETTINGS if name in case]
        said = [f"{name} {value}" for name, value in settings if (name, value) not in _USUAL]
        engine = ", ".join([str(row["impl"]), *said])
        run = Run(*(case[name] for name in _JOB), engine)  # type: ignore[arg-type, call-arg]
        found.setdefault(run, {})[str(row["metric"])] = cast("float", row["value"])
    if not found:
        raise ValueError("rows of `zoo bench decode` are needed; there are none")
    if len(devices) > 1:
        raise ValueError(f"rows of decoding must share the device; here are {len(devices)}")
    return Recorded(found, devices.pop())


def decode_table(rows: Iterable[Row]) -> str:
    """A line for each run, and how many times faster the first EVA engine of its size is.

    Raises:
        ValueError: as `recorded`.
    """
    found = recorded(rows).runs
    head = ["model", "rows", "prompt + new", "engine"]
    head += [title for title, _ in _COLUMNS.values()] + [f"{OURS} is faster"]
    lines = [head, ["---"] * len(head)]
    for run, metrics in found.items():
        model = run.model if run.dtype == "bfloat16" else f"{run.model}, {run.dtype}"
        cells = [model, str(run.batch), f"{run.prompt} + {run.new}", run.engine]
        cells += [
            form.format(metrics[metric]) if metric in metrics else ""
            for metric, (_, form) in _COLUMNS.items()
        ]
        ours = next((x for r, x in found.items() if _is_ours(r, run)), None)
        ratio = ""
        known = ours is not None and all("throughput" in x for x in (ours, metrics))
        if ours is not None and known and ours is not metrics:
            ratio = f"{ours['throughput'] / metrics['throughput']:.2f} x"
        lines.append([*cells, ratio])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_ours(run: Run, of: Run) -> bool:
    return run[:5] == of[:5] and run.engine.startswith(OURS)
