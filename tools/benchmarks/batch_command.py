"""`zoo bench batch`: the command around batch.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tools.benchmarks.common import Metric, append_metrics, device_of, versions
from tools.benchmarks.engines import EngineOptions, Run, load_ours, load_transformers
from tools.display import print_json, print_table
from tools.options import Device, Json, Out, with_options
from tools.results import check_results, device_name

if TYPE_CHECKING:
    import torch

    from zoo import CausalLM


@with_options
def batch(
    *,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="A base of `zoo list`.")
    ] = "pythia-160m",
    context: Annotated[
        int, typer.Option(metavar="TOKENS", help="Of a row, prompt and text together.")
    ] = 8192,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", help="That PyTorch may allocate.", show_default="all of the GPU"
        ),
    ] = None,
    engine: EngineOptions,
    device: Device = "cuda",
    json: Json = False,
    out: Out = None,
) -> None:
    """Finds the largest batch that fits, by trying, ours and transformers'.

    Beside ours stands what zoo.max_batch says without trying.
    """
    check_results(out)
    if context < 8:
        raise ValueError(f"--context must be at least 8, not {context}")
    if memory is not None and not 0 < memory < float("inf"):
        raise ValueError(f"--memory must be a number of GiB above 0, not {memory}")
    engine.check([model])
    import torch

    from tools.benchmarks.batch import NEW
    from tools.benchmarks.decode import Job

    where = device_of(device)
    if where.type != "cuda":
        raise ValueError("a batch is tried until a GPU runs out of memory; use --device cuda")
    whole = torch.cuda.get_device_properties(where).total_memory / 2**30
    if memory is not None and memory > whole:
        raise ValueError(f"--memory must be at most the GPU's {whole:.1f} GiB, not {memory}")
    share = 1.0 if memory is None else memory / whole
    if not json:
        print(f"{device_name(where)}; {versions('torch', 'triton', 'transformers')}", flush=True)
    job = Job(batch_size=0, prompt=context - NEW, new=NEW, compile=False)
    lines = []
    for run in engine.runs(model, job):
        with _limited_to(share, where):
            found = _measure(run, context, where)
        case = {name: value for name, value in run.case.items() if name != "batch"}
        case["memory_gib"] = memory or round(whole, 1)
        append_metrics(out, "batch", case, run.impl, found, where)
        if json:
            print_json({**case, "impl": run.impl, **{k: v.value for k, v in found.items()}})
        fits, fails, said = (
            f"{found[name].value:,.0f}" if name in found else ""
            for name in ("largest_batch", "too_large", "max_batch")
        )
        lines.append([run.name, fits, fails, said])
    if not json:
        print_table(["engine", "fits", "does not", "zoo.max_batch"], lines)


@contextmanager
def _limited_to(share: float, device: "torch.device") -> Iterator[None]:
    """PyTorch may allocate this share of the GPU."""
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    before = torch.cuda.get_per_process_memory_fraction(index)
    torch.cuda.set_per_process_memory_fraction(share, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


def _measure(run: Run, context: int, device: "torch.device") -> dict[str, Metric]:
    import torch

    from tools.benchmarks.batch import fits_ours, fits_transformers, largest_batch
    from tools.benchmarks.timing import free_memory

    try:
        if run.engine in ("eva", "full"):
            ours = load_ours(run, run.dtype, device)
            fits, guess, step = fits_ours(ours, context), _said(ours, context), 1.05
            found = {"max_batch": Metric(guess, "rows")}
            del ours
        else:
            theirs = load_transformers(run.base, context, run.dtype, device)
            fits = fits_transformers(theirs, context, static=run.static, piece=run.prefill_chunk)
            found, guess, step = {}, 16, 2.0
            del theirs
        low, high = largest_batch(fits, guess, step)
        del fits
    except torch.OutOfMemoryError:  # already of the weights
        found, low, high = {}, 0, 1
    finally:
        free_memory(device)
    return found | {"largest_batch": Metric(low, "rows"), "too_large": Metric(high, "rows")}


def _said(model: "CausalLM", context: int) -> int:
    """What zoo.max_batch says; 0 where it says that nothing fits."""
    import zoo

    try:
        return zoo.max_batch(model, context)
    except ValueError:
        return 0
