"""`zoo bench decode`: the command around decode.py."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tools.benchmarks.common import (
    Metric,
    append_metrics,
    device_of,
    values,
    versions,
)
from tools.benchmarks.engines import EngineOptions, Run, load_ours, load_transformers
from tools.display import print_json, print_rule, print_table
from tools.options import Device, Json, Out, with_options
from tools.results import check_results, device_name

if TYPE_CHECKING:
    import torch

    from tools.benchmarks.decode import Job, Measured


@with_options
def decode(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="A base of `zoo list`, with random weights; may be repeated.",
            show_default="pythia-160m",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size", metavar="ROWS", help="May be repeated.", show_default="1 and 32"
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(metavar="TOKENS", help="Read, of each row.")] = 8192,
    new: Annotated[int, typer.Option(metavar="TOKENS", help="Made, of each row.")] = 512,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Of our engine: torch.compile.")
    ] = True,
    engine: EngineOptions,
    device: Device = "cuda",
    json: Json = False,
    out: Out = None,
) -> None:
    """Measures prefill and decoding, ours and transformers', with random weights and prompts.

    The models of our engines are checked first, eagerly: against one pass in a wider dtype, logits
    of steps may err at most twice as much as one pass in --dtype. What runs out of memory is
    reported as such. The exit status is 1 if an answer was wrong or nothing could be measured.
    """
    check_results(out)
    for name, least, value in (("--prompt", 1, prompt), ("--new", 4, new)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    sizes = batch_size or [1, 32]
    if min(sizes) < 1:
        raise ValueError(f"--batch-size must be at least 1, not {min(sizes)}")
    bases = model or ["pythia-160m"]
    engine.check(bases)
    import torch

    from tools.benchmarks.decode import Job
    from tools.benchmarks.roofline import measure_ceilings

    where = device_of(device)
    copy = measure_ceilings(getattr(torch, engine.dtype), where).copy
    if not json:
        print(f"{device_name(where)}; {versions('torch', 'triton', 'transformers')}")
        print(f"copy bandwidth {copy / 1e12:.3g} TB/s", flush=True)
    timed, wrong = False, False
    for base in bases:
        for rows in sizes:
            job = Job(batch_size=rows, prompt=prompt, new=new, compile=compile)
            lines: list[_Line] = []
            for run in engine.runs(base, job):
                found, note = _measure(run, copy, where)
                timed |= bool(found)
                wrong |= note.startswith("WRONG")
                append_metrics(out, "decode", run.case, run.impl, found, where)
                lines.append(_Line(run.name, found, note))
                if json:
                    print_json({**run.case, "impl": run.impl, "note": note, **values(found)})
            if not json:
                _print(base, job, lines)
    if wrong or not timed:
        raise typer.Exit(1)


class _Line(NamedTuple):
    name: str
    found: Mapping[str, Metric]
    note: str


def _measure(run: Run, copy: float, device: "torch.device") -> tuple[dict[str, Metric], str]:
    """The metrics, or none and why."""
    import torch

    from tools.benchmarks.decode import check, measure_ours, measure_transformers
    from tools.benchmarks.timing import free_memory

    note = ""
    try:
        if run.engine in ("eva", "full"):
            model = load_ours(run, run.dtype, device)
            wider = "float64" if run.dtype == "float32" else "float32"
            exact = load_ours(run, wider, device)
            exact.load_state_dict(model.state_dict())
            stepwise, at_once = check(model, exact)
            del exact
            free_memory(device)
            if not stepwise <= 2 * at_once:
                return {}, f"WRONG: steps err by {stepwise:.2g}, one pass by {at_once:.2g}"
            note = f"steps err by {stepwise:.2g}, one pass by {at_once:.2g}"
            measured = measure_ours(model, run.job)
        else:
            theirs = load_transformers(run.base, run.job.length, run.dtype, device)
            measured = measure_transformers(
                theirs, run.job, static=run.static, piece=run.prefill_chunk
            )
    except torch.OutOfMemoryError:
        return {}, "out of memory"
    finally:
        free_memory(device)
    return _metrics(measured, run.job, copy), note


def _metrics(measured: "Measured", job: "Job", copy: float) -> dict[str, Metric]:
    found = {
        "throughput": Metric(job.batch_size / measured.step, "tok/s"),
        "time_per_token": Metric(1e3 * measured.step, "ms"),
        "time_to_first_token": Metric(1e3 * measured.first, "ms"),
    }
    if measured.capture is not None:
        found["capture_time"] = Metric(1e3 * measured.capture, "ms")
    for name, size in (
        ("peak_memory_prefill", measured.peak_prefill),
        ("peak_memory_decode", measured.peak_decode),
        ("cache", measured.cache),
    ):
        if size is not None:
            found[name] = Metric(size / 2**20, "MiB")
    if measured.least is not None:
        found["roofline"] = Metric(measured.least / copy / measured.step, "")
    return found


def _print(base: str, job: "Job", lines: list[_Line]) -> None:
    ours = next((found for name, found, _ in lines if name.startswith("eva") and found), None)
    rows = []
    for label, found, note in lines:
        cells = [label]
        for name, form in (
            ("throughput", "{:,.0f}"),
            ("time_per_token", "{:.3f}"),
            ("time_to_first_token", "{:,.1f}"),
            ("peak_memory_prefill", "{:,.0f}"),
            ("peak_memory_decode", "{:,.0f}"),
            ("cache", "{:,.0f}"),
        ):
            cells.append(form.format(found[name].value) if name in found else "")
        cells.append(f"{100 * found['roofline'].value:.0f} %" if "roofline" in found else "")
        ratio = ""
        if ours is not None and found:
            ratio = f"{ours['throughput'].value / found['throughput'].value:.2f}"
        rows.append([*cells, ratio, note])
    head = [
        "engine",
        "tok/s",
        "ms/token",
        "first ms",
        "peak MiB",
        "later",
        "cache MiB",
        "roofline",
    ]
    print_rule(f"{base}, {job.batch_size} rows, {job.prompt} + {job.new} tokens")
    print_table([*head, "eva is x faster", "note"], rows)
