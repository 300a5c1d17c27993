"""`zoo bench stability`: the command around train and compare."""

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from tools.benchmarks.common import chosen, device_of, versions, words
from tools.options import Device, Json, Out
from tools.results import check_results, device_name
from tools.text_files import read_text

TrainedName = Literal["triton", "flex", "reference"]
TrainedDtypeName = Literal["bfloat16", "float32"]


def stability(
    *,
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text, or JSON lines; .xz, .gz and .zst work; may be repeated.",
        ),
    ],
    impl: Annotated[
        list[str] | None,
        typer.Option(
            "--impl",
            metavar="NAME",
            help=f"{words(TrainedName)}; may be repeated.",
            show_default="triton and reference",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="Decides weights and batches; may be repeated.",
            show_default="0 and 1",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 16,
    length: Annotated[int, typer.Option(metavar="BYTES", help="Of a row.")] = 512,
    window_size: Annotated[int, typer.Option(help="Bytes that a query sees exactly.")] = 64,
    dtype: Annotated[
        TrainedDtypeName, typer.Option(help="bfloat16: weights stay float32, under autocast.")
    ] = "bfloat16",
    jobs: Annotated[
        int, typer.Option(metavar="N", help="Runs at a time, each in a process of its own.")
    ] = 1,
    device: Device = "cuda",
    json: Json = False,
    out: Out = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the curves; needs matplotlib.")
    ] = None,
) -> None:
    """Trains a small model with our kernels and with the reference, and compares the losses.

    A Llama of 4 layers of EVA attention (sliding window) learns the bytes of a text from scratch.
    Each implementation trains once with each seed; the same seed means the same weights and
    batches. The exit status is 1 if a loss or a gradient was not finite, or if an implementation
    differs from the reference by more than the reference with one seed from itself with another.
    """
    check_results(out)
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {jobs}")
    content = b"".join(read_text(path).encode() for path in text)
    import torch

    from tools.benchmarks.plot import check_plot
    from tools.benchmarks.stability import Plan, compare, load_text, train_all
    from tools.benchmarks.stability_report import (
        print_comparison,
        print_run,
        record,
        record_comparison,
        training_progress,
        write_curves,
    )

    check_plot(plot)
    names = get_args(TrainedName)
    plan = Plan(
        impls=chosen("--impl", impl or ("triton", "reference"), names),
        seeds=tuple(dict.fromkeys(seed or (0, 1))),
        steps=steps,
        batch_size=batch_size,
        length=length,
        window_size=window_size,
        dtype=getattr(torch, dtype),
        device=device_of(device),
    )
    load_text(plan, content)  # or says what is wrong with it
    source = {"text": [path.name for path in text], "bytes": len(content)}
    if not json:
        print(f"{device_name(plan.device)}; {versions('torch', 'triton')}", flush=True)
    runs = []
    with training_progress(plan, jobs) as advance:
        for done in train_all(plan, content, jobs, advance):
            print_run(done, json=json)
            record(out, plan, source, done)
            runs.append(done)
    failed = any(done.failure is not None for done in runs)
    comparison = None if failed else compare(runs)
    print_comparison(comparison, plan, json=json)
    if comparison is not None:
        record_comparison(out, plan, source, comparison)
    if plot is not None:
        write_curves(plot, runs, device_name(plan.device))
    if comparison is None or not comparison.within_spread:
        raise typer.Exit(1)
