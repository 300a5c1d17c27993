"""draw_prompt: what the model is asked to write; prompt i is a pure function of (seed, i).

A prompt shows an example of its form, asks for another text in few words, and begins stories and
talks for the model, so that they do not all begin alike.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tools.corpus import words
from tools.corpus.examples import EXAMPLES, Example

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CorpusPrompt:
    """One text to be written.

    Attributes:
        form: a key of `EXAMPLES`.
        example: a request and a text that are shown first.
        request: what is asked for then.
        opening: how the text begins, without a blank at its end; may be empty.
    """

    form: str
    example: Example
    request: str
    opening: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to where the model answers."""
        return [
            {"role": "user", "content": self.example.request},
            {"role": "assistant", "content": self.example.text},
            {"role": "user", "content": self.request},
        ]


class Draw:
    """Choices from a seed; only `random()` is the same in all versions of Python."""

    def __init__(self, *seed: object) -> None:
        self._source = random.Random(repr(seed))

    def below(self, n: int) -> int:
        """0 to n - 1."""
        return int(self._source.random() * n)

    def one(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """Different ones of the items, in any order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def draw_prompt(seed: int, index: int) -> CorpusPrompt:
    """The prompt of this number."""
    draw = Draw(seed, index)
    form = draw.one(_SHARES)
    example = draw.one(EXAMPLES[form])
    request, opening = _FORMS[form](draw)
    return CorpusPrompt(form=form, example=example, request=request, opening=opening)


def _story(draw: Draw) -> tuple[str, str]:
    name, place, thing = draw.one(words.NAMES), draw.one(words.PLACES), draw.one(words.OBJECTS)
    who = draw.one(words.PEOPLE if draw.below(2) else words.ANIMALS)
    moment, event = draw.one(words.MOMENTS), draw.one(words.EVENTS)
    request = draw.one(
        (
            f"Write a short story about {who} named {name} and {thing}.",
            f"Write a short story about {who} named {name}, who {event}.",
            f"Write a short story that happens {place}. It is about {who} named {name}.",
            f"Write a short {draw.one(words.MOODS)} story about {name}, {who}, and {thing}.",
        )
    )
    begins = (
        f"{moment}, {name}",
        f"{name} was {who}",
        f"{name}",
        f"There once was {who} named {name}",
    )
    return request, draw.one(begins)


def _dialogue(draw: Draw) -> tuple[str, str]:
    first, second = draw.several(words.NAMES, 2)
    about = draw.one((draw.one(words.OBJECTS), draw.one(words.THINGS)))
    request = f"Write a talk between two friends, {first} and {second}, about {about}."
    return request, draw.one(('"What', '"Look', '"I', '"Do', '"Where', '"Can', '"Why'))


def _explanation(draw: Draw) -> tuple[str, str]:
    animal, thing = draw.one(words.ANIMALS), draw.one(words.OBJECTS)
    question = draw.one(
        (
            draw.one(words.QUESTIONS),
            draw.one(words.QUESTIONS),
            f"how {animal} lives",
            f"what you can do with {thing}",
            f"how {thing} is made",
            f"what you can find {draw.one(words.PLACES)}",
        )
    )
    return f"Explain to a child {question}.", ""


def _how_to(draw: Draw) -> tuple[str, str]:
    whom = draw.one(("a child", "a friend", "a little sister", "a new pupil", "your brother"))
    return f"Tell {whom} how to {draw.one(words.TASKS)}.", ""


def _description(draw: Draw) -> tuple[str, str]:
    thing = draw.one((draw.one(words.THINGS), draw.one(words.OBJECTS), draw.one(words.ANIMALS)))
    when = draw.one(
        ("", " at night", " in summer", " in winter", " in the morning", " in the rain")
    )
    return f"Describe {thing}{when}.", ""


_FORMS: Mapping[str, Callable[[Draw], tuple[str, str]]] = {
    "story": _story,
    "dialogue": _dialogue,
    "explanation": _explanation,
    "how-to": _how_to,
    "description": _description,
}
_SHARES = ("story",) * 6 + ("dialogue", "explanation", "how-to", "description")
