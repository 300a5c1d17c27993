"""Facts: a fact of a story is asked for at its end, by the tokens between the two.

The facts and wordings are those of recall documents (tools/corpus/recall/), of which `search` has
the ones that the embedded model is trained with and `judge` others.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tools.corpus.prompts import Draw
from tools.corpus.recall.documents import draw_worded
from tools.corpus.recall.hay import Hay
from tools.corpus.recall.units import Unit, text_of
from tools.corpus.recall.wordings import Split, Worded
from tools.evaluation.recall.fillers import Filler
from tools.evaluation.recall.request import DEPTH_BINS, Request
from tools.evaluation.samples import Sample
from tools.scoring.rows import start_ids

if TYPE_CHECKING:
    from zoo import Tokenizer

_NEAREST = 80  # tokens: beyond a window of 64 that moves in steps of 8
_FACTS = 4
_MORE = 128  # tokens of hay that rows are cut from, beyond the context
_SPLITS: dict[str, tuple[Split, ...]] = {
    "search": ("train",),
    "judge": ("test",),
    "all": ("train", "test"),
}
_NEW_TOKENS = 24  # an answer has 18 letters at most, and a tokenizer may have only bytes
_HAY_CHARACTERS = 1_000_000


def facts(request: Request) -> Iterator[Sample]:
    """A fact of a simple story, asked for at the end of it: "exact".

    Three other facts are told, too, most often some of the same kind. A cell's distance is that
    between fact and answer: so many tokens, up to those of the next cell and a sentence.
    """
    for context in request.contexts:
        edges = distances(context)
        for filler in request.prose:
            hay = _hay(request.tokenizer, filler)
            for number in range(request.n):
                seed = ("facts", request.seed, request.split, context, filler.name, number)
                draw = Draw(*seed)
                low, high = edges[number % DEPTH_BINS : number % DEPTH_BINS + 2]
                distance = low + draw.below(high - low)
                split = _SPLITS[request.split][number // DEPTH_BINS % len(_SPLITS[request.split])]
                told = draw_worded(draw, _FACTS, split)
                text = _story(draw, hay, told, context, distance)
                prompt, answer = _ids(request.tokenizer, text, told[0].fact.value, context)
                yield Sample(
                    task="facts",
                    cell={"context": context, "distance": low, "filler": filler.name},
                    # One text may serve both halves, whose prompts differ.
                    item=f"{request.seed}-{request.split}-{number}",
                    prompt_ids=prompt,
                    answer_ids=answer,
                    answers=(told[0].fact.value,),
                    max_new_tokens=_NEW_TOKENS,
                    match="exact",
                )


def distances(context: int) -> list[int]:
    """Edges of the cells, in tokens; each is as many times farther than the one before.

    Raises:
        ValueError: the context is too short.
    """
    farthest = context * 7 // 8
    if farthest < 2 * _NEAREST:
        raise ValueError(
            f"facts are told {_NEAREST} tokens before the answer or earlier; choose a context of "
            f"at least {-(-2 * _NEAREST * 8 // 7)} tokens, not {context}"
        )
    step = (farthest / _NEAREST) ** (1 / DEPTH_BINS)
    return [round(_NEAREST * step**i) for i in range(DEPTH_BINS + 1)]


@functools.lru_cache(maxsize=4)
def _hay(tokenizer: "Tokenizer", filler: Filler) -> Hay:
    return Hay(filler.text[:_HAY_CHARACTERS].split("\n\n"), tokenizer)


def _story(draw: Draw, hay: Hay, told: Sequence[Worded], context: int, distance: int) -> str:
    """A story of at least `context` tokens up to the answer for the first fact.

    That fact is so many tokens before its question, or a sentence more.

    Raises:
        ValueError: the hay's sentences do not fill that distance.
    """
    sentences = hay.draw(draw, context + _MORE)
    first, *others = (Unit(worded.told, tells=worded) for worded in told)
    sizes = dict(zip(others, hay.sizes([unit.text for unit in others]), strict=True))
    for unit in others:
        sentences.insert(draw.below(len(sentences) + 1), unit)
    at, behind = len(sentences), hay.sizes([told[0].question])[0]
    while behind < distance:
        if at == 0:
            raise ValueError(
                f"the sentences of a text are too long to tell a fact {distance} tokens before "
                f"the end of {context}; choose a text with shorter ones, or a longer context"
            )
        at -= 1
        unit = sentences[at]
        behind += sizes[unit] if unit in sizes else hay.size(unit)
    question = Unit(told[0].question, alone=True)
    return text_of([*sentences[:at], first, *sentences[at:], question])


def _ids(
    tokenizer: "Tokenizer", text: str, value: str, context: int
) -> tuple[list[int], list[int]]:
    """The end of the text, so that it has `context` tokens with the value; and the value."""
    alone = tokenizer.encode(text, add_bos=False)
    both = tokenizer.encode(f"{text} {value}", add_bos=False)
    pairs = enumerate(zip(alone, both, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), len(alone))
    start = start_ids(tokenizer)
    return [*start, *both[len(both) - context + len(start) : same]], both[same:]
