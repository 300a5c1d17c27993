"""word: a fact in words. Half of the wordings are for training, others for tests.

A question ends where its answer, which is the value, begins.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tools.corpus.recall.facts import Fact
from tools.corpus.recall.judging_phrases import TEST, TEST_FRAMES
from tools.corpus.recall.training_phrases import FRAMES, LEADS, STATEMENTS, TAILS, TRAIN

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Worded:
    """A fact in words.

    Attributes:
        fact: what is told.
        told: the sentence.
        question: up to where the value follows, behind a blank.
    """

    fact: Fact
    told: str
    question: str

    @property
    def value_ends(self) -> int:
        """Where in `told` the value ends."""
        found = re.search(rf"\b{re.escape(self.fact.value)}\b", self.told)
        assert found is not None
        return found.end()

    @property
    def answered(self) -> str:
        """The question with its answer."""
        return f"{self.question} {self.fact.value}."


@dataclass(frozen=True)
class Choices:
    """Numbers that choose a wording; each counts round its texts.

    Attributes:
        tell: how to tell.
        ask: the question.
        frame: what stands round question and answer.
        lead, tail: what stands before and behind what is told; 0: nothing. Tests have none.
    """

    tell: int
    ask: int
    frame: int
    lead: int = 0
    tail: int = 0


def word(fact: Fact, split: Split, choices: Choices) -> Worded:
    """A fact in one of the wordings of a split.

    Args:
        fact: of any kind; tests have only `KINDS`.
        split: "test": ways to tell and to ask that no training text has.
        choices: which one.
    """
    wording = (TRAIN if split == "train" else TEST)[fact.kind]
    parts = {"who": fact.who, "what": fact.what}
    told = _pick(wording.tell, choices.tell).format(**parts, value=fact.value)
    ask = _pick(wording.ask, choices.ask)
    question, begin = ask.format(**parts).split("|")
    frame = _pick(_frames(ask, split), choices.frame)
    if split == "train":
        told = f"{_pick(LEADS, choices.lead)}{told[:-1]}{_pick(TAILS, choices.tail)}."
    return Worded(fact, told, frame.format(question=question, begin=begin))


def _pick(texts: Sequence[str], choice: int) -> str:
    return texts[choice % len(texts)]


def _frames(ask: str, split: Split) -> tuple[str, ...]:
    """What may stand round a question. An answer that says all parts can do without one."""
    if split == "test":
        return TEST_FRAMES
    question, begin = ask.split("|")
    if not question:
        return STATEMENTS[:1]
    whole = all(part in begin for part in ("{who}", "{what}") if part in question)
    return (*FRAMES, *STATEMENTS) if whole else FRAMES
