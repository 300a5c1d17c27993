"""Needles: numbers hidden in a long text, one or several of them.

Every row is exactly `context` tokens long, answer included, and every number is of five digits
(passkey, needle) or seven (multikey, multivalue), which no other needle of the row shares.
"""

from collections.abc import Iterator, Sequence

from tools.evaluation.recall.fillers import Filler
from tools.evaluation.recall.request import Place, Request
from tools.evaluation.recall.wordings import wordings
from tools.evaluation.recall.words import ADJECTIVES, NOUNS
from tools.evaluation.samples import Sample
from tools.scoring.passkey_prompts import needle_row

_KEYS, _VALUES = (4,), (2, 4)  # RULER: 4 of either
_MORE_TOKENS = 4  # than the answer has: a number that goes on is another number


def passkey(request: Request) -> Iterator[Sample]:
    """A pass key in repeated sentences (arXiv 2305.16300): "whole"."""
    yield from _single("passkey", request, request.repeated)


def needle(request: Request) -> Iterator[Sample]:
    """A number in prose, over contexts and depths: "whole".

    The needle in a haystack, RULER's niah_single_2 (arXiv 2404.06654), in several wordings.
    """
    yield from _single("needle", request, request.prose)


def _single(task: str, request: Request, fillers: Sequence[Filler]) -> Iterator[Sample]:
    for context in request.contexts:
        for filler in fillers:
            rows = request.rows(filler, context)
            for name, wording in wordings(request.split).items():
                for place in request.places(task, context, filler.name, name):
                    number = str(place.source.randrange(10_000, 100_000))
                    row = needle_row(rows, wording, number, place.depth, place.offset)
                    yield place.sample(
                        task,
                        row,
                        {"context": context, "wording": name, "filler": filler.name},
                        answers=(number,),
                        max_new_tokens=5 + _MORE_TOKENS,
                        match="whole",
                    )


def multikey(request: Request) -> Iterator[Sample]:
    """Several keys with a number each, one of which is asked for: "whole".

    RULER's niah_multikey_1 (arXiv 2404.06654). `size` is the number of keys; the depth is that of
    the one asked for, the others are anywhere.
    """
    for size in _KEYS:
        yield from _several("multikey", request, size)


def multivalue(request: Request) -> Iterator[Sample]:
    """One key with several numbers, all of which are asked for: "all", the part that is written.

    RULER's niah_multivalue (arXiv 2404.06654). `size` is how many; the depth is that of one of
    them, the others are anywhere.
    """
    for size in _VALUES:
        yield from _several("multivalue", request, size)


def _several(task: str, request: Request, size: int) -> Iterator[Sample]:
    all_of_them = task == "multivalue"
    for context in request.contexts:
        for filler in request.prose:
            rows = request.rows(filler, context)
            for place in request.places(task, context, filler.name, size):
                source = place.source
                numbers = [str(x) for x in source.sample(range(1_000_000, 10_000_000), size)]
                keys = _keys(place, 1 if all_of_them else size) * (size if all_of_them else 1)
                needles = [
                    rows.encode(
                        f"\n\nOne of the special magic numbers for {key} is: {number}.\n\n"
                    )
                    for key, number in zip(keys, numbers, strict=True)
                ]
                depths = [place.depth, *(source.random() for _ in range(size - 1))]
                order = sorted(range(size), key=depths.__getitem__)
                values = [numbers[i] for i in order] if all_of_them else numbers[:1]
                what, verb = ("numbers", "are") if all_of_them else ("number", "is")
                asked = f"the special magic {what} for {keys[0]} mentioned in the text"
                question, answer = rows.split(
                    f"\n\nWhat {verb} {asked} above? T{asked[1:]} {verb}:", " " + ", ".join(values)
                )
                room = rows.room(*needles, question, answer)
                inserts = [(int(depths[i] * room), needles[i]) for i in order]
                row = rows.assemble(inserts, question, answer, place.offset)
                yield place.sample(
                    task,
                    row,
                    {"context": context, "size": size, "filler": filler.name},
                    answers=tuple(values),
                    max_new_tokens=(9 if all_of_them else 0) * size + 7 + _MORE_TOKENS,
                    match="all" if all_of_them else "whole",
                )


def _keys(place: Place, count: int) -> list[str]:
    """Different keys of two words, such as "quick-river"."""
    firsts = place.source.sample(ADJECTIVES, count)
    return [f"{a}-{b}" for a, b in zip(firsts, place.source.sample(NOUNS, count), strict=True)]
