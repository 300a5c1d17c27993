"""Lists: pairs of a key and a value that stand together in a long text; one value is asked for.

The list is put into prose, so that a row is exactly `context` tokens long however many pairs
there are, and so that no pair need be among the last tokens. The depth is the part of the hay and
the list that stands before the pair that is asked for.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tools.evaluation.recall.request import Place, Request
from tools.evaluation.recall.words import ADJECTIVES, FIRST_NAMES, LAST_NAMES, NOUNS
from tools.evaluation.samples import Match, Sample
from tools.scoring.rows import Row, Rows

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a list looks.

    Attributes:
        head, line, tail: of the list; `line` is of a key and a value.
        last_line: like `line`, for the last pair.
        question: what is asked of a key, and the pairs that are there; the answer follows it.
        answer: how the text goes on, of a value.
    """

    head: str
    line: str
    tail: str
    question: Callable[[str, Sequence[Pair]], str]
    answer: str = " {value}"
    last_line: str | None = None


def hide(rows: Rows, place: Place, form: Form, pairs: Sequence[Pair]) -> tuple[Row, Pair]:
    """A row with these pairs in it, and the pair that it asks for.

    Raises:
        ValueError: the pairs do not fit.
    """
    lines = [form.line] * (len(pairs) - 1) + [form.last_line or form.line]
    texts = [
        line.format(key=key, value=value) for line, (key, value) in zip(lines, pairs, strict=True)
    ]
    entries = rows.encode_batch(texts)
    head, tail = rows.encode(form.head), rows.encode(form.tail)
    before = [len(head) + sum(map(len, entries[:i])) for i in range(len(entries))]
    block = [*head, *(token for entry in entries for token in entry), *tail]

    def asked(i: int) -> tuple[list[int], list[int]]:
        key, value = pairs[i]
        others = [*pairs[:i], *pairs[i + 1 :]]
        return rows.split(form.question(key, others), form.answer.format(value=value))

    # Questions may differ by a token or two, so the room of one is only close to another's.
    target = place.depth * (rows.room(*asked(0)) - 1)
    room = rows.room(block, *asked(0))
    fits = [i for i, size in enumerate(before) if 0 <= target - size <= room]
    chosen = place.source.choice(fits) if fits else _nearest(before, target, room)
    question, answer = asked(chosen)
    at = min(max(int(target) - before[chosen], 0), rows.room(block, question, answer))
    return rows.assemble([(at, block)], question, answer, place.offset), pairs[chosen]


def _nearest(before: Sequence[int], target: float, room: int) -> int:
    """Where the list is longer than the hay, the pair that comes closest."""
    gaps = [max(size - target, target - size - room) for size in before]
    return gaps.index(min(gaps))


def _samples(
    task: str,
    request: Request,
    sizes: Sequence[int],
    form: Form,
    draw: Callable[[Place, int], list[Pair]],
    match: Match,
    max_new_tokens: int,
) -> Iterator[Sample]:
    for size in sizes:
        for context in request.contexts:
            for filler in request.prose:
                rows = request.rows(filler, context)
                for place in request.places(task, context, filler.name, size):
                    row, (_, value) = hide(rows, place, form, draw(place, size))
                    yield place.sample(
                        task,
                        row,
                        {"context": context, "size": size, "filler": filler.name},
                        answers=(value,),
                        max_new_tokens=max_new_tokens,
                        match=match,
                    )


# What may be written has room for every answer, even of a tokenizer whose tokens are bytes.
_MQAR_SIZES = (4, 8, 16, 32)
_QUERIES = 4


def mqar(request: Request) -> Iterator[Sample]:
    """Associative recall of many pairs (MQAR, Zoology, arXiv 2312.04927), in words: "exact".

    `size` pairs of two words, the text, then queries: some pairs once more in another order, of
    which the last one's value is asked for. The model sees the values of the earlier queries, as
    in Zoology, where each position predicts the next. There, models are trained for this; a
    published model has to see from the repetition what is wanted.
    """

    def draw(place: Place, size: int) -> list[Pair]:
        keys = place.source.sample(NOUNS, size)
        return list(zip(keys, place.source.sample(ADJECTIVES, size), strict=True))

    def question(key: str, others: Sequence[Pair]) -> str:
        earlier = _sample(others, _QUERIES - 1, key)
        return "\n\n" + "".join(f"{a} -> {b}\n" for a, b in earlier) + f"{key} ->"

    form = Form(head="\n\n", line="{key} -> {value}\n", tail="\n", question=question)
    yield from _samples("mqar", request, _MQAR_SIZES, form, draw, "exact", 10)


def _sample(pairs: Sequence[Pair], count: int, key: str) -> list[Pair]:
    """Some of the pairs, the same for every tokenizer."""
    return random.Random(key).sample(list(pairs), min(count, len(pairs)))


_PHONE_SIZES = (5, 10, 20, 30)


def phonebook(request: Request) -> Iterator[Sample]:
    """A phone book (arXiv 2402.01032, 2402.19427): "whole".

    `size` names with a number of seven digits each; after the text, the numbers of two of them
    are told once more, as examples, and a third is asked for.
    """
    everybody = [f"{a} {b}" for a in FIRST_NAMES for b in LAST_NAMES]

    def draw(place: Place, size: int) -> list[Pair]:
        source = place.source
        names = source.sample(everybody, size)
        numbers = source.sample(range(10_000_000), size)
        return [
            (name, f"{number // 10_000:03}-{number % 10_000:04}")
            for name, number in zip(names, numbers, strict=True)
        ]

    def question(key: str, others: Sequence[Pair]) -> str:
        told = "".join(f"{name}: {number}\n" for name, number in _sample(others, 2, key))
        return f"\n\nFrom the phone book above:\n{told}{key}:"

    form = Form(head="\n\nPhone book:\n", line="{key}: {value}\n", tail="\n", question=question)
    yield from _samples("phonebook", request, _PHONE_SIZES, form, draw, "whole", 12)


_KV_SIZES = (5, 10, 20, 40)


def key_values(request: Request) -> Iterator[Sample]:
    """A JSON object of which one value is asked for (arXiv 2307.03172): "whole".

    As published, but with `size` keys of one word and values of four digits in the place of 75
    pairs of UUIDs, which small models cannot copy even with full attention.
    """

    def draw(place: Place, size: int) -> list[Pair]:
        keys = place.source.sample(NOUNS, size)
        values = place.source.sample(range(1_000, 10_000), size)
        return [(key, str(value)) for key, value in zip(keys, values, strict=True)]

    yield from _samples("kv", request, _KV_SIZES, json_form(), draw, "whole", 10)


def json_form() -> Form:
    """A JSON object, and the question for one of its values."""

    def question(key: str, others: Sequence[Pair]) -> str:
        del others
        # The key once more, as it stands in the object: with full attention SmolLM2-135M-Instruct
        # answers the published 'Corresponding value: ' in 1 of 4 prompts even of 5 pairs.
        return f'\n\nKey: "{key}"\nCorresponding value: {{"{key}": "'

    return Form(
        head="\n\nExtract the value corresponding to the specified key in the JSON object "
        "below.\n\nJSON data:\n{",
        line='"{key}": "{value}",\n ',
        last_line='"{key}": "{value}"',
        tail="}\n\n",
        question=question,
        answer="{value}",
    )
