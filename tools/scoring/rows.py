"""Rows: rows of tokens of one length, made of a long text with things hidden in it.

A row is  [bos] hay INSERT hay ... INSERT hay QUESTION ANSWER.  What is hidden takes the place of
hay, so that every row has exactly as many tokens as asked for.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo import Tokenizer

# More of a hay than this is not read: its slices would not differ more, and tokens of a whole
# library take minutes.
_HAY_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        ids: the tokens, the answer included.
        answer_size: how many of them, at the end, are the answer.
    """

    ids: list[int]
    answer_size: int

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens in front of the answer."""
        return self.ids[: len(self.ids) - self.answer_size]

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of the answer."""
        return self.ids[len(self.ids) - self.answer_size :]


class Rows:
    """Makes rows for one tokenizer and hay.

    Args:
        tokenizer: the model's.
        hay: a text, of which the first 4 million characters are used.
        length: tokens of a row.
        repeat: repeat the hay, which is a few sentences, as often as rows need it.

    Raises:
        ValueError: the hay has fewer tokens than a row.
    """

    def __init__(
        self, tokenizer: "Tokenizer", hay: str, length: int, *, repeat: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._length = length
        if repeat:
            sentence = tokenizer.encode(f" {hay}", add_bos=False)
            # Twice a row, so that slices begin anywhere in the sentences.
            self._hay = sentence * (2 * length // len(sentence) + 2)
        else:
            self._hay = _tokens_of(tokenizer, hay[:_HAY_CHARACTERS])
        if len(self._hay) < length:
            raise ValueError(
                f"the hay has {len(self._hay)} tokens, fewer than the {length} of a prompt; "
                "choose a longer text or a shorter length"
            )
        self.start = start_ids(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of a piece of a row, without a bos."""
        return self._tokenizer.encode(text, add_bos=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of several pieces, on all cores."""
        return self._tokenizer.encode_batch(texts, add_bos=False)

    def split(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of `question + answer`, parted where those of the question alone end."""
        alone, both = self.encode(question), self.encode(question + answer)
        pairs = enumerate(zip(alone, both, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), len(alone))
        return both[:same], both[same:]

    def room(self, *parts: Sequence[int]) -> int:
        """Tokens of hay in a row that holds these parts besides.

        Raises:
            ValueError: they do not fit.
        """
        around = len(self.start) + sum(len(part) for part in parts)
        if around > self._length:
            raise ValueError(
                f"a prompt of {self._length} tokens cannot hold needle and question, which have "
                f"{around}; choose a greater length"
            )
        return self._length - around

    def assemble(
        self,
        inserts: Sequence[tuple[int, Sequence[int]]],
        question: Sequence[int],
        answer: Sequence[int],
        offset: float,
    ) -> Row:
        """A row.

        Args:
            inserts: what is hidden, and how many tokens of hay stand before it; in order.
            question: tokens behind the hay.
            answer: tokens behind the question.
            offset: in [0, 1), where in the whole hay the row's slice of it begins.

        Raises:
            ValueError: it does not fit.
        """
        size = self.room(*(tokens for _, tokens in inserts), question, answer)
        first = int(offset * (len(self._hay) - size + 1))
        hay = self._hay[first : first + size]
        ids, done = [*self.start], 0
        for at, tokens in inserts:
            ids += [*hay[done:at], *tokens]
            done = at
        return Row([*ids, *hay[done:], *question, *answer], len(answer))


@functools.lru_cache(maxsize=4)  # rows of several lengths share a text, which takes seconds
def _tokens_of(tokenizer: "Tokenizer", text: str) -> list[int]:
    return tokenizer.encode(text, add_bos=False)


def start_ids(tokenizer: "Tokenizer") -> list[int]:
    """What a row begins with: a bos where the model was published with one, or nothing."""
    bos = tokenizer.bos_id
    return [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []
