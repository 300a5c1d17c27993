"""`zoo bench decode`: the command around decode.py."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from tools.benchmarks.common import (
    Metric,
    append_metrics,
    chosen,
    device_of,
    values,
    versions,
    words,
)
from tools.benchmarks.names import DtypeName
from tools.display import print_json, print_rule, print_table
from tools.options import ChunkSize, Device, Json, Out, WindowSize
from tools.results import check_appendable, device_name

if TYPE_CHECKING:
    import torch

    from tools.benchmarks.decode import Job, Measured
    from zoo import CausalLM

EngineName = Literal["eva", "full", "transformers_static", "transformers_default"]


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
    impl: Annotated[
        list[str] | None,
        typer.Option(
            "--impl",
            metavar="NAME",
            help=f"{words(EngineName)}: EVA in every layer, full attention in our engine, and "
            "transformers with a static cache, compiled, or its default one; may be repeated.",
            show_default="all",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Of eva: the layers with full attention, such as 7,17-18."),
    ] = None,
    window_size: WindowSize = 256,
    chunk_size: ChunkSize = 16,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Of our engine: torch.compile.")
    ] = True,
    dtype: Annotated[DtypeName, typer.Option(help="Of weights and caches.")] = "bfloat16",
    device: Device = "cuda",
    json: Json = False,
    out: Out = None,
) -> None:
    """Measures prefill and decoding, ours and transformers', with random weights and prompts.

    The models of our engines are checked first, eagerly: against one pass in a wider dtype, logits
    of steps may err at most twice as much as one pass in --dtype. What runs out of memory is
    reported as such. The exit status is 1 if an answer was wrong or nothing could be measured.
    """
    check_appendable(out)
    for name, least, value in (("--prompt", 1, prompt), ("--new", 4, new)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    sizes = batch_size or [1, 32]
    if min(sizes) < 1:
        raise ValueError(f"--batch-size must be at least 1, not {min(sizes)}")
    engines = chosen("--impl", impl, get_args(EngineName))
    bases = [_base(name) for name in model or ["pythia-160m"]]
    import torch

    from tools.benchmarks.decode import Job
    from tools.benchmarks.roofline import measure_ceilings

    where = device_of(device)
    copy = measure_ceilings(getattr(torch, dtype), where).copy
    if not json:
        print(f"{device_name(where)}; {versions('torch', 'triton', 'transformers')}")
        print(f"copy bandwidth {copy / 1e12:.3g} TB/s", flush=True)
    timed, wrong = False, False
    for base in bases:
        for rows in sizes:
            job = Job(batch_size=rows, prompt=prompt, new=new, compile=compile)
            lines: list[tuple[str, Mapping[str, Metric], str]] = []
            for engine in engines:
                found, note = _measure(
                    engine, base, job, copy, layers, (window_size, chunk_size), dtype, where
                )
                timed |= bool(found)
                wrong |= note.startswith("WRONG")
                case = _case(base, engine, job, layers, (window_size, chunk_size), dtype)
                append_metrics(out, "decode", case, _impl(engine), found, where)
                lines.append((engine, found, note))
                if json:
                    print_json({**case, "impl": _impl(engine), "note": note, **values(found)})
            if not json:
                _print(base, job, lines)
    if wrong or not timed:
        raise typer.Exit(1)


def _base(name: str) -> str:
    from zoo.registry import BASES

    if name not in BASES:
        raise ValueError(f"--model must be one of {', '.join(BASES)}, not {name!r}")
    return name


def _impl(engine: str) -> str:
    return {"eva": "zoo_eva", "full": "zoo_full"}.get(engine, engine)


def _case(
    base: str, engine: str, job: "Job", layers: str | None, eva: tuple[int, int], dtype: str
) -> dict[str, object]:
    case: dict[str, object] = {
        "model": base,
        "batch": job.batch_size,
        "prompt": job.prompt,
        "new": job.new,
        "dtype": dtype,
    }
    if engine == "eva":
        case |= {"W": eva[0], "P": eva[1], "layers": layers or "none"}
    if engine in ("eva", "full"):
        case["compile"] = job.compile
    return case


def _measure(
    engine: str,
    base: str,
    job: "Job",
    copy: float,
    layers: str | None,
    eva: tuple[int, int],
    dtype: str,
    device: "torch.device",
) -> tuple[dict[str, Metric], str]:
    """The metrics, or none and why."""
    import torch

    from tools.benchmarks.decode import check, measure_ours, measure_transformers
    from tools.benchmarks.timing import free_memory
    from zoo.config import to_hf
    from zoo.description import describe

    note = ""
    try:
        if engine in ("eva", "full"):
            model = _load(base, engine, layers, eva, dtype, device)
            wider = "float64" if dtype == "float32" else "float32"
            exact = _load(base, engine, layers, eva, wider, device)
            exact.load_state_dict(model.state_dict())
            stepwise, at_once = check(model, exact)
            del exact
            free_memory(device)
            if not stepwise <= 2 * at_once:
                return {}, f"WRONG: steps err by {stepwise:.2g}, one pass by {at_once:.2g}"
            note = f"steps err by {stepwise:.2g}, one pass by {at_once:.2g}"
            measured = measure_ours(model, job)
        else:
            fields = to_hf(describe(base, weights="random"), {}, dtype)
            static = engine == "transformers_static"
            measured = measure_transformers(fields, job, device, static=static)
    except torch.OutOfMemoryError:
        return {}, "out of memory"
    finally:
        free_memory(device)
    return _metrics(measured, job, copy), note


def _load(
    base: str,
    engine: str,
    layers: str | None,
    eva: tuple[int, int],
    dtype: str,
    device: "torch.device",
) -> "CausalLM":
    import torch

    import zoo
    from flasheva import EvaConfig
    from recipes import exact_layers, parse_layers
    from zoo.description import describe

    depth = describe(base, weights="random").num_hidden_layers
    exact = tuple(range(depth)) if engine != "eva" else ()
    if engine == "eva" and layers is not None:
        exact = exact_layers(parse_layers(layers), depth)
    types = ["full_attention" if i in exact else "eva_attention" for i in range(depth)]
    torch.manual_seed(0)
    return zoo.load(
        base,
        weights="random",
        dtype=dtype,
        device=device,
        layer_types=types,
        eva=EvaConfig(window_size=eva[0], chunk_size=eva[1]),
    )


def _metrics(measured: "Measured", job: "Job", copy: float) -> dict[str, Metric]:
    found = {
        "throughput": Metric(job.batch_size / measured.step, "tok/s"),
        "time_per_token": Metric(1e3 * measured.step, "ms"),
        "time_to_first_token": Metric(1e3 * measured.first, "ms"),
    }
    if measured.capture is not None:
        found["capture_time"] = Metric(1e3 * measured.capture, "ms")
    for name, size in (("peak_memory", measured.peak), ("cache", measured.cache)):
        if size is not None:
            found[name] = Metric(size / 2**20, "MiB")
    if measured.least is not None:
        found["roofline"] = Metric(measured.least / copy / measured.step, "")
    return found


def _print(base: str, job: "Job", lines: list[tuple[str, Mapping[str, Metric], str]]) -> None:
    ours = next((found for engine, found, _ in lines if engine == "eva" and found), None)
    rows = []
    for engine, found, note in lines:
        cells = [engine]
        for name, form in (
            ("throughput", "{:,.0f}"),
            ("time_per_token", "{:.3f}"),
            ("time_to_first_token", "{:,.1f}"),
            ("peak_memory", "{:,.0f}"),
            ("cache", "{:,.0f}"),
        ):
            cells.append(form.format(found[name].value) if name in found else "")
        cells.append(f"{100 * found['roofline'].value:.0f} %" if "roofline" in found else "")
        ratio = ""
        if ours is not None and found:
            ratio = f"{ours['throughput'].value / found['throughput'].value:.2f}"
        rows.append([*cells, ratio, note])
    head = ["engine", "tok/s", "ms/token", "first ms", "peak MiB", "cache MiB", "roofline"]
    print_rule(f"{base}, {job.batch_size} rows, {job.prompt} + {job.new} tokens")
    print_table([*head, "eva is x faster", "note"], rows)
