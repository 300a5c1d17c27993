"""Unit: what recall documents are made of; `text_of` joins units, `starts_of` finds them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tools.corpus.recall.wordings import Worded

_PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Unit:
    """A sentence of a story, a fact or a question.

    Attributes:
        text: of the unit.
        alone: a paragraph of its own.
        begins: a paragraph begins with it.
        tells, asks: what the unit tells or asks for.
    """

    text: str
    alone: bool = False
    begins: bool = False
    tells: Worded | None = None
    asks: Worded | None = None


def text_of(units: Sequence[Unit]) -> str:
    """The units as one text."""
    return "".join(j + unit.text for j, unit in zip(_joints(units), units, strict=True))


def starts_of(units: Sequence[Unit]) -> list[int]:
    """Where in the text each unit begins."""
    starts, at = [], 0
    for joint, unit in zip(_joints(units), units, strict=True):
        starts.append(at + len(joint))
        at = starts[-1] + len(unit.text)
    return starts


def _joints(units: Sequence[Unit]) -> list[str]:
    """What stands before each unit."""
    pairs = itertools.pairwise(units)
    return ["", *(_PARAGRAPH if a.alone or b.alone or b.begins else " " for a, b in pairs)]
