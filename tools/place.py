"""`zoo place`: which layers of a model should stay exact?"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recipes.placement import SEARCHED, Placement, exact_layers
from tools.display import print_json, progress
from tools.entry import command_line, run_command
from tools.model_options import AttentionOptions, RuntimeOptions, SourceOptions
from tools.options import Json, ModelName, with_options
from tools.results import check_appendable

if TYPE_CHECKING:
    from recipes import Recipe, Search
    from tools.placement.searcher import Result, Searcher
    from tools.placement.settings import SearchSettings

DEFAULT_RULE = "greedy_retrieval"
_PLAIN = ("uniform", "first", "last", "random")


@with_options
def place(
    source: SourceOptions,
    runtime: RuntimeOptions,
    attention: AttentionOptions,
    name: ModelName,
    budget: Annotated[int, typer.Option(help="How many layers stay exact.")],
    out: Annotated[
        Path, typer.Option(metavar="RECIPE.toml", help="The recipe, which zoo.load takes.")
    ],
    rule: Annotated[
        str, typer.Option(metavar="NAME", help=", ".join((*SEARCHED, *_PLAIN)))
    ] = DEFAULT_RULE,
    candidates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Append every placement that is scored; the same command goes on from there "
            "after a kill.",
            show_default="beside the recipe",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="That the rules for retrieval read: passkey, needle, or facts (of tiny); may be "
            "repeated.",
            show_default="passkey and needle",
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            "--context",
            metavar="TOKENS",
            help="Of a prompt, answer included; may be repeated.",
            show_default="1024 and 2048, as far as the model reads and its window does not",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Prompts per context, wording and filler.")] = 4,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    search_text: Annotated[
        list[Path] | None,
        typer.Option(
            "--search-text",
            metavar="FILE",
            help="Prose to hide numbers in, besides generated prose and repeated sentences; may "
            "be repeated.",
            show_default="none",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of perplexity and KL.",
            show_default="the first --search-text, or generated prose",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window of this text.", show_default="2048, or what the model reads"
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="How many of them are read.")] = 8,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the files of common sense are, for halo."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Items of each task of common sense.")] = 100,
    far: Annotated[
        int, typer.Option(metavar="WORDS", help="Of unrelated text before each of these items.")
    ] = 1024,
    exchanges: Annotated[
        int, typer.Option(help="Of greedy rules: layers put in another's place, for each size.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Of the gates.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Prompts that are read together.")] = 8,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Rows that a block is given at once, of all placements together.",
            show_default="8 times the batch size",
        ),
    ] = None,
    share: Annotated[
        bool,
        typer.Option(help="Compute what placements share once; --no-share is for comparison."),
    ] = True,
    json: Json = False,
) -> None:
    """Searches the layers that keep full attention and writes a recipe with them.

    Prompts have the wordings and fillers of the search half only; `zoo evaluate` judges with the
    other half. Nothing is trained.
    """
    if attention.layers is not None:
        raise ValueError("--layers names the exact layers, which zoo place looks for; remove it")
    if rule not in (*SEARCHED, *_PLAIN):
        raise ValueError(
            f"there is no rule {rule!r}; choose from {', '.join((*SEARCHED, *_PLAIN))}"
        )
    if out.suffix != ".toml":
        raise ValueError(f"a recipe is a .toml file, not {out}")
    kept = out.with_suffix(".candidates.jsonl") if candidates is None else candidates
    for path in (out, kept):
        check_appendable(path)
    if rule in _PLAIN:
        _place_plainly(name, source, attention, rule, budget, seed, out, json=json)
        return
    from tools.evaluation.recall.fillers import text_filler
    from tools.placement.settings import RETRIEVAL_TASKS, SearchSettings
    from tools.placement.target import bare_config

    config = bare_config(name, source, attention)
    longest, exact = config.max_position_embeddings, config.eva.window_size
    usual = [tokens for tokens in (1024, 2048) if exact < tokens <= longest]
    settings = SearchSettings(
        tasks=tuple(dict.fromkeys(task or RETRIEVAL_TASKS)),
        contexts=tuple(sorted(set(context or usual or [min(2 * exact, longest)]))),
        n=n,
        seed=seed,
        texts=tuple(text_filler(path) for path in search_text or ()),
        text=None if text is None else text_filler(text),
        window=min(2048, longest) if window is None else window,
        windows=windows,
        data=data,
        limit=limit,
        far=far,
        batch_size=batch_size,
        rows=rows,
        share=share,
        exchanges=exchanges,
        steps=steps,
    )
    _search(name, source, runtime, attention, rule, budget, settings, out, kept, json)


def _search(
    name: str,
    source: SourceOptions,
    runtime: RuntimeOptions,
    attention: AttentionOptions,
    rule: str,
    budget: int,
    settings: "SearchSettings",
    out: Path,
    candidates: Path,
    json: bool,
) -> None:
    from recipes import write_recipe
    from tools.placement.candidates import Candidates
    from tools.placement.searcher import Searcher
    from tools.placement.target import load_branches, new_recipe, search_case

    branches = load_branches(name, source, attention, runtime)
    case = search_case(name, branches, runtime, settings)
    start = time.perf_counter()
    with Candidates(candidates, name, case) as kept:
        searcher = Searcher(branches, name, settings, kept, progress)
        result = searcher.find(rule, budget)
    seconds = time.perf_counter() - start
    recipe = new_recipe(
        *(name, branches.model.config, result.found.layers),
        search=_provenance(rule, result, settings),
    )
    write_recipe(recipe, out)
    _print(recipe, result, searcher, seconds, out, json)


def _provenance(rule: str, result: "Result", settings: "SearchSettings") -> "Search":
    from recipes import Search

    return Search(
        rule=rule,
        order=result.found.order,
        score=result.placed.score,
        score_none=result.none.score,
        score_all=result.all.score,
        items=result.placed.n,
        searched_on=tuple(settings.lines(rule)),
        command=command_line(),
    )


def _print(
    recipe: "Recipe",
    result: "Result",
    searcher: "Searcher",
    seconds: float,
    out: Path,
    json: bool,
) -> None:
    run, alone = searcher.sharing()
    assert recipe.search is not None
    if json:
        values = {
            "layers": list(result.found.layers),
            "order": list(result.found.order),
            "rule": recipe.search.rule,
            "score": result.placed.score,
            "error": result.placed.error,
            "score_none": result.none.score,
            "score_all": result.all.score,
            "n": result.placed.n,
            "seconds": round(seconds, 3),
            "blocks": run,
            "blocks_alone": alone,
            "cells": result.placed.cells,
        }
        print_json(values)
        return
    print(f"exact layers {', '.join(map(str, result.found.layers))}")
    print(f"  as they were taken: {', '.join(map(str, result.found.order))}")
    error = "" if result.placed.error is None else f" ± {result.placed.error:.4f}"
    print(
        f"  score {result.placed.score:.4f}{error} over {result.placed.n} items "
        f"(no exact layer {result.none.score:.4f}, all {result.all.score:.4f})"
    )
    accuracy = _accuracy(result)
    if accuracy is not None:
        print(f"  right in {accuracy:.3f} of the prompts that were searched with")
    shared = f", {alone / run:.2f} times less blocks than one by one" if run else ""
    print(f"  {seconds:.1f} s{shared}")
    print(out)


def _accuracy(result: "Result") -> float | None:
    """The mean of the cells, which are of one size."""
    found = [cell["accuracy"] for cell in result.placed.cells.values() if "accuracy" in cell]
    return sum(found) / len(found) if found else None


def _place_plainly(
    name: str,
    source: SourceOptions,
    attention: AttentionOptions,
    rule: str,
    budget: int,
    seed: int,
    out: Path,
    *,
    json: bool,
) -> None:
    """Writes the layers of a rule that looks at no model."""
    from typing import cast

    from recipes import sliding_layers, write_recipe
    from recipes.placement import Rule
    from tools.placement.target import bare_config, new_recipe

    placement = Placement(
        rule=cast("Rule", rule), count=budget, seed=seed if rule == "random" else None
    )
    config = bare_config(name, source, attention)
    sliding = sliding_layers(config.layer_types)
    layers = exact_layers(placement, config.num_hidden_layers, sliding)
    write_recipe(new_recipe(name, config, layers, rule=placement), out)
    if json:
        print_json({"layers": list(layers), "rule": rule})
        return
    print(f"exact layers {', '.join(map(str, layers))}")
    print(out)


if __name__ == "__main__":
    sys.exit(run_command(place, "place"))
