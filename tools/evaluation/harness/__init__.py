"""run_harness: lm-evaluation-harness's tasks on a model, item by item, near and far.

A task is scored as published (far = 0), or with unrelated text before every prompt: only that
judges EVA, because a short prompt fits into its window and is exact by construction.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from tools.evaluation.batches import ONE_ROW, BatchLimits
from tools.evaluation.harness.data import TASKS, file_of, read_rows
from tools.evaluation.outcome import Outcome
from tools.evaluation.recall.files import item_suffix
from tools.evaluation.shared import Shared

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

    from zoo import CausalLM

LOCAL_TASKS: Mapping[str, str] = {name: task.summary for name, task in TASKS.items()}
# Long texts of their own: nothing is put before them.
LONG_TASKS: Set[str] = {name for name, task in TASKS.items() if task.text}

Done = Set[tuple[str, str, str]]


def run_harness(
    model: "CausalLM | TemplateLM",
    name: str,
    tasks: Sequence[str],
    *,
    data: Path | None,
    far: int = 0,
    limit: int | None = None,
    limits: BatchLimits = ONE_ROW,
    seed: int = 0,
    done: Done = frozenset(),
    advance: Callable[[int], None] = lambda items: None,
    hay: str | None = None,
    shared: Shared | None = None,
) -> Iterator[Outcome]:
    """Scores tasks; outcomes come as soon as they are there, so that a stopped run can go on.

    Args:
        model: from `zoo.load`, or one of the harness's own.
        name: of the model, for messages.
        tasks: of `LOCAL_TASKS`; without `data`, any of the harness.
        data: the folder of the local files; None: data sets from the hub.
        far: tokens of unrelated text before every prompt, at least; 0: as published.
        limit: only the first so many items of a task.
        limits: of what is computed at once.
        seed: of the unrelated text.
        done: (task, item, metric) that are not to be computed again.
        advance: called with the number of items that are settled.
        hay: the unrelated text; None: WikiText from `data`.
        shared: what earlier calls have left, which differed in nothing but `model`, `tasks` and
            `far`.

    Yields:
        One outcome for each item and metric, of the cell {"far": far}. The mean of a perplexity is
        over words or bytes, as the metric's name says, or over items. An item is a number, its
        place in the task's data, and `item_suffix` of local files.

    Raises:
        ValueError: in one line: the harness is not installed, an unknown task, a missing file,
            a task that takes no text before it, or more text than the model can read.
    """
    check_installed()
    for what, number, least in (("far", far, 0), ("limit", limit, 1)):
        if number is not None and number < least:
            raise ValueError(f"{what} must be at least {least}, not {number}")
    from lm_eval.api.model import TemplateLM

    from tools.evaluation.harness.far import UnrelatedText
    from tools.evaluation.harness.items import TaskRun
    from tools.evaluation.harness.tasks import load_tasks

    shared = Shared(keep=False) if shared is None else shared
    passages = None
    if far:
        passages = shared.once(
            ("passages", far),
            lambda: UnrelatedText(_wikitext(data) if hay is None else hay, far, seed),
        )
    loaded = shared.once(("tasks", *tasks), lambda: load_tasks(tasks, data, limit))
    for task_name, task in loaded.items():
        if far and task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise ValueError(f"{task_name} is a long text: score it with far 0, not {far}")
    if isinstance(model, TemplateLM):
        lm = model
    else:
        from tools.evaluation.harness.model import ZooLM

        lm = ZooLM(
            model,
            batch_size=limits.rows,
            batch_tokens=limits.tokens,
            prefill_tokens=limits.prefill_tokens,
        )
    for task_name, task in loaded.items():
        run = TaskRun(
            lm,
            name,
            task_name,
            task,
            far=far,
            passages=passages,
            suffix=""
            if data is None
            else data_suffix(task_name, data, far=far > 0 and hay is None),
            done=done,
            shared=shared,
        )
        yield from run.outcomes(limit, max(16, 4 * limits.rows), advance)


def data_suffix(task: str, data: Path, *, far: bool) -> str:
    """The end of an item's name: `item_suffix` of the task's file, and of WikiText where `far`.

    Raises:
        ValueError: a missing file.
    """
    names = [task, "wikitext"] if far else [task]
    return "".join(item_suffix(file_of(name, data)) for name in names)


def check_installed() -> None:
    """Raises ValueError unless lm-evaluation-harness is there; imports nothing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "these tasks need lm-evaluation-harness, which is missing: "
            "pip install 'flasheva-zoo[eval]'"
        )


def count_items(tasks: Sequence[str], data: Path, limit: int | None = None) -> int:
    """How many items `run_harness` settles: the length of its progress bar.

    Raises:
        ValueError: an unknown task or a missing file.
    """
    sizes = [len(read_rows(name, data)) for name in tasks]
    return sum(size if limit is None else min(size, limit) for size in sizes)


def _wikitext(data: Path | None) -> str:
    """The text of WikiText-2, as people write."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    if data is None:
        raise ValueError("far > 0 needs unrelated text: give the folder of wikitext2_raw_test.txt")
    rows = read_rows("wikitext", data)
    return "\n".join(wikitext_detokenizer(row) for row in rows)
