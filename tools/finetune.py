"""`zoo finetune`: trains what a recipe says, stage by stage."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tools.display import print_json, progress
from tools.entry import command_line, run_command
from tools.options import Json, option, parse_shares, with_options
from tools.training_options import CheckSettings, LoopSettings

if TYPE_CHECKING:
    from tools.training.models import Conversion


@with_options
def finetune(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A recipe with [[stages]]: a .toml file, or a shipped name."
        ),
    ],
    loop: LoopSettings,
    check: CheckSettings,
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of zoo tokenize.", show_default="only --dry-run"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Of the run; the same command goes on in it after a kill.",
            show_default="only --dry-run",
        ),
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE=NUMBER",
            help="The share of rows from a source; may be repeated, for every source that counts.",
            show_default="all documents once in a pass",
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Of the base: auto, random (from scratch), a folder or .gguf file.")
    ] = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="For random weights: a model or folder that has a tokenizer."
        ),
    ] = None,
    device: Annotated[
        str | None,
        option("Running", "Such as cpu or cuda.", default="cuda if present"),
    ] = None,
    impl: Annotated[
        Literal["auto", "triton", "flex", "reference"],
        option("Running", "How EVA layers compute."),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")
    ] = False,
    speed: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS", help="Of --dry-run: tokens per second, to estimate the time from."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Fine-tunes a model as the stages of a recipe say.

    Start it with torchrun for several GPUs. Every finished stage is a model folder in --out;
    metrics.jsonl there has a line a step.
    """
    from tools.training.models import Conversion
    from tools.training.ranks import launched

    rank, processes = launched()
    if dry_run and rank:
        return  # the first process prints for all
    conversion = Conversion.read(recipe, weights)
    shares = parse_shares(share, "--share") or None
    if dry_run:
        _plan(conversion, loop, tokens, shares, speed, processes)
        return
    if speed is not None:
        raise ValueError("--speed is for --dry-run")
    if tokens is None or out is None:
        raise ValueError("--tokens and --out name the tokens to train on and where the run goes")
    from tools.training.data.tokenizers import open_tokenizer
    from tools.training.ranks import joined
    from tools.training.run import RunOptions, Screen, run_stages

    options = RunOptions(
        tokens=tokens,
        out=out,
        shares=shares,
        impl=impl,
        tokenizer=None if tokenizer is None else open_tokenizer(tokenizer),
        loop=loop.loop(device, check.check_every),
        checks=check.checks(),
        tensorboard=loop.tensorboard,
    )
    with joined(device) as ranks:
        if not ranks.first:
            logging.getLogger("zoo").setLevel(logging.ERROR)  # what loading says, said once
        screen = Screen(progress, _say, command_line())
        folder = run_stages(conversion, options, ranks, screen)
        if not ranks.first:
            return
    if json:
        print_json({"folder": str(folder), "stages": [s.name for s in conversion.recipe.stages]})
    else:
        print(folder)


def _plan(
    conversion: "Conversion",
    loop: LoopSettings,
    tokens: Path | None,
    shares: dict[str, float] | None,
    speed: float | None,
    processes: int,
) -> None:
    import torch

    from tools.training.data.shards import open_shards
    from tools.training.plan import make_plan, plan_text
    from tools.training.preflight import check_stages
    from tools.training.ranks import Ranks
    from tools.training.run import deal

    recipe = conversion.recipe
    print(f"{recipe.name}: {conversion.base}, weights {conversion.weights}")
    config = conversion.config()
    check_stages(
        config, recipe.stages, weights=conversion.weights, rows=loop.rows, ranks=processes
    )
    plans = make_plan(
        config,
        recipe.stages,
        rows=loop.rows,
        ranks=processes,
        checkpointing=loop.checkpointing,
        tokens_per_second=speed,
    )
    print(plan_text(plans))
    if tokens is None:
        return
    shards, alone = open_shards(tokens), Ranks(0, 1, torch.device("cpu"))
    for index, stage in enumerate(recipe.stages):
        batches = deal(shards, conversion, stage, index, shares, alone)
        for name, passes in batches.passes_done(stage.num_steps).items():
            size = batches.passes[name]
            print(
                f"{stage.name}: {passes:.2f} passes over {name} ({size.tokens:,} tokens, "
                f"{size.padding:.1%} padding)"
            )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(finetune, "finetune"))
