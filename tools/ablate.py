"""`zoo ablate`: which rule places exact layers best, and how many of them are worth their cost?"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tools.display import print_json, progress
from tools.entry import run_command
from tools.model_options import RuntimeOptions, SourceOptions
from tools.options import Json, with_options
from tools.results import check_results


@with_options
def ablate(
    source: SourceOptions,
    runtime: RuntimeOptions,
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", help="What is swept, see docs/placement.md.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Append the measurements to this file; points that are there are passed over. "
            "--report-only also reads .jsonl.xz.",
            show_default="beside the recipe, .results.jsonl",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="For scored candidates and samples; the same command goes on from there after "
            "a kill.",
            show_default="beside the recipe, .work",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Draw retrieval by rule and number of layers, the importance of layers, and "
            "window by chunk; numbers beside.",
            show_default="no plots",
        ),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing; show what is in the file.")
    ] = False,
    json: Json = False,
) -> None:
    """Sweeps rules, numbers of exact layers, seeds and sizes, and judges every placement.

    Then prints a table: * marks placements that no other one beats in perplexity, retrieval, cache
    and speed at once.
    """
    from recipes.ablation import read_ablation
    from tools.evaluation.plots import check_plots

    ablation = read_ablation(recipe)
    out = recipe.with_suffix(".results.jsonl") if out is None else out
    work = recipe.with_suffix(".work") if work is None else work
    check_plots(plot)
    refused: list[str] = []
    if report_only:
        if not out.is_file():
            raise ValueError(f"there is no file {out}; run without --report-only first")
    else:
        check_results(out)
        from tools.placement.ablation import run_ablation

        refused = run_ablation(ablation, source, runtime, work=work, out=out, progress=progress)
    _report(ablation.model, out, plot, json)
    if refused:
        raise ValueError(
            f"{len(refused)} things of this sweep could not be measured, all others are; the "
            f"first is {refused[0]}"
        )


def _report(model: str, out: Path, plot: Path | None, json: bool) -> None:
    import dataclasses

    from tools.placement.report import print_summaries, write_sweep_plots
    from tools.placement.summary import placement_rows, summaries

    rows = placement_rows(out, model)
    found = summaries(rows)
    if json:
        for summary in found:
            print_json(dataclasses.asdict(summary))
    else:
        print_summaries(found)
    if plot is not None:
        for path in write_sweep_plots(plot, rows):
            print(path, file=sys.stderr if json else sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(ablate, "ablate"))
