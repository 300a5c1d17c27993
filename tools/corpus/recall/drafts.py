"""draw_draft: what a recall document tells and asks for, in order, and how much hay is between.

    hay FACT FACT QUESTION hay FACT QUESTION hay QUESTION QUESTION ... QUESTION

The first corpus asked for five facts in 1,024 tokens, each once. A model of 7 million parameters
learned from it to answer with any value of the right kind, but not with that of the right person
(docs/embedded.md). So documents now ask as often as fits, for each fact several times and in
other words, a few tokens behind it and far behind; and most have less hay, or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tools.corpus.prompts import Draw
from tools.corpus.recall.facts import (
    KINDS,
    MORE_KINDS,
    NOTES,
    PEOPLE,
    Fact,
    Kind,
    draw_facts,
    invent_names,
)
from tools.corpus.recall.hay import Hay
from tools.corpus.recall.units import Unit
from tools.corpus.recall.wordings import Choices, Split, Worded, word

_JOINT = 2  # tokens of the empty line before or behind a unit that stands alone
_INVENTED = 2  # one document of so many is about invented names
_ALONE = 4  # in one document of so many facts are paragraphs of their own
_FEWEST = 2  # facts of a document
_TOLD_BY = 0.8  # of the document: where the last facts are told
_SOON = 4  # one question in so many stands soon behind its fact,
_NEAREST = 0.01  # by so much of what is left of the document at the least
_BATCH = 8  # questions that are tokenised together


@dataclass(frozen=True)
class Style:
    """How documents of a kind are made.

    Attributes:
        hay: the least part of the tokens that stories have.
        facts: at most, in 1,024 tokens; two at least, and as often few as many.
        often: questions for a fact on average, at most; there is more hay then.
        notes: facts are names with a word or a number behind them, and nothing else.
    """

    hay: float
    facts: int
    often: int
    notes: bool = False

    def count(self, draw: Draw, room: int) -> int:
        """How many facts a document of so many tokens has.

        Few are easy to tell apart, and what is learned from them serves for many.
        """
        most = max(_FEWEST, self.facts * min(room / 1000, 1.0 if self.notes else 4.0))
        return int(_FEWEST * ((most + 1) / _FEWEST) ** (draw.below(1000) / 1000))


# Of ten documents: short facts teach what is to be done at all, stories where.
STYLES = (
    *(Style(0.0, 28, often=30, notes=True),) * 2,
    *(Style(0.0, 24, often=4),) * 3,
    *(Style(0.4, 16, often=2),) * 3,
    *(Style(0.7, 9, often=2),) * 2,
)


def draw_draft(draw: Draw, hay: Hay, room: int, split: Split) -> list[Unit]:
    """Units of about so many tokens, the last of which is a question.

    Args:
        draw: chooses.
        hay: the stories.
        room: tokens.
        split: which wordings; tests have no notes and no kinds but those of tests.
    """
    style = draw.one([s for s in STYLES if split == "train" or not s.notes])
    facts = _facts(draw, style.count(draw, room), style.notes, split)
    alone = style.notes or draw.below(_ALONE) == 0
    times = [_TOLD_BY * draw.below(1000) / 1000 for _ in facts]
    told = [_word(draw, fact, split) for fact in facts]
    placed = [
        (time, Unit(w.told, alone=alone, tells=w)) for time, w in zip(times, told, strict=True)
    ]
    left = room - sum(hay.sizes([w.told for w in told])) - _JOINT * alone * len(told)
    most = style.often * len(facts)
    when = dict(zip(facts, times, strict=True))
    asked, used = _asked(draw, hay, when, left - int(style.hay * room), most, split)
    sentences = hay.draw(draw, 0 if style.notes else left - used)
    placed += [(number / len(sentences), unit) for number, unit in enumerate(sentences)]
    last = max(asked, key=lambda pair: pair[0])
    placed += [pair for pair in asked if pair is not last]
    return [unit for _, unit in sorted(placed, key=lambda pair: pair[0])] + [last[1]]


def _facts(draw: Draw, count: int, notes: bool, split: Split) -> list[Fact]:
    if split == "test":
        return draw_facts(draw, count)
    kinds: Mapping[str, Kind] = {**KINDS, **MORE_KINDS}
    if notes:
        name = draw.one(list(NOTES))
        kinds = {name: NOTES[name]}
    invented = draw.below(_INVENTED) == 0
    people = invent_names(draw, count + 3) if invented else PEOPLE
    return draw_facts(draw, count, kinds=kinds, people=people)


def _asked(
    draw: Draw, hay: Hay, told: Mapping[Fact, float], room: int, most: int, split: Split
) -> tuple[list[tuple[float, Unit]], int]:
    """Questions and when they are asked, and their tokens.

    At least one question, `most` at most, and no more tokens than `room`.

    Most stand anywhere behind the fact. One in `_SOON` stands soon behind it: as often 1 to 10
    hundredths of a document as 10 to 100.
    """
    asked: list[tuple[float, Unit]] = []
    used = 0
    while True:
        batch = [_word(draw, draw.one(list(told)), split) for _ in range(_BATCH)]
        for w, size in zip(batch, hay.sizes([w.answered for w in batch]), strict=True):
            if asked and (used + size + _JOINT > room or len(asked) == most):
                return asked, used
            used += size + _JOINT
            time, part = told[w.fact], draw.below(1000) / 1000
            if draw.below(_SOON) == 0:
                part = _NEAREST ** (1 - part)
            asked.append((time + part * (1 - time), Unit(w.answered, alone=True, asks=w)))


def _word(draw: Draw, fact: Fact, split: Split) -> Worded:
    return word(fact, split, Choices(*(draw.below(9973) for _ in range(5))))
