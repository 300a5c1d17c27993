"""RECALL: tasks that ask a model for something that its prompt holds, scored by generation."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tools.evaluation.recall.facts import facts
from tools.evaluation.recall.lists import key_values, mqar, phonebook
from tools.evaluation.recall.needles import multikey, multivalue, needle, passkey
from tools.evaluation.recall.published import UUID_FILE, fda, swde, uuids
from tools.evaluation.recall.request import Request
from tools.evaluation.recall.squad import FILE, squad
from tools.evaluation.recall.tracking import variables
from tools.evaluation.samples import Sample


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """A task.

    Attributes:
        draw: makes its samples.
        description: one line.
        file: what it reads in the user's data folder, without the end; None: it is generated.
        contexts: the lengths that it has if the user names none; (): the model's limit.
        reports: parts of the cell; there is a score for each value that such a part takes.
        grouped: whether a generated task is one of the group "recall".
    """

    draw: Callable[[Request], Iterator[Sample]]
    description: str
    file: str | None = None
    contexts: tuple[int, ...] = (1024, 2048)
    reports: tuple[tuple[str, ...], ...] = (("context", "size"), ("context", "depth"))
    grouped: bool = True


# Up to the limit of the models that the suite was made for; longer ones take --context.
_GRID = (1024, 2048, 4096, 8192)
_BY_DEPTH = (("context",), ("context", "depth"))
_BY_WORDING = (*_BY_DEPTH, ("context", "wording"))

RECALL: Mapping[str, RecallTask] = {
    "passkey": RecallTask(
        draw=passkey,
        description="a number in repeated sentences",
        contexts=_GRID,
        reports=_BY_WORDING,
    ),
    "needle": RecallTask(
        draw=needle, description="a number in prose", contexts=_GRID, reports=_BY_WORDING
    ),
    "multikey": RecallTask(draw=multikey, description="one number of several, by its key (RULER)"),
    "multivalue": RecallTask(draw=multivalue, description="all numbers of a key (RULER)"),
    "variables": RecallTask(draw=variables, description="variable tracking (RULER)"),
    "mqar": RecallTask(draw=mqar, description="associative recall of word pairs (Zoology)"),
    "phonebook": RecallTask(draw=phonebook, description="a phone number by its name"),
    "kv": RecallTask(draw=key_values, description="a short value of a JSON object"),
    "facts": RecallTask(
        draw=facts,
        description="a fact of a simple story, by distance (docs/embedded.md)",
        contexts=(1024,),
        reports=(("context",), ("context", "distance")),
        grouped=False,
    ),
    "kv_uuid": RecallTask(
        draw=uuids, description="a UUID of a JSON object", file=UUID_FILE, reports=_BY_DEPTH
    ),
    "squad": RecallTask(
        draw=squad,
        description="SQuAD, alone and among other paragraphs",
        file=FILE,
        contexts=(1024, 2048, 4096),
        reports=_BY_DEPTH,
    ),
    "fda": RecallTask(
        draw=fda,
        description="values in FDA documents",
        file="fda",
        contexts=(),
        reports=(("context",),),
    ),
    "swde": RecallTask(
        draw=swde,
        description="values in web pages",
        file="swde",
        contexts=(),
        reports=(("context",),),
    ),
}
GENERATED = tuple(name for name, task in RECALL.items() if task.file is None and task.grouped)
