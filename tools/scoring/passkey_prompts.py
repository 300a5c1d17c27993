"""PasskeyPrompts: rows of tokens with a number hidden in a long text and asked for at its end.

A row is  [bos] hay NEEDLE hay QUESTION ANSWER,  exactly `length` tokens long; the answer is the
number, as the text after the question continues.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.scoring.rows import Row, Rows

if TYPE_CHECKING:
    from zoo import Tokenizer

# The filler of the usual passkey test (arXiv 2305.16300), repeated as often as needed.
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)


@dataclass(frozen=True)
class Wording:
    """How the number is told and asked for; {number} stands for it.

    Attributes:
        needle: what is hidden.
        question: what the answer follows, without the blank between them.
    """

    needle: str
    question: str


WORDINGS: dict[str, Wording] = {
    "magic": Wording(
        "The special magic number is {number}. Remember it: {number} is the special magic number.",
        "Question: What is the special magic number mentioned in the text above? "
        "Answer: The special magic number is",
    ),
    "passkey": Wording(
        "The pass key is {number}. Remember it. {number} is the pass key.",
        "What is the pass key? The pass key is",
    ),
    "locker": Wording(
        "Please note that locker {number} belongs to Martha. Martha keeps her violin in locker "
        "{number}.",
        "Question: Which locker belongs to Martha? Answer: Martha's violin is in locker",
    ),
    "ticket": Wording(
        "The lottery was drawn today, and the winning ticket was {number}. Whoever holds ticket "
        "{number} may collect the prize.",
        "Which ticket won the lottery? The winning ticket was",
    ),
}


# A number among the last tokens is in every window, and one among the first in the sinks: there
# attention without any far context finds it as well.
DEFAULT_DEPTHS = (0.1, 0.8)


@dataclass(frozen=True)
class Prompt(Row):
    """A row; `number` is what is hidden."""

    number: str


class PasskeyPrompts:
    """Makes prompts for one tokenizer and hay.

    Args:
        tokenizer: the model's.
        hay: a text, of which the first 4 million characters are used; None repeats `FILLER`.
        length: tokens of a row.

    Raises:
        ValueError: the hay has fewer tokens than a row.
    """

    def __init__(self, tokenizer: "Tokenizer", hay: str | None, length: int) -> None:
        self._rows = Rows(tokenizer, FILLER if hay is None else hay, length, repeat=hay is None)

    def draw(
        self,
        wording: Wording,
        n: int,
        seed: int,
        depths: tuple[float, float] = DEFAULT_DEPTHS,
    ) -> list[Prompt]:
        """Draws `n` prompts, each with another number, depth and slice of the hay.

        Depths are drawn evenly between `depths`, two fractions of the hay.

        The first prompts are the same for every `n`. Numbers, depths and where slices begin do
        not depend on the wording or the length, but for rounding to tokens.

        Raises:
            ValueError: `n` is not positive, depths out of range, or the needle and the question
                do not fit.
        """
        low, high = depths
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"depths must be in order and between 0 and 1, not {low} and {high}")
        generator = random.Random(seed)
        return [
            self._prompt(
                wording,
                number=str(10_000 + int(generator.random() * 90_000)),
                depth=low + (high - low) * generator.random(),
                offset=generator.random(),
            )
            for _ in range(n)
        ]

    def _prompt(self, wording: Wording, *, number: str, depth: float, offset: float) -> Prompt:
        """`depth` and `offset` are in [0, 1]: of the needle in the hay, of the hay in the text."""
        row = needle_row(self._rows, wording, number, depth, offset)
        return Prompt(row.ids, row.answer_size, number)


def needle_row(rows: Rows, wording: Wording, number: str, depth: float, offset: float) -> Row:
    """A row with one number in it, told and asked for in this wording.

    Args:
        rows: makes it.
        wording: of the needle and the question.
        number: what is hidden.
        depth: in [0, 1], the part of the hay that stands before the needle.
        offset: in [0, 1), where in the whole hay the row's slice of it begins.

    Raises:
        ValueError: the needle and the question do not fit.
    """
    needle = rows.encode(f"\n\n{wording.needle.format(number=number)}\n\n")
    question, answer = rows.split(f"\n\n{wording.question}", f" {number}")
    at = int(depth * rows.room(needle, question, answer))
    return rows.assemble([(at, needle)], question, answer, offset)
