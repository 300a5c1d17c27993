"""FDA, SWDE and the UUIDs of "Lost in the Middle": tasks that are read from the user's files."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from tools.evaluation.recall.files import find_file, item_suffix, read_records
from tools.evaluation.recall.lists import Form, Pair, hide, json_form
from tools.evaluation.recall.request import Request
from tools.evaluation.samples import Sample
from tools.scoring.rows import Rows, start_ids

UUID_FILE = "kv_retrieval_75"
log = logging.getLogger("zoo")

_NEW_TOKENS = 48  # as lm-evaluation-harness has it for both


def fda(request: Request) -> Iterator[Sample]:
    """Values read out of documents of the FDA (Based, arXiv 2402.18668): "contains"."""
    yield from _extraction("fda", request)


def swde(request: Request) -> Iterator[Sample]:
    """Values read out of web pages (Based, arXiv 2402.18668): "contains"."""
    yield from _extraction("swde", request)


def _extraction(task: str, request: Request) -> Iterator[Sample]:
    """The lines of hazyresearch/based-fda or based-swde, in order.

    A "text" ends where the value follows; "key" says what it is, "value" is looked for in what
    the model writes. As lm-evaluation-harness does, a text loses its beginning where it is longer
    than the greatest of the contexts; the item's name then says how much is left.

    Raises:
        ValueError: the file is broken, or no context has room for an answer.
    """
    path = find_file(request.data, task, task)
    longest = max(request.contexts)
    start, encode = start_ids(request.tokenizer), request.tokenizer.encode
    room = longest - _NEW_TOKENS - len(start)
    if room < 1:
        raise ValueError(
            f"a context of {longest} tokens has no room for a document before the {_NEW_TOKENS} "
            f"tokens of an answer; choose a greater context for {task}"
        )
    records = read_records(path, ("text", "key", "value"), dict)
    for number, record in enumerate(records[: request.n]):
        value = str(record["value"])
        if not value.strip():  # every text contains it
            log.warning("%s: record %d has an empty value and is left out", path, number)
            continue
        ids = encode(str(record["text"]).rstrip(), add_bos=False)
        cut = f"-last{room}" if len(ids) > room else ""
        ids = ids[-room:]
        yield Sample(
            task=task,
            cell={"context": "published"},
            item=f"{number}-{record['key']}{cut}{item_suffix(path)}",
            prompt_ids=[*start, *ids],
            answer_ids=encode(f" {value}", add_bos=False),
            answers=(value,),
            max_new_tokens=_NEW_TOKENS,
            match="contains",
        )


def uuids(request: Request) -> Iterator[Sample]:
    """A JSON object of UUIDs, one value of which is asked for (arXiv 2307.03172): "whole".

    The published file has 75 pairs; here are as many of each record's as fit into `context`, with
    prose in the place of what is left over. The pair at the depth is asked for, not the record's.
    """
    path = find_file(request.data, UUID_FILE, "kv_uuid")
    records = read_records(path, ("records",), _pairs)
    form = json_form()
    for context in request.contexts:
        for filler in request.prose:
            rows = request.rows(filler, context)
            for place, given in zip(
                request.places("kv_uuid", context, filler.name), records, strict=False
            ):
                pairs = _fitting(rows, form, given, context)
                row, (_, value) = hide(rows, place, form, pairs)
                yield Sample(
                    task="kv_uuid",
                    cell={
                        "context": context,
                        "depth": place.bin,
                        "filler": filler.name,
                    },
                    item=f"{place.item}{item_suffix(path)}",
                    prompt_ids=row.prompt_ids,
                    answer_ids=row.answer_ids,
                    answers=(value,),
                    max_new_tokens=_NEW_TOKENS,
                    match="whole",
                )


def _pairs(record: Mapping[str, object]) -> list[Pair]:
    pairs = [(str(key), str(value)) for key, value in cast("list[list[str]]", record["records"])]
    if not pairs or not all(key and value for key, value in pairs):
        raise ValueError("no pairs, or an empty one")
    return pairs


def _fitting(rows: Rows, form: Form, pairs: Sequence[Pair], context: int) -> list[Pair]:
    """As many of the pairs as a row can hold."""

    def size(pair: Pair) -> int:
        return len(rows.encode(form.line.format(key=pair[0], value=pair[1])))

    # A question holds two more keys and a value, and may have some tokens more for another pair.
    frame = form.head + form.tail + form.question("", ())
    left = context - len(rows.encode(frame)) - 3 * size(pairs[0])
    fitting: list[Pair] = []
    for pair in pairs:
        left -= size(pair)
        if left < 0 and fitting:
            break
        fitting.append(pair)
    return fitting
