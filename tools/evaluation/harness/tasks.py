"""load_tasks: the harness's own task objects, on local files or on its data sets from the hub.

Prompts, targets and metrics are the harness's: of a local task only the data set is replaced.
"""

import difflib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from tools.evaluation.harness.data import TASKS, read_rows

# The harness would compile the template of a prompt for every item: half of the time of making it.
lm_eval.utils.env.from_string = functools.lru_cache(maxsize=256)(lm_eval.utils.env.from_string)


def load_tasks(
    names: Sequence[str], data: Path | None, limit: int | None = None
) -> dict[str, Task]:
    """Tasks by name; groups and tags of the harness give several.

    Args:
        names: of local tasks, or, without `data`, of any task of the harness.
        data: the folder of the local files; None: the hub.
        limit: the first so many rows of a local file are enough.

    Raises:
        ValueError: in one line, an unknown task, a missing file, or a data set that could not be
            had from the hub.
    """
    with quiet():
        found = _from_hub(names) if data is None else _local(names, data, limit)
    for task in found.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return found


def _local(names: Sequence[str], data: Path, limit: int | None) -> dict[str, Task]:
    for name in names:
        if name not in TASKS:
            raise ValueError(
                f"{_unknown(name, list(TASKS))}; local tasks are {', '.join(TASKS)}, and without "
                "local data those of the harness from the hub"
            )
    root = Path(lm_eval.tasks.__file__).parent
    folders = sorted({str(root / TASKS[name].folder) for name in names})
    # Only these: to list all 14,000 tasks takes 10 seconds.
    manager = TaskManager(include_path=folders, include_defaults=False)
    # In a group a task's own definition takes what is changed; by itself it would be replaced.
    members = [_changes(name, data, limit) for name in names]
    loaded = manager.load({"group": "local", "task": members})["tasks"]
    return {name: loaded[name] for name in names}


def _changes(name: str, data: Path, limit: int | None) -> dict[str, object]:
    split = TASKS[name].split
    rows = read_rows(name, data)[:limit]

    def dataset(**metadata: object) -> datasets.DatasetDict:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows)})

    return {
        "task": name,
        "custom_dataset": dataset,
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
    }


def _from_hub(names: Sequence[str]) -> dict[str, Task]:
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"{_unknown(name, manager.all_tasks)}; see `lm-eval ls tasks`")
    try:
        return dict(manager.load(list(names))["tasks"])
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the data of {', '.join(names)} could not be had from the hub ({reason}); local "
            f"files work for {', '.join(TASKS)}"
        ) from None


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f", but {', '.join(close)}" if close else ""
    return f"there is no task {name!r}{hint}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's hints to task authors, and without bars that last a second."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    restore: Callable[[], None] = datasets.enable_progress_bars if bars else lambda: None
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        restore()
