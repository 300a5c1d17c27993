"""The tasks of `zoo evaluate`: what each is called, and what the user may ask of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tools.evaluation.batches import BatchLimits
from tools.evaluation.recall import GENERATED, RECALL
from tools.evaluation.recall.files import find_file
from tools.evaluation.recall.fillers import Filler, Split

if TYPE_CHECKING:
    from zoo.config import ModelConfig

POSITIONS = "positions"
HUB = "hub:"
_WIKITEXT = "wikitext2_raw_test"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for.

    Attributes:
        data: folder of the tasks' files.
        contexts: tokens of generated prompts; None: what each task has by itself.
        n: prompts of each part of a generated task, and questions of SQuAD.
        own_n: the same by task, for tasks that have another number.
        limit: only the first so many of these, and of the items of a file.
        seed: of everything that is drawn.
        split: which wordings and fillers.
        limits: of what is computed at once.
        far: tokens of unrelated text before the prompts of the harness's tasks, which are scored
            without it as well; 0: only without.
        compile: run what reads prompts to go on through torch.compile.
        log_likelihood: of the expected answers, too.
        search_text, judge_text: prose to hide things in; None: generated.
        text: of the loss by position; None: WikiText from `data`.
    """

    data: Path | None = None
    contexts: tuple[int, ...] | None = None
    n: int = 200
    own_n: Mapping[str, int] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    split: Split = "judge"
    limits: BatchLimits = field(default_factory=lambda: BatchLimits(rows=16))
    far: int = 1024
    compile: bool = False
    log_likelihood: bool = True
    search_text: Filler | None = None
    judge_text: Filler | None = None
    text: Path | None = None

    def prompts_of(self, task: str) -> int:
        """How many prompts each part of a task has, `limit` included."""
        n = self.own_n.get(task, self.n)
        return n if self.limit is None else min(n, self.limit)


def parse_n(values: Sequence[str]) -> tuple[int | None, dict[str, int]]:
    """What `--n` says: the number of prompts, if it does, and those of tasks that have their own.

    Raises:
        ValueError: a value is neither a number nor TASK=NUMBER, or no task has prompts like that.
    """
    common, own = None, {}
    for value in values:
        task, _, number = value.rpartition("=")
        if not number.isdecimal() or (not task and "=" in value):
            raise ValueError(f"--n must be a number or TASK=NUMBER, not {value!r}")
        if not task:
            common = int(number)
        elif task in RECALL:
            own[task] = int(number)
        else:
            raise ValueError(
                f"--n is of generated prompts, which {task!r} does not have; choose from "
                f"{', '.join(RECALL)}"
            )
    return common, own


def harness_tasks() -> Mapping[str, str]:
    """The tasks of lm-evaluation-harness that have local files, with a line on each."""
    from tools.evaluation.harness import LOCAL_TASKS

    return {name: text for name, text in LOCAL_TASKS.items() if name not in RECALL}


def descriptions() -> dict[str, str]:
    """Every task, with a line on it."""
    return {
        **{name: task.description for name, task in RECALL.items()},
        **harness_tasks(),
        POSITIONS: "loss by position, and of n-grams that the text has had before",
    }


def groups() -> dict[str, tuple[str, ...]]:
    """Names that stand for several tasks; "all" has what needs no file of FDA and SWDE."""
    commonsense = tuple(harness_tasks())
    return {
        "recall": GENERATED,
        "commonsense": commonsense,
        "lambada": ("lambada_openai",),
        "all": (*GENERATED, "kv_uuid", "squad", *commonsense, POSITIONS),
    }


def choose_tasks(names: Sequence[str]) -> list[str]:
    """The tasks that `names`, groups among them, stand for, each once.

    Raises:
        ValueError: there is no such task, or no name.
    """
    if not names:
        raise ValueError("name at least one task; --list prints them")
    known, together = descriptions(), groups()
    chosen: dict[str, None] = {}
    for name in names:
        if name not in known and name not in together and not name.startswith(HUB):
            raise ValueError(
                f"there is no task {name!r}; choose from {', '.join([*together, *known])}, or "
                f"{HUB}TASK for a task of lm-evaluation-harness"
            )
        chosen |= dict.fromkeys(together.get(name, (name,)))
    return list(chosen)


def check_tasks(tasks: Sequence[str], settings: Settings) -> None:
    """Refuses what would fail only after hours.

    Raises:
        ValueError: a file is missing, or a number is out of range.
    """
    numbers = {"n": settings.n, "limit": settings.limit}
    numbers["context"] = min(settings.contexts) if settings.contexts else None
    numbers |= {f"n of {task}": number for task, number in settings.own_n.items()}
    for what, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{what} must be at least 1, not {number}")
    if settings.far < 0:
        raise ValueError(f"far must be at least 0, not {settings.far}")
    for task in tasks:
        file = RECALL[task].file if task in RECALL else None
        if file is not None:
            find_file(settings.data, file, task)
        elif task.startswith(HUB):
            from tools.evaluation.harness import check_installed

            check_installed()
        elif task in harness_tasks():
            if settings.data is None:
                raise ValueError(f"{task} reads a local file: name its folder with --data")
            from tools.evaluation.harness import check_installed, count_items

            check_installed()
            count_items([task], settings.data)
        elif task == POSITIONS:
            position_text(settings)


def check_contexts(name: str, config: "ModelConfig", settings: Settings) -> None:
    """Refuses a context that is longer than the model's, before another one has run for an hour.

    Raises:
        ValueError: it is.
    """
    longest = config.max_position_embeddings
    if settings.contexts is not None and max(settings.contexts) > longest:
        raise ValueError(
            f"a context of {max(settings.contexts)} exceeds that of {name}, {longest}"
        )


def position_text(settings: Settings) -> Path:
    """The text of the loss by position.

    Raises:
        ValueError: there is none.
    """
    if settings.text is not None:
        if not settings.text.is_file():
            raise ValueError(f"there is no file {settings.text}; give --text another one")
        return settings.text
    if settings.data is None:
        raise ValueError(f"{POSITIONS} needs a text: give --text, or --data with {_WIKITEXT}.txt")
    return find_file(settings.data, _WIKITEXT, POSITIONS, ".txt")
