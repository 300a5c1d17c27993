"""jobs: what a task means for a model, as things that are scored and reported together.

They are a recall task; a task of the harness as published, or behind unrelated text; the loss by
position.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from tools.evaluation.outcome import Outcome
from tools.evaluation.recall import RECALL
from tools.evaluation.recall.fillers import Filler, prose_fillers, repeated_fillers
from tools.evaluation.recall.request import Request
from tools.evaluation.record import Key, cell_text, key_of
from tools.evaluation.samples import Sample
from tools.evaluation.shared import Shared
from tools.evaluation.suite import HUB, POSITIONS, Settings, check_contexts, position_text

if TYPE_CHECKING:
    from torch import Tensor

    from zoo import CausalLM

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to score.

    Attributes:
        title: for the progress bar.
        total: items, where that is known.
        run: gives the outcomes that are not among `done`, and calls `advance` with items.
        covers: whether an outcome of an earlier run belongs to this job.
        reports: parts of the cell to report by; (): the whole cell.
        case: what its rows say of it.
    """

    title: str
    total: int | None
    run: Callable[[Set[Key], Advance], Iterator[Outcome]]
    covers: Callable[[Outcome], bool]
    reports: tuple[tuple[str, ...], ...]
    case: Mapping[str, object]


def jobs(
    task: str, model: "CausalLM", name: str, settings: Settings, shared: Shared
) -> Iterator[Job]:
    """What a task means for a model.

    Args:
        task: from `choose_tasks`.
        model: its tokenizer is from `shared`.
        name: of the model.
        settings: what the user asked for.
        shared: what earlier models of the same settings have left.

    Raises:
        ValueError: the model cannot do it, or a file or filler is too short or broken.
    """
    check_contexts(name, model.config, settings)
    if task in RECALL:
        yield _recall_job(task, model, name, settings, shared)
    elif task == POSITIONS:
        yield _position_job(model, settings, shared)
    else:
        from tools.evaluation.harness import LONG_TASKS

        yield _harness_job(task, 0, model, name, settings, shared)
        if settings.far and task not in LONG_TASKS and not task.startswith(HUB):
            yield _harness_job(task, settings.far, model, name, settings, shared)


def check_prompts(
    tasks: Sequence[str], model: "CausalLM", name: str, settings: Settings, shared: Shared
) -> None:
    """Draws the first prompts of each task: what cannot be drawn fails before any task has run.

    Prompts of the harness's tasks always fit.

    Args:
        tasks: from `choose_tasks`.
        model, name, settings, shared: as `jobs`.

    Raises:
        ValueError: the model has no tokenizer, or a context, file or filler is too short or
            broken.
    """
    if model.tokenizer is None:
        raise ValueError(
            f"tasks need a tokenizer, which {name} does not have; put its tokenizer.json beside "
            "its weights"
        )
    first, alone = replace(settings, n=1, own_n={}), Shared(keep=False)
    for task in tasks:
        try:
            if task in RECALL:
                # Once for all models of a tokenizer: a task of files takes a second.
                key = ("first", task, model.tokenizer, _contexts(task, model, settings))
                shared.once(key, partial(recall_samples, task, model, name, first, alone))
            elif task == POSITIONS:
                _position_rows(model, settings, shared)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from None


def _contexts(task: str, model: "CausalLM", settings: Settings) -> tuple[int, ...]:
    if settings.contexts is not None:
        return settings.contexts
    longest = model.config.max_position_embeddings
    own = tuple(context for context in RECALL[task].contexts if context <= longest)
    return own or (longest,)


def recall_samples(
    task: str, model: "CausalLM", name: str, settings: Settings, shared: Shared
) -> list[Sample]:
    """The samples of a recall task; arguments as `jobs`.

    Raises:
        ValueError: the model has no tokenizer, or a file or filler is too short or broken.
    """
    if model.tokenizer is None:
        raise ValueError(f"{task} needs a tokenizer, which {name} does not have")
    request = Request(
        tokenizer=model.tokenizer,
        contexts=_contexts(task, model, settings),
        n=settings.prompts_of(task),
        seed=settings.seed,
        split=settings.split,
        repeated=repeated_fillers(settings.split),
        prose=prose_fillers(settings.split, settings.search_text, settings.judge_text),
        data=settings.data,
    )
    key = (task, request.tokenizer, request.contexts)
    return shared.once(key, lambda: list(RECALL[task].draw(request)))


def _fillers(settings: Settings) -> tuple[Filler, ...]:
    prose = prose_fillers(settings.split, settings.search_text, settings.judge_text)
    return (*repeated_fillers(settings.split), *prose)


def _recall_job(
    task: str, model: "CausalLM", name: str, settings: Settings, shared: Shared
) -> Job:
    from tools.evaluation.generating import ModelWriter, run_samples

    samples = recall_samples(task, model, name, settings, shared)
    fillers = _fillers(settings)
    names = {(sample.task, cell_text(sample.cell), sample.item) for sample in samples}
    metrics = ("accuracy", "log_likelihood") if settings.log_likelihood else ("accuracy",)

    def run(done: Set[Key], advance: Advance) -> Iterator[Outcome]:
        return run_samples(
            ModelWriter(
                model, compile=settings.compile, prefill_tokens=settings.limits.prefill_tokens
            ),
            samples,
            limits=settings.limits,
            log_likelihood=settings.log_likelihood,
            done=done,
            advance=advance,
        )

    def covers(outcome: Outcome) -> bool:
        return outcome.metric in metrics and key_of(outcome)[:3] in names

    return Job(
        title=task,
        total=len(samples),
        run=run,
        covers=covers,
        reports=RECALL[task].reports,
        case={"split": settings.split, "fillers": [x.name for x in fillers]},
    )


def _harness_job(
    task: str, far: int, model: "CausalLM", name: str, settings: Settings, shared: Shared
) -> Job:
    from tools.evaluation.harness import count_items, data_suffix, run_harness

    hub = task.startswith(HUB)
    bare = task.removeprefix(HUB)
    data = None if hub else settings.data
    cell = cell_text({"far": far})
    suffix = "" if data is None else data_suffix(bare, data, far=far > 0)

    def run(done: Set[Key], advance: Advance) -> Iterator[Outcome]:
        return run_harness(
            model,
            name,
            [bare],
            data=data,
            far=far,
            limit=settings.limit,
            limits=settings.limits,
            seed=settings.seed,
            done={(t, item, metric) for t, where, item, metric in done if where == cell},
            advance=advance,
            shared=shared,
        )

    def covers(outcome: Outcome) -> bool:
        if outcome.task != bare or cell_text(outcome.cell) != cell:
            return False
        number, dash, rest = outcome.item.partition("-")
        if dash + rest != suffix:
            return False
        return settings.limit is None or int(number) < settings.limit

    return Job(
        title=f"{task} behind {far} tokens" if far else task,
        total=None
        if data is None
        else shared.once(("count", bare), lambda: count_items([bare], data, settings.limit)),
        run=run,
        covers=covers,
        reports=(),
        case={},
    )


def _position_job(model: "CausalLM", settings: Settings, shared: Shared) -> Job:
    from tools.evaluation.positions import window_outcomes

    path = position_text(settings)
    window, windows = _position_windows(model, settings)

    def run(done: Set[Key], advance: Advance) -> Iterator[Outcome]:
        del done  # one pass over a text, which is short
        rows = _position_rows(model, settings, shared)
        return window_outcomes(
            model, rows, batch_size=settings.limits.most_rows(window), advance=advance
        )

    return Job(
        title=POSITIONS,
        total=windows,
        run=run,
        covers=lambda outcome: False,
        reports=(),
        case={"text": path.name, "window": window, "windows": windows},
    )


def _position_windows(model: "CausalLM", settings: Settings) -> tuple[int, int]:
    """Tokens of a window, and how many windows."""
    window = max(settings.contexts or (min(2048, model.config.max_position_embeddings),))
    return window, 16 if settings.limit is None else min(16, settings.limit)


def _position_rows(model: "CausalLM", settings: Settings, shared: Shared) -> "Tensor":
    """The windows, int [N, W]."""
    from tools.evaluation.positions import text_windows
    from tools.text_files import read_text

    window, windows = _position_windows(model, settings)
    text = position_text(settings)
    return shared.once(
        (POSITIONS, model.tokenizer, window),
        lambda: text_windows(model, read_text(text), window=window, windows=windows),
    )
