"""`zoo bench tiles`: the command around measure_tiles."""

from typing import Annotated

import typer

from tools.benchmarks.common import Metric, append_metrics, device_of
from tools.benchmarks.names import DtypeName, WindowName
from tools.display import print_json
from tools.options import ChunkSize, Device, Json, Out, WindowSize
from tools.results import check_results


def tiles(
    *,
    kernel: Annotated[
        str,
        typer.Option(
            help="forward, queries, keys, summaries, summary_forward or summary_backward."
        ),
    ],
    tile: Annotated[
        list[str] | None,
        typer.Option(
            "--tile",
            metavar="M,N,WARPS,STAGES",
            help="Queries, keys, warps, stages and perhaps the most registers of a thread; of "
            "summary_*: chunks, tokens, warps. May be repeated.",
            show_default="only the tile in use",
        ),
    ] = None,
    shape: Annotated[
        str, typer.Option(metavar="B,H,T,D", help="Batch, heads, tokens, head dim.")
    ] = "16,12,2048,64",
    window: Annotated[WindowName, typer.Option(help="sliding or block.")] = "sliding",
    window_size: WindowSize = 256,
    chunk_size: ChunkSize = 16,
    dtype: Annotated[DtypeName, typer.Option(help="Of all tensors.")] = "bfloat16",
    repetitions: Annotated[
        int | None, typer.Option(metavar="N", help="Timed runs.", show_default="10 to 100")
    ] = None,
    device: Device = "cuda",
    json: Json = False,
    out: Out = None,
) -> None:
    """Times one of our kernels with one tile after another, after a check of its answers.

    The tile in use comes first. Those of flasheva/triton/tiles.py were found so.
    """
    check_results(out)
    import torch

    from flasheva import EvaConfig, resolve_impl
    from tools.benchmarks.inputs import Shape, make_inputs
    from tools.benchmarks.tile_search import KERNELS, Kernel, measure_tiles, parse_tile

    if kernel not in KERNELS:
        raise ValueError(f"--kernel must be one of {', '.join(KERNELS)}, not {kernel!r}")
    name: Kernel = kernel
    found = Shape.parse(shape)
    config = EvaConfig(window=window, window_size=window_size, chunk_size=chunk_size)
    where = device_of(device)
    x = make_inputs(found, chunk_size, getattr(torch, dtype), where, bias=False)
    resolve_impl(x.q, config, "triton")  # or says why not
    candidates = [parse_tile(name, text) for text in tile or ()]
    for trial in measure_tiles(config, x, name, candidates, repetitions):
        case = {
            "kernel": kernel,
            "tile": list(trial.tile),
            "shape": shape,
            "window": window,
            "W": window_size,
            "P": chunk_size,
            "dtype": dtype,
        }
        numbers = ",".join(str(n) for n in trial.tile if n is not None)
        if json:
            median = None if trial.timing is None else trial.timing.median
            print_json({**case, "ms": median, "reason": trial.reason})
        elif trial.timing is None:
            print(f"{numbers:20} {trial.reason}", flush=True)
        else:
            print(
                f"{numbers:20} {trial.timing.median:.4f} ± {trial.timing.spread:.4f} ms",
                flush=True,
            )
        if trial.timing is not None:
            time = Metric(trial.timing.median, "ms", trial.timing.spread)
            append_metrics(out, "tiles", case, "triton", {"time": time}, where)
