"""UnrelatedText: passages that stand before a short prompt, so that it is read far into a row.

A passage is whole sentences of a long text, from another place for every item. It depends on the
item, the seed and the text only, and its length is counted in words, none of which has less than
one token: it is the same for every model, tokenizer and engine.
"""

import random
import re
from collections.abc import Iterable

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class UnrelatedText:
    """Passages of a text.

    Args:
        text: some hundred times longer than a passage, so that passages differ.
        words: of a passage, at least; so it has at least as many tokens.
        seed: of where passages begin.

    Raises:
        ValueError: `words` is not positive, or the text has fewer.
    """

    def __init__(self, text: str, words: int, seed: int) -> None:
        if words < 1:
            raise ValueError(f"words must be at least 1, not {words}")
        self._sentences = [
            sentence + end
            for line in text.splitlines()
            for sentence, end in _with_ends(_SENTENCE_END.split(line.strip()))
        ]
        self._words, self._seed = words, seed
        there = sum(len(sentence.split()) for sentence in self._sentences)
        if there < words:
            raise ValueError(
                f"the text has {there} words, fewer than the {words} of a passage; choose a "
                "longer text or fewer words"
            )

    def passage(self, item: str, answers: Iterable[str]) -> str:
        """The passage of an item, without a line end behind it.

        Sentences that hold one of the `answers` as words of their own are left out.

        Raises:
            ValueError: the sentences that remain are too few.
        """
        first = random.Random(f"{self._seed} {item}").randrange(len(self._sentences))
        given = [text.strip() for text in answers]
        held = [re.escape(text) for text in given if text]
        holds = re.compile(rf"(?<!\w)(?:{'|'.join(held)})(?!\w)", re.IGNORECASE) if held else None
        chosen: list[str] = []
        words = 0
        for sentence in self._sentences[first:] + self._sentences[:first]:
            if holds is not None and holds.search(sentence):
                continue
            chosen.append(sentence)
            words += len(sentence.split())
            if words >= self._words:
                return "".join(chosen).rstrip()
        raise ValueError(
            f"without sentences that hold {given} the text has {words} words, fewer than the "
            f"{self._words} of a passage; choose a longer text"
        )


def _with_ends(sentences: list[str]) -> Iterable[tuple[str, str]]:
    """The sentences of a line, the last with a line end behind it, the others with a blank."""
    for number, sentence in enumerate(sentences, start=1):
        if sentence:
            yield sentence, " " if number < len(sentences) else "\n"
