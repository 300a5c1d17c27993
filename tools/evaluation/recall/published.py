"""FDA, SWDE and the UUIDs of "Lost in the Middle": tasks that are read from the user's files."""

from collections.abc import Iterator, Sequence
from typing import cast

from tools.evaluation.recall.files import find_file, read_records
from tools.evaluation.recall.lists import Form, Pair, hide, json_form
from tools.evaluation.recall.request import Request
from tools.evaluation.samples import Sample
from tools.scoring.rows import Rows, start_ids

UUID_FILE = "kv_retrieval_75"
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
    than the greatest of the contexts.
    """
    path = find_file(request.data, task, task)
    longest = max(request.contexts)
    start, encode = start_ids(request.tokenizer), request.tokenizer.encode
    for number, record in enumerate(read_records(path, ("text", "key", "value"))[: request.n]):
        value = str(record["value"])
        ids = encode(str(record["text"]).rstrip(), add_bos=False)
        ids = ids[-(longest - _NEW_TOKENS - len(start)) :]
        yield Sample(
            task=task,
            cell={"context": "published"},
            item=f"{number}-{record['key']}",
            prompt_ids=[*start, *ids],
            answer_ids=encode(f" {value}", add_bos=False),
            answers=(value,),
            max_new_tokens=_NEW_TOKENS,
            match="contains",
        )


def uuids(request: Request) -> Iterator[Sample]:
    """A JSON object of UUIDs, one value of which is asked for (arXiv 2307.03172): "whole".

    The published file has 75 pairs; here are as many of each record's, the one that is asked for
    among them, as fit into `context` with prose in the place of what is left over.
    """
    records = read_records(
        find_file(request.data, UUID_FILE, "kv_uuid"), ("key", "value", "records")
    )
    form = json_form()
    for context in request.contexts:
        for filler in request.prose:
            rows = request.rows(filler, context)
            for place, record in zip(
                request.places("kv_uuid", context, filler.name), records, strict=False
            ):
                pairs = [(str(k), str(v)) for k, v in cast("list[list[str]]", record["records"])]
                pairs = _fitting(rows, form, pairs, context)
                row, (_, value) = hide(rows, place, form, pairs)
                yield Sample(
                    task="kv_uuid",
                    cell={
                        "context": context,
                        "depth": place.bin,
                        "filler": filler.name,
                    },
                    item=place.item,
                    prompt_ids=row.prompt_ids,
                    answer_ids=row.answer_ids,
                    answers=(value,),
                    max_new_tokens=_NEW_TOKENS,
                    match="whole",
                )


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
