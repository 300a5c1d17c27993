"""SearchSettings: what a search reads. Only wordings and fillers of the search half are."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flasheva import EvaConfig
from flasheva.visibility import window_start
from tools.evaluation.recall import RECALL
from tools.evaluation.recall.fillers import Filler, prose_fillers, repeated_fillers
from tools.evaluation.recall.request import Request
from tools.evaluation.recall.wordings import wordings
from tools.evaluation.samples import Sample
from tools.scoring.perplexity import cut_windows
from tools.text_files import contents

if TYPE_CHECKING:
    from zoo import Tokenizer

log = logging.getLogger("zoo")

RETRIEVAL_TASKS = ("passkey", "needle")  # of the rules for retrieval, if no others are named
# What these rules may read: answers that are in the prompt, in wordings of a search half.
SEARCHABLE_TASKS = (*RETRIEVAL_TASKS, "facts")
RECALL_TASKS = ("mqar", "phonebook", "kv")
COMMONSENSE_TASKS = ("hellaswag", "piqa", "arc_easy", "winogrande")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What the user asked for.

    Attributes:
        tasks: of the rules for retrieval, some of `SEARCHABLE_TASKS`.
        contexts: tokens of a prompt and its answer.
        n: prompts for each context, wording (or size) and filler; a quarter in each part of depth.
        seed: of everything that is drawn.
        texts: prose to hide things in, besides generated prose and the repeated sentences.
        text: of perplexity and KL; None: the first of `texts`, or the generated prose.
        window, windows: tokens of a window of that text, and how many of them.
        data: folder of the files of common sense, for the rule "halo".
        limit, far: items of each of these tasks, and words of unrelated text before each.
        batch_size: rows that are read together.
        rows: rows that a block is given at a time; None: `batch_size` under 8 placements.
        share: whether placements share work; without it only time is lost.
        exchanges: see `recipes.placement.greedy`.
        steps: of the gradient method.
    """

    tasks: tuple[str, ...] = RETRIEVAL_TASKS
    contexts: tuple[int, ...] = (1024, 2048)
    n: int = 4
    seed: int = 0
    texts: tuple[Filler, ...] = ()
    text: Filler | None = None
    window: int = 2048
    windows: int = 8
    data: Path | None = None
    limit: int = 100
    far: int = 1024
    batch_size: int = 8
    rows: int | None = None
    share: bool = True
    exchanges: int = 0
    steps: int = 100

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in SEARCHABLE_TASKS:
                raise ValueError(
                    f"a search reads {', '.join(SEARCHABLE_TASKS)} for retrieval, not {task!r}"
                )
        numbers = {"n": self.n, "windows": self.windows, "limit": self.limit, "steps": self.steps}
        numbers |= {"batch_size": self.batch_size}
        numbers |= {} if self.rows is None else {"rows": self.rows}
        for what, number in numbers.items():
            if number < 1:
                raise ValueError(f"{what} must be at least 1, not {number}")
        for what, number in (("far", self.far), ("exchanges", self.exchanges)):
            if number < 0:
                raise ValueError(f"{what} must be at least 0, not {number}")

    @property
    def fillers(self) -> tuple[Filler, ...]:
        """Everything that numbers are hidden in."""
        return (*repeated_fillers("search"), *prose_fillers("search"), *self.texts)

    @property
    def running_text(self) -> Filler:
        """The text of perplexity and KL."""
        return self.text or (*self.texts, *prose_fillers("search"))[0]

    def case(self) -> dict[str, object]:
        """What scores depend on."""
        data = None if self.data is None else contents(self.data)
        return {
            "tasks": list(self.tasks),
            "contexts": list(self.contexts),
            "n": self.n,
            "seed": self.seed,
            "fillers": [filler.name for filler in self.fillers],
            "wordings": list(wordings("search")),
            "text": [self.running_text.name, self.window, self.windows],
            "commonsense": [self.limit, self.far, data],
        }

    def samples(self, tokenizer: "Tokenizer", tasks: tuple[str, ...]) -> list[Sample]:
        """The prompts of these tasks."""
        request = Request(
            tokenizer=tokenizer,
            contexts=self.contexts,
            n=self.n,
            seed=self.seed,
            split="search",
            repeated=repeated_fillers("search"),
            prose=(*prose_fillers("search"), *self.texts),
        )
        return [sample for task in tasks for sample in RECALL[task].draw(request)]

    def cut_text(self, tokenizer: "Tokenizer") -> torch.Tensor:
        """The windows of perplexity and KL, int64 [N, W]."""
        ids = tokenizer.encode(self.running_text.text, add_bos=False)
        return cut_windows(ids, self.window, self.windows)

    def lines(self, rule: str) -> Iterator[str]:
        """What a rule reads, for the record in a recipe."""
        objective = rule.partition("_")[2]
        if objective in ("retrieval", "both") or rule == "halo":
            tasks = RECALL_TASKS if rule == "halo" else self.tasks
            yield f"tasks: {', '.join(tasks)}, search half, seed {self.seed}"
            if rule != "halo" and set(self.tasks) & set(RETRIEVAL_TASKS):
                yield f"wordings: {', '.join(wordings('search'))}"
            yield f"fillers: {', '.join(filler.name for filler in self.fillers)}"
            yield f"contexts: {', '.join(map(str, self.contexts))} tokens, {self.n} prompts a cell"
        if objective in ("perplexity", "kl", "both"):
            yield f"text: {self.running_text.name}, {self.windows} windows of {self.window} tokens"
        if rule == "halo":
            names = ", ".join(COMMONSENSE_TASKS)
            yield f"common sense: {names}, {self.limit} items each behind {self.far} words"


def check_length(
    eva: EvaConfig,
    objective: str,
    contexts: Sequence[int],
    window: int,
    *,
    options: tuple[str, str] = ("--context", "--window"),
) -> None:
    """Refuses texts in which every placement is the same model, and warns of those among others.

    Args:
        eva: of the layers that are not exact.
        objective: "retrieval" and "recall" read `contexts`, the others `window`.
        contexts, window: see `SearchSettings`.
        options: how the user writes these two.

    Raises:
        ValueError: no token is further back than window and sinks reach.
    """
    of_prompts = objective in ("retrieval", "recall")
    sizes, option = (contexts, options[0]) if of_prompts else ([window], options[1])
    # The last token is only a target: no query stands there.
    inside = [
        tokens
        for tokens in sizes
        if int(window_start(eva, torch.tensor(tokens - 2))) <= eva.sink_size
    ]
    if len(inside) < len(sizes):
        for tokens in inside:
            log.warning("%s %d fits into the window and tells no placement apart", option, tokens)
        return
    tokens = max(sizes)
    raise ValueError(
        f"{objective} is read in {tokens} tokens, which fit into the window of "
        f"{eva.window_size}{' and the sinks' if tokens > eva.window_size else ''}: every "
        f"placement is the same model there; {option} {2 * eva.window_size} would tell them apart"
    )
