"""What a benchmark prints and records: tables for people, cases and metrics for rows."""

from collections.abc import Mapping, Sequence

from tools.benchmarks.common import Metric
from tools.benchmarks.kernels import Outcome, Plan
from tools.benchmarks.names import WindowName
from tools.benchmarks.roofline import Ceilings, roofline
from tools.display import print_rule, print_table

# The rest is in the rows.
_COLUMNS = (
    *("implementation", "window", "sinks", "ms", "host ms", "TFLOP/s"),
    *("roofline", "with exp"),
)
_EAGER = "*"  # marks eager calls among replayed CUDA graphs


def metrics(outcome: Outcome, ceilings: Ceilings) -> dict[str, Metric]:
    """All that was found about a timed outcome, by name; empty if it was not timed."""
    timing, work = outcome.timing, outcome.work
    if timing is None:
        return {}
    found = {"time": Metric(timing.median, "ms", timing.spread)}
    if timing.host is not None:
        found["host_time"] = Metric(timing.host, "ms")
    if outcome.peak_memory is not None:
        found["peak_memory"] = Metric(outcome.peak_memory / 2**20, "MiB")
    if work is not None:
        fraction = roofline(work, timing.median, ceilings)
        found["flops"] = Metric(work.flops / timing.median / 1e9, "TFLOP/s")
        found["bandwidth"] = Metric(work.bytes / timing.median / 1e9, "TB/s")
        found["roofline"] = Metric(fraction.fraction, "")
        if fraction.with_exponentials is not None:
            found["roofline_with_exponentials"] = Metric(fraction.with_exponentials, "")
    return found


def ceiling_metrics(ceilings: Ceilings) -> dict[str, Metric]:
    """The ceilings as metrics."""
    found = {
        "copy_bandwidth": Metric(ceilings.copy / 1e12, "TB/s"),
        "matrix_rate": Metric(ceilings.matrix / 1e12, "TFLOP/s"),
    }
    if ceilings.exponentials is not None:
        found["exponential_rate"] = Metric(ceilings.exponentials / 1e12, "Texp/s")
    return found


def case_of(outcome: Outcome, plan: Plan) -> dict[str, object]:
    """What was measured, for the `case` of a row; a peer without windows has None for theirs."""
    config, timing = outcome.config, outcome.timing
    eager = outcome.status == "timed" and outcome.reason
    return {
        "shape": str(outcome.shape),
        **outcome.shape._asdict(),
        "window": None if config is None else config.window,
        "W": None if config is None else config.window_size,
        "P": None if config is None else config.chunk_size,
        "S": None if config is None else config.sink_size,
        "bias": plan.bias and config is not None,
        "dtype": dtype_name(plan),
        "pass": outcome.pass_,
        "repetitions": None if timing is None else timing.repetitions,
        "cuda_graph": timing is not None and timing.cuda_graph,
        **({"not_captured": outcome.reason} if eager else {}),
    }


def dtype_name(plan: Plan) -> str:
    """Such as "bfloat16"."""
    return str(plan.dtype).removeprefix("torch.")


def print_outcomes(outcomes: Sequence[Outcome], plan: Plan, ceilings: Ceilings) -> None:
    """A table for each pass over one shape, and below it what there is to say about its lines.

    The last columns are the time of each line over that of our own kernels, by window.
    """
    for pass_ in plan.passes:
        lines = [outcome for outcome in outcomes if outcome.pass_ == pass_]
        ours = {window: _time_of_ours(lines, window) for window in plan.windows}
        bases = {window: time for window, time in ours.items() if time is not None}
        B, H, G, T, D = lines[0].shape
        print_rule(
            f"{pass_.replace('_', ' + ')}: B {B}, H {H}, G {G}, T {T}, D {D}, {dtype_name(plan)}"
            + (", bias" if plan.bias else "")
        )
        columns = (*_COLUMNS, *(f"/ {window}" for window in bases))
        rows = [_row(line, bases, ceilings) for line in lines]
        print_table(columns, _aligned(rows))
        for line in lines:
            if note(line):
                print(f"{_name(line)}: {note(line)}", flush=True)


def _time_of_ours(outcomes: Sequence[Outcome], window: str) -> float | None:
    """Of the first, which has sinks where both were measured."""
    times = (
        outcome.timing.median
        for outcome in outcomes
        if outcome.timing and outcome.impl == "triton" and outcome.config
        if outcome.config.window == window
    )
    return next(times, None)


def _row(outcome: Outcome, bases: Mapping[WindowName, float], ceilings: Ceilings) -> list[str]:
    config, found = outcome.config, metrics(outcome, ceilings)

    def shown(name: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
        return f"{scale * found[name].value:,.{digits}f}{unit}" if name in found else ""

    time = found.get("time")
    ratios = [
        f"{time.value / base:.2f}" if time and (config is None or config.window == window) else ""
        for window, base in bases.items()
    ]
    return [
        f"{outcome.impl} {_EAGER}" if time and outcome.reason else outcome.impl,
        "" if config is None else config.window,
        "" if config is None else str(config.sink_size),
        outcome.status if time is None else f"{time.value:.3f} ± {time.spread:.3f}",
        shown("host_time", 3),
        shown("flops", 1),
        shown("roofline", 1, 100, " %"),
        shown("roofline_with_exponentials", 1, 100, " %"),
        *ratios,
    ]


def _name(outcome: Outcome) -> str:
    config = outcome.config
    if config is None:
        return outcome.impl
    return f"{outcome.impl}, {config.window}, {config.sink_size} sinks"


def note(outcome: Outcome) -> str:
    """Why an outcome was not timed, or not by a CUDA graph, in one line; else empty."""
    if outcome.status == "timed":
        return f"{_EAGER} eager calls, no CUDA graph: {outcome.reason}" if outcome.reason else ""
    words = {"wrong": "WRONG: ", "missing": "not installed: ", "failed": "failed: "}
    return words[outcome.status] + outcome.reason


def _aligned(rows: list[list[str]]) -> list[list[str]]:
    """Numbers to the right; a table itself does that only for columns without gaps."""
    columns = []
    for index, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append(column if index < 2 else [cell.rjust(width) for cell in column])
    return [list(row) for row in zip(*columns, strict=True)]
