"""draw_draft: what a recall document tells and asks for, in order, and how much hay is between.

    hay FACT FACT QUESTION hay FACT QUESTION hay QUESTION QUESTION ... QUESTION

The first corpus asked for five facts in 1,024 tokens, each once. A model of 7 million parameters
learned from it to answer with any value of the right kind, but not with that of the right person
(docs/embedded.md). So documents now ask as often as fits, for each fact several times and in
other words, a few tokens behind it and far behind; and most have less hay, or none.
"""

from collections.abc import Mapping, Sequence
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
_TOLD_BY = 0.8  # of the document: where the last facts are told
_SOON = 4  # one question in so many stands soon behind its fact,
_NEAREST = 0.01  # by so much of what is left of the document at the least
_BATCH = 8  # questions that are tokenised together


@dataclass(frozen=True)
class Style:
    """How documents of a kind are made.

    Attributes:
        hay: the part of the tokens that stories have.
        facts: how many there are in 1,024 tokens.
        notes: facts are names with a word or a number behind them, and nothing else.
    """

    hay: float
    facts: range
    notes: bool = False


# Of ten documents: short facts first teach what is to be done at all, stories then where.
STYLES = (
    *(Style(0.0, range(4, 29), notes=True),) * 2,
    *(Style(0.0, range(4, 25)),) * 3,
    *(Style(0.4, range(6, 17)),) * 3,
    *(Style(0.7, range(4, 10)),) * 2,
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
    scale = min(room / 1000, 1.0 if style.notes else 4.0)  # there are 30 people, a note for each
    facts = _facts(draw, style, max(2, round(draw.one(style.facts) * scale)), split)
    alone = style.notes or draw.below(_ALONE) == 0
    times = [_TOLD_BY * draw.below(1000) / 1000 for _ in facts]
    told = [_word(draw, fact, split) for fact in facts]
    placed = [
        (time, Unit(w.told, alone=alone, tells=w)) for time, w in zip(times, told, strict=True)
    ]
    sentences = hay.draw(draw, int(style.hay * room))
    left = room - sum(map(hay.size, sentences))
    left -= sum(hay.sizes([w.told for w in told])) + _JOINT * alone * len(told)
    placed += [(number / len(sentences), unit) for number, unit in enumerate(sentences)]
    asked = _asked(draw, hay, facts, dict(zip(facts, times, strict=True)), left, split)
    last = max(asked, key=lambda pair: pair[0])
    placed += [pair for pair in asked if pair is not last]
    return [unit for _, unit in sorted(placed, key=lambda pair: pair[0])] + [last[1]]


def _facts(draw: Draw, style: Style, count: int, split: Split) -> list[Fact]:
    if split == "test":
        return draw_facts(draw, count)
    kinds: Mapping[str, Kind] = {**KINDS, **MORE_KINDS}
    if style.notes:
        name = draw.one(list(NOTES))
        kinds = {name: NOTES[name]}
    invented = draw.below(_INVENTED) == 0
    people = invent_names(draw, count + 3) if invented else PEOPLE
    return draw_facts(draw, count, kinds=kinds, people=people)


def _asked(
    draw: Draw,
    hay: Hay,
    facts: Sequence[Fact],
    times: Mapping[Fact, float],
    room: int,
    split: Split,
) -> list[tuple[float, Unit]]:
    """Questions and when they are asked, as many as have so many tokens; at least one.

    Most stand anywhere behind the fact. One in `_SOON` stands soon behind it: as often 1 to 10
    hundredths of a document as 10 to 100.
    """
    asked: list[tuple[float, Unit]] = []
    while True:
        batch = [_word(draw, draw.one(facts), split) for _ in range(_BATCH)]
        for w, size in zip(batch, hay.sizes([w.answered for w in batch]), strict=True):
            room -= size + _JOINT
            if room < 0 and asked:
                return asked
            time, part = times[w.fact], draw.below(1000) / 1000
            if draw.below(_SOON) == 0:
                part = _NEAREST ** (1 - part)
            asked.append((time + part * (1 - time), Unit(w.answered, alone=True, asks=w)))


def _word(draw: Draw, fact: Fact, split: Split) -> Worded:
    return word(fact, split, Choices(*(draw.below(9973) for _ in range(5))))
