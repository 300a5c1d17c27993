"""PasskeyPrompts: rows of tokens with a number hidden in a long text and asked for at its end.

A row is  [bos] hay NEEDLE hay QUESTION ANSWER,  exactly `length` tokens long; the answer is the
number, as the text after the question continues.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo import Tokenizer

# More of a hay than this is not read: its slices would not differ more, and tokens of a whole
# library take minutes.
_HAY_CHARACTERS = 4_000_000

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
class Prompt:
    """One row.

    Attributes:
        ids: the tokens, the answer included.
        answer_size: how many of them, at the end, are the answer.
        number: what is hidden.
    """

    ids: list[int]
    answer_size: int
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
        self._tokenizer = tokenizer
        self._length = length
        if hay is None:
            sentence = tokenizer.encode(f" {FILLER}", add_bos=False)
            # Twice a row, so that slices begin anywhere in the sentences.
            self._hay = sentence * (2 * length // len(sentence) + 2)
        else:
            self._hay = tokenizer.encode(hay[:_HAY_CHARACTERS], add_bos=False)
        if len(self._hay) < length:
            raise ValueError(
                f"the hay has {len(self._hay)} tokens, fewer than the {length} of a prompt; "
                "choose a longer text or a shorter length"
            )
        bos = tokenizer.bos_id
        # Where the model was published with a bos, it sees one.
        self._start = [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []

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
        needle = self._tokenizer.encode(
            f"\n\n{wording.needle.format(number=number)}\n\n", add_bos=False
        )
        question, answer = self._split(f"\n\n{wording.question}", f" {number}")
        around = len(self._start) + len(needle) + len(question) + len(answer)
        if around > self._length:
            raise ValueError(
                f"a prompt of {self._length} tokens cannot hold needle and question, which have "
                f"{around}; choose a greater length"
            )
        size = self._length - around
        first = int(offset * (len(self._hay) - size + 1))
        at = first + int(depth * size)
        before, after = self._hay[first:at], self._hay[at : first + size]
        ids = [*self._start, *before, *needle, *after, *question, *answer]
        return Prompt(ids, len(answer), number)

    def _split(self, question: str, answer: str) -> tuple[Sequence[int], Sequence[int]]:
        """The tokens of `question + answer`, parted where those of the question alone end."""
        alone = self._tokenizer.encode(question, add_bos=False)
        both = self._tokenizer.encode(question + answer, add_bos=False)
        pairs = enumerate(zip(alone, both, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), len(alone))
        return both[:same], both[same:]
