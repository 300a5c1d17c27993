"""Variable tracking: names that are assigned to each other in a long text (RULER)."""

from collections.abc import Iterator
from string import ascii_uppercase

from tools.evaluation.recall.request import Place, Request
from tools.evaluation.samples import Sample

_HOPS = (1, 2, 4)  # RULER: 4


def variables(request: Request) -> Iterator[Sample]:
    """Which variables have a value? (RULER's vt with one chain, arXiv 2404.06654): "all".

    "VAR ABCDE = 12345" and, later in the text, "VAR FGHIJ = VAR ABCDE" and so on; `size` is the
    number of such hops, and all size + 1 names are wanted. The depth is that of the first
    assignment, the others are anywhere behind it. RULER shows a worked example first; so does
    this, a short one with other names.
    """
    for size in _HOPS:
        for context in request.contexts:
            for filler in request.prose:
                rows = request.rows(filler, context)
                for place in request.places("variables", context, filler.name, size):
                    source = place.source
                    names = _names(place, 2 * (size + 1))
                    number, shown = (str(x) for x in source.sample(range(10_000, 100_000), 2))
                    mine, example = names[: size + 1], names[size + 1 :]
                    chain = _chain(mine, number)
                    inserts = [rows.encode(f"\n\n{line}\n\n") for line in chain]
                    first = rows.encode(
                        " ".join(_chain(example, shown))
                        + f"\n{_question(shown, size)} {', '.join(example)}.\n\n"
                    )
                    question, answer = rows.split(
                        f"\n\n{_question(number, size)}", " " + ", ".join(mine)
                    )
                    room = rows.room(first, *inserts, question, answer)
                    rest = sorted(source.uniform(place.depth, 1) for _ in range(size))
                    at = [int(depth * room) for depth in (place.depth, *rest)]
                    row = rows.assemble(
                        [(0, first), *zip(at, inserts, strict=True)],
                        question,
                        answer,
                        place.offset,
                    )
                    yield place.sample(
                        "variables",
                        row,
                        {"context": context, "size": size, "filler": filler.name},
                        answers=tuple(mine),
                        max_new_tokens=8 * (size + 1),
                        match="all",
                    )


def _names(place: Place, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(place.source.choices(ascii_uppercase, k=5))] = None
    return list(names)


def _chain(names: list[str], number: str) -> list[str]:
    values = [number, *(f"VAR {name}" for name in names)]
    return [f"VAR {name} = {value}" for name, value in zip(names, values, strict=False)]


def _question(number: str, hops: int) -> str:
    return (
        f"Question: Find all variables that are assigned the value {number} in the text above. "
        "Answer: According to the chain of variable assignments in the text above, "
        f"{hops + 1} variables are assigned the value {number}, they are:"
    )
