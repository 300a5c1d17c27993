"""Wording: texts in which {who}, {what} and {value} stand for a fact's parts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Texts for one kind of facts; any way to tell goes with any question.

    Attributes:
        tell: sentences. {who} stands before {value}: when a model reads the value, it can know
            whose it is.
        ask: each a question and, behind a bar, how its answer begins.
    """

    tell: tuple[str, ...]
    ask: tuple[str, ...]
