"""`zoo evaluate`: models on tasks that others know, scored item by item."""

import gc
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from recipes import is_converted
from tools.display import print_json, print_table, progress
from tools.entry import command_line, run_command
from tools.measurement import implementation, model_case
from tools.model_options import AttentionOptions, RuntimeOptions, SourceOptions, load_model
from tools.options import BatchSize, Json, Out, with_options
from tools.results import append_result, check_outputs, device_name

if TYPE_CHECKING:
    from tools.evaluation.jobs import Job
    from tools.evaluation.outcome import Score
    from tools.evaluation.recall.fillers import Filler
    from tools.evaluation.report import Column
    from tools.evaluation.shared import Shared
    from tools.evaluation.suite import Settings
    from zoo import CausalLM

log = logging.getLogger("zoo")

_LIST = "list"


@with_options
def evaluate(
    source: SourceOptions,
    runtime: RuntimeOptions,
    attention: AttentionOptions,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Models, see `zoo list`.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(metavar="TASK,TASK", help="Names of tasks and groups; `list` prints them."),
    ] = "recall",
    show: Annotated[bool, typer.Option("--list", help="Print the tasks and exit.")] = False,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the files of tasks are.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            "--context",
            metavar="TOKENS",
            help="Of a generated prompt, answer included; may be repeated.",
            show_default="1024 and 2048; squad 4096, too; passkey, needle 4096 and 8192, too",
        ),
    ] = None,
    n: Annotated[
        list[str] | None,
        typer.Option(
            "--n",
            metavar="N",
            help="Prompts per context and size, or wording and filler; TASK=N for one task. May "
            "be repeated.",
            show_default="200",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many items; recorded in the results.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    split: Annotated[
        Literal["search", "judge", "all"],
        typer.Option(help="The half of the wordings and fillers."),
    ] = "judge",
    search_text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prose of the search half.", show_default="generated"),
    ] = None,
    judge_text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prose of the judge half.", show_default="generated"),
    ] = None,
    far: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="Score the harness's tasks behind so much unrelated text, too; 0: do not.",
        ),
    ] = 1024,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Of the loss by position.", show_default="WikiText-2 of --data"
        ),
    ] = None,
    log_likelihood: Annotated[
        bool, typer.Option(help="Also give that of the expected answers.")
    ] = True,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Read prompts through torch.compile; pays off on a GPU."),
    ] = False,
    batch_size: BatchSize = 16,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of these rows together, at most: with it many short rows and few long "
            "ones fit.",
            show_default="any number",
        ),
    ] = None,
    prefill_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of all rows that are read onto a cache at a time; more are faster on a "
            "GPU.",
            show_default="8192",
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Append every item's outcome; the same command goes on from there after a kill.",
        ),
    ] = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Scores models on tasks, one model after the other, and prints their scores side by side.

    A recall task is void for hybrids where a model with full attention scores below 0.5.
    """
    from tools.evaluation.batches import BatchLimits
    from tools.evaluation.suite import (
        Settings,
        check_contexts,
        check_tasks,
        choose_tasks,
        parse_n,
    )

    wanted = [task.strip() for task in tasks.split(",") if task.strip()]
    if show or wanted == [_LIST]:
        _print_tasks()
        return
    if not names:
        raise ValueError("name at least one model, see `zoo list`; --list prints the tasks")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is named {names.count(name)} times; once is enough")
    chosen = choose_tasks(wanted)
    prompts, own = parse_n(n or ())
    settings = Settings(
        data=data,
        contexts=None if not context else tuple(sorted(set(context))),
        n=Settings.n if prompts is None else prompts,
        own_n=own,
        limit=limit,
        seed=seed,
        split=split,
        limits=BatchLimits(rows=batch_size, tokens=batch_tokens, prefill_tokens=prefill_tokens),
        far=far,
        compile=compile,
        log_likelihood=log_likelihood,
        search_text=_filler(search_text),
        judge_text=_filler(judge_text),
        text=text,
    )
    check_tasks(chosen, settings)
    check_outputs(out, samples)
    from zoo.description import describe

    for name in names:
        check_contexts(
            name, describe(name, revision=source.revision, weights=source.weights), settings
        )

    from tools.evaluation.report import print_scores
    from tools.evaluation.shared import Shared

    columns = []
    shared = Shared(keep=len(names) > 1)
    for name in names:
        model = load_model(name, source, attention, runtime)
        if model.tokenizer is not None:
            model.tokenizer = shared.tokenizer(model.tokenizer)
        column = _evaluate(model, name, chosen, settings, shared, runtime, samples, out, json)
        columns.append(column)
        del model
        _free()
    if not json:
        print_scores(columns)


def _evaluate(
    model: "CausalLM",
    name: str,
    tasks: Sequence[str],
    settings: "Settings",
    shared: "Shared",
    runtime: RuntimeOptions,
    samples: Path | None,
    out: Path | None,
    json: bool,
) -> "Column":
    """Runs one model's tasks; writes the rows of each as soon as it is complete."""
    from tools.evaluation.jobs import check_prompts, jobs
    from tools.evaluation.record import Record
    from tools.evaluation.report import Column, run_job, score_key

    check_prompts(tasks, model, name, settings, shared)
    longest = min(model.config.max_position_embeddings, max(settings.contexts or (2048,)))
    impl = implementation(model, runtime.impl, longest)
    case = model_case(name, model)
    own = {"impl": impl, "device": device_name(model.device), "seed": settings.seed}
    found: dict[tuple[str, str, str, str], Score] = {}
    full = not is_converted(model.config.layer_types)
    with Record(samples, name, case | own, full=full) as record:
        for task in tasks:
            for job in jobs(task, model, name, settings, shared):
                with progress(f"{name}: {job.title}", job.total) as advance:
                    scores = run_job(job, record, advance)
                found |= {score_key(x): x for x in scores}
                rows = [(_case(case, job, x, settings), x) for x in scores]
                if json:
                    for row, x in rows:
                        value = x.value if math.isfinite(x.value) else None
                        values = {"metric": x.metric, "value": value, "error": x.error}
                        print_json(row | values)
                if out is not None:
                    _write(out, rows, impl, model, resumed=samples is not None)
    return Column(name=name, full=full, scores=found)


def _case(
    model: dict[str, object], job: "Job", score: "Score", settings: "Settings"
) -> dict[str, object]:
    case = model | {"task": score.task, "cell": dict(score.cell)} | dict(job.case)
    case |= {"n": score.n, "seed": settings.seed, "batch": settings.limits.rows}
    if settings.limits.tokens is not None:
        case["batch_tokens"] = settings.limits.tokens
    return case if settings.limit is None else case | {"limit": settings.limit}


def _write(
    out: Path,
    rows: "Sequence[tuple[dict[str, object], Score]]",
    impl: str,
    model: "CausalLM",
    *,
    resumed: bool,
) -> None:
    from tools.evaluation.report import row_text, rows_there

    # A run that was killed had written the rows of what it had completed.
    there = rows_there(out) if resumed else set()
    device = device_name(model.device)
    for case, score in rows:
        if not math.isfinite(score.value):
            log.warning("%s: no row of an infinite %s", score.task, score.metric)
            continue
        if row_text(case, impl, score.metric, score.value, device) in there:
            continue
        append_result(
            out,
            bench="evaluate",
            case=case,
            impl=impl,
            metric=score.metric,
            value=score.value,
            unit="nats" if score.metric == "log_likelihood" else "",
            spread=score.error,
            device=model.device,
            command=command_line(),
        )


def _print_tasks() -> None:
    from tools.evaluation.suite import descriptions, groups

    rows = [[name, text] for name, text in descriptions().items()]
    rows += [[name, f"a group: {', '.join(tasks)}"] for name, tasks in groups().items()]
    print_table(["task", "what it asks"], rows)


def _filler(path: Path | None) -> "Filler | None":
    if path is None:
        return None
    from tools.evaluation.recall.fillers import text_filler

    return text_filler(path)


def _free() -> None:
    """Gives a model's memory back before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(run_command(evaluate, "evaluate"))
