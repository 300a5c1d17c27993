"""What `zoo bench stability` shows and records: progress, lines, rows of results, a picture."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tools.benchmarks.common import Metric, append_metrics, values
from tools.benchmarks.stability import BASE, SPAN, Comparison, Difference, Plan, Run
from tools.display import print_json, print_table

_UNIT = "nats/byte"


@contextmanager
def training_progress(plan: Plan, jobs: int) -> Iterator[Callable[[str, int, float], None]]:
    """A progress bar on stderr if that is a terminal; call the result after every step.

    It takes implementation, seed and loss. Several jobs have no bar, only their results.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    stderr = Console(stderr=True)
    hidden = jobs > 1 or not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=plan.steps * len(plan.impls) * len(plan.seeds))

        def advance(impl: str, seed: int, loss: float) -> None:
            speed = bar.tasks[task].speed or 0.0
            shown = f"{_name(impl, seed)}: loss {loss:.3f}, {speed:.1f} steps/s"
            bar.update(task, advance=1, description=shown)

        yield advance


def print_run(run: Run, *, json: bool) -> None:
    """One line."""
    if json:
        status = "finished" if run.failure is None else "failed"
        head = {"impl": run.impl, "seed": run.seed, "status": status, "note": run.failure or ""}
        print_json(head | values(_metrics(run)) | {"curve": run.curve})
    elif run.failure is not None:
        print(f"{_name(run.impl, run.seed)}: FAILED: {run.failure}", flush=True)
    else:
        speed = len(run.losses) / run.seconds
        print(
            f"{_name(run.impl, run.seed)}: loss {run.final_loss:.4f} {_UNIT} (mean of the last "
            f"{min(SPAN, len(run.losses))} steps), {speed:.1f} steps/s",
            flush=True,
        )


def print_comparison(comparison: Comparison | None, plan: Plan, *, json: bool) -> None:
    """The differences and the verdict; None if a run has failed."""
    if comparison is None:
        if not json:
            print("no comparison, because a run has failed")
        return
    # None where nothing was compared: that must not pass for a yes.
    verdict = comparison.within_spread if comparison.differences else None
    if json:
        for name, _, case, difference in _differences(comparison, plan):
            print_json({"impl": name} | case | difference._asdict())
        print_json({"within_spread": verdict})
        return
    rows = [
        [label, f"{difference.mean:.5f}", f"{difference.max:.5f}"]
        for _, label, _, difference in _differences(comparison, plan)
    ]
    print(f"\ndifferences between curves, means of {SPAN} steps, {_UNIT}:")
    print_table(("curves", "mean", "max"), rows)
    if verdict is None:
        print(f"only the {BASE} was trained: nothing to compare")
    else:
        print(f"within the spread of two seeds of the {BASE}: {'yes' if verdict else 'NO'}")


def record(out: Path | None, plan: Plan, text: Mapping[str, object], run: Run) -> None:
    """Appends a run to the file `out`, if there is one; the curve is part of the case.

    Args:
        out: made if need be.
        plan: what was trained.
        text: names and number of bytes, for the case.
        run: what became of it.
    """
    case = _case(plan, text) | {"seed": run.seed, "span": SPAN, "curve": run.curve}
    if run.failure is not None:
        case["failure"] = run.failure
    append_metrics(out, "stability", case, run.impl, _metrics(run), plan.device)


def record_comparison(
    out: Path | None, plan: Plan, text: Mapping[str, object], comparison: Comparison
) -> None:
    """Appends all differences to the file `out`, if there is one; arguments as `record`."""
    for impl, _, part, difference in _differences(comparison, plan):
        found = {
            f"curve_difference_{name}": Metric(value, _UNIT)
            for name, value in difference._asdict().items()
        }
        case = _case(plan, text) | {"span": SPAN} | part
        append_metrics(out, "stability", case, impl, found, plan.device)


def write_curves(path: Path, runs: Sequence[Run], title: str) -> None:
    """Draws the curves as a PNG file: a colour for each implementation, a style for each seed."""
    from matplotlib.figure import Figure  # without pyplot, which has global state

    impls = list(dict.fromkeys(run.impl for run in runs))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    styles = ("-", "--", ":", "-.")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    ax = figure.subplots()
    for run in runs:
        curve = run.curve
        ends = [min(SPAN * (i + 1), len(run.losses)) for i in range(len(curve))]
        ax.plot(
            ends,
            curve,
            color=f"C{impls.index(run.impl)}",
            linestyle=styles[seeds.index(run.seed) % len(styles)],
            label=_name(run.impl, run.seed) + (" FAILED" if run.failure else ""),
        )
    ax.set(xlabel="steps", ylabel=f"loss, {_UNIT}, mean of {SPAN} steps")
    ax.grid(visible=True, alpha=0.2)
    ax.legend(fontsize="small")
    figure.suptitle(title)
    # A kill must not leave half a picture in the place of an old one.
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png", dpi=150)
    os.replace(unfinished, path)


def _name(impl: str, seed: int) -> str:
    return f"{impl}, seed {seed}"


def _metrics(run: Run) -> dict[str, Metric]:
    # A row cannot hold what is not finite.
    if run.failure is not None:
        return {"failed_step": Metric(len(run.losses) + 1, "")}
    return {"loss": Metric(run.final_loss, _UNIT)}


def _differences(
    comparison: Comparison, plan: Plan
) -> Iterator[tuple[str, str, dict[str, object], Difference]]:
    """Implementation, label for people, case of a row, difference; first those of seeds."""
    seeds = " and ".join(map(str, plan.seeds))
    yield BASE, f"{BASE}, seeds {seeds}", {"seeds": list(plan.seeds)}, comparison.spread
    for (impl, seed), difference in comparison.differences.items():
        yield impl, f"{impl} and {BASE}, seed {seed}", {"seed": seed}, difference


def _case(plan: Plan, text: Mapping[str, object]) -> dict[str, object]:
    config = plan.config
    return {
        "model": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "eva": config.eva.to_dict(),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "steps": plan.steps,
        "batch": plan.batch_size,
        "context": plan.length,
        **text,
    }
