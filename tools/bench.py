"""`zoo bench`: speed and stability.

`kernels` measures attention, `decode` generation, `batch` how many rows fit; `plot` and `table`
show what was recorded, `tiles` tries tiles of one kernel; `stability` trains a small model.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from tools.benchmarks.batch_command import batch
from tools.benchmarks.common import append_metrics, chosen, device_of, values, versions, words
from tools.benchmarks.decode_command import decode
from tools.benchmarks.names import DtypeName, KernelName, PassName, WindowName
from tools.benchmarks.stability_command import stability
from tools.benchmarks.tile_command import tiles
from tools.display import print_json, progress
from tools.entry import run
from tools.options import ChunkSize, Device, Json, Out, WindowSize
from tools.results import check_results, device_name

if TYPE_CHECKING:
    import torch

    from tools.benchmarks.kernels import Plan
    from tools.benchmarks.roofline import Ceilings

# Short rows, where memory is the limit, to long ones, where arithmetic is.
DEFAULT_SHAPES = ("16,12,2048,64", "4,12,8192,64", "1,16,65536,64", "1,16,32768,128")

app = typer.Typer(add_completion=False, help="Measures speed, and stability in training.")


@app.command()
def kernels(
    *,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="B,H,T,D",
            help="Batch, query heads, tokens, head dim; may be repeated.",
            show_default=" ".join(DEFAULT_SHAPES),
        ),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(metavar="G", help="Key/value heads.", show_default="as many as query heads"),
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option(
            "--window",
            metavar="WINDOW",
            help=f"{words(WindowName)}; may be repeated.",
            show_default="all",
        ),
    ] = None,
    window_size: WindowSize = 256,
    chunk_size: ChunkSize = 16,
    sink_size: Annotated[
        list[int] | None,
        typer.Option(
            "--sink-size",
            metavar="TOKENS",
            help="First tokens that stay exact; may be repeated.",
            show_default="one chunk; triton also with 0, which shows what sinks cost",
        ),
    ] = None,
    bias: Annotated[
        bool,
        typer.Option(
            help="Summaries have a bias per head, with a gradient; that of flex is slow (atomics)."
        ),
    ] = False,
    dtype: Annotated[DtypeName, typer.Option(help="Of all tensors.")] = "bfloat16",
    impl: Annotated[
        list[str] | None,
        typer.Option(
            "--impl",
            metavar="NAME",
            help=f"{words(KernelName)}; may be repeated.",
            show_default="all but reference; on a CPU flex and reference",
        ),
    ] = None,
    pass_: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            metavar="PASS",
            help=f"{words(PassName)}; may be repeated.",
            show_default="all",
        ),
    ] = None,
    repetitions: Annotated[
        int | None,
        typer.Option(metavar="N", help="Timed runs.", show_default="10 to 100, for about 0.3 s"),
    ] = None,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="Replay CUDA graphs, so that the host does not count, or time eager calls.",
            show_default="graphs on cuda",
        ),
    ] = None,
    device: Device = "cuda",
    json: Json = False,
    out: Out = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw time against tokens; needs matplotlib."),
    ] = None,
) -> None:
    """Measures EVA attention and its peers, after a check that the answers are right.

    triton and flex include the summaries of chunks, flex also its block mask, which flex_prebuilt
    makes beforehand. sdpa_* is full causal attention, fla_* recurrent. Times are medians ± half
    the interquartile range; host ms is what one eager call costs the host. The exit status is 1
    if an answer was wrong, if triton failed, or if nothing could be measured.
    """
    check_results(out)
    if repetitions is not None and repetitions < 2:
        raise ValueError(f"repetitions must be at least 2, for a spread, not {repetitions}")
    import torch

    from tools.benchmarks.implementations import DEFAULTS
    from tools.benchmarks.inputs import Shape
    from tools.benchmarks.kernels import KernelBench, Plan
    from tools.benchmarks.plot import check_plot, points, write_plot
    from tools.benchmarks.report import case_of, ceiling_metrics, metrics, note, print_outcomes
    from tools.benchmarks.roofline import measure_ceilings

    check_plot(plot)
    where = device_of(device)
    plan = Plan(
        windows=chosen("--window", window, get_args(WindowName)),
        window_size=window_size,
        chunk_size=chunk_size,
        sink_sizes=None if sink_size is None else tuple(sink_size),
        bias=bias,
        dtype=getattr(torch, dtype),
        device=where,
        impls=chosen("--impl", impl or DEFAULTS[where.type], get_args(KernelName)),
        passes=chosen("--pass", pass_, get_args(PassName)),
        repetitions=repetitions,
        cuda_graph=_graphs(cuda_graph, where),
    )
    outcomes_per_shape = len(plan.jobs()) * len(plan.passes)
    shapes = [Shape.parse(text, kv_heads) for text in shape or DEFAULT_SHAPES]
    ceilings = measure_ceilings(plan.dtype, where)
    reached = ceiling_metrics(ceilings)
    if json:
        print_json({"dtype": dtype, "impl": "ceiling", **values(reached)})
    else:
        _print_header(plan, ceilings)
    append_metrics(out, "kernels", {"dtype": dtype}, "ceiling", reached, where)
    rows: list[Mapping[str, object]] = []  # what a plot needs of them
    statuses, failed = set(), False
    bench = KernelBench(plan)
    for size in shapes:
        outcomes = []
        with progress(str(size), outcomes_per_shape) as advance:
            for outcome in bench.measure(size):
                outcomes.append(outcome)
                case, found = case_of(outcome, plan), metrics(outcome, ceilings)
                append_metrics(out, "kernels", case, outcome.impl, found, where)
                row = {
                    "bench": "kernels",
                    "case": case,
                    "impl": outcome.impl,
                    "device": device_name(where),
                }
                rows += [
                    row | {"metric": name, "value": metric.value, "spread": metric.spread}
                    for name, metric in found.items()
                ]
                advance(1)
        statuses |= {outcome.status for outcome in outcomes}
        failed |= any(outcome.fails_the_run for outcome in outcomes)
        if not json:
            print_outcomes(outcomes, plan, ceilings)
            continue
        for outcome in outcomes:
            head = case_of(outcome, plan) | {"impl": outcome.impl, "status": outcome.status}
            print_json(head | {"note": note(outcome)} | values(metrics(outcome, ceilings)))
    if plot is not None and "timed" in statuses:
        write_plot(plot, points(rows), device_name(where))
    if failed or "timed" not in statuses:
        raise typer.Exit(1)


@app.command("plot")
def plot_rows(
    rows: Annotated[Path, typer.Argument(metavar="ROWS.jsonl", help="What `--out` has written.")],
    picture: Annotated[Path, typer.Argument(metavar="FILE.png", help="Made or replaced.")],
) -> None:
    """Draws recorded rows, of kernels or of decoding, against tokens; needs matplotlib."""
    from tools.benchmarks.decode_plot import write_decode_plot
    from tools.benchmarks.plot import check_plot, points, read_rows, write_plot

    check_plot(picture)
    read = read_rows(rows)
    if _bench(read) == "decode":
        write_decode_plot(picture, read)
        return
    drawn = points(read)
    write_plot(picture, drawn, next(str(r["device"]) for r in read if r["bench"] == "kernels"))


@app.command("table")
def table_of_rows(
    rows: Annotated[Path, typer.Argument(metavar="ROWS.jsonl", help="What `--out` has written.")],
) -> None:
    """Prints recorded rows, of kernels or of decoding, as a Markdown table."""
    from tools.benchmarks.decode_table import decode_table
    from tools.benchmarks.plot import read_rows
    from tools.benchmarks.table import table

    read = read_rows(rows)
    print(decode_table(read) if _bench(read) == "decode" else table(read))


def _bench(rows: list[Mapping[str, object]]) -> object:
    """The one that they are of."""
    found = sorted({str(row["bench"]) for row in rows})
    if len(found) > 1 or not {"kernels", "decode"}.issuperset(found):
        names = " and ".join(found)
        raise ValueError(f"rows of kernels or of decode are wanted, in a file each; here: {names}")
    return found[0] if found else None


app.command()(decode)
app.command()(batch)
app.command()(tiles)
app.command()(stability)


def _print_header(plan: "Plan", ceilings: "Ceilings") -> None:
    print(f"{device_name(plan.device)}; {versions('torch', 'triton', 'fla-core')}")
    exponentials = (
        "rate of exponentials unknown"
        if ceilings.exponentials is None
        else f"{ceilings.exponentials / 1e12:.3g} T exponentials/s (not measured: multiprocessors "
        "x 16 a clock x the highest clock)"
    )
    print(
        f"ceilings: copy {ceilings.copy / 1e12:.3g} TB/s, matrix product "
        f"{ceilings.matrix / 1e12:.3g} TFLOP/s, {exponentials}",
        flush=True,
    )
    timed = "replayed CUDA graphs" if plan.cuda_graph else "eager calls"
    ratios = ", ".join(f"/ {window}" for window in plan.windows)
    ours = f"; {ratios}: over that of triton" if "triton" in plan.impls else ""
    print(f"ms: time of {timed}{ours}", flush=True)


def _graphs(asked: bool | None, device: "torch.device") -> bool:
    if asked and device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a GPU, which --device {device} is not")
    return device.type == "cuda" if asked is None else asked


if __name__ == "__main__":
    sys.exit(run(app, sys.argv[1:], program="python -m tools.bench", words=("zoo", "bench")))
