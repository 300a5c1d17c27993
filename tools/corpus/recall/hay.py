"""Hay: sentences of stories, and how many tokens each has."""

from collections.abc import Iterable, Sequence

from tools.corpus.filters import sentences
from tools.corpus.prompts import Draw
from tools.corpus.recall.units import Unit
from zoo import Tokenizer


class Hay:
    """Stories to hide facts in.

    Args:
        stories: texts of sentences.
        tokenizer: in whose tokens lengths are.

    Attributes:
        tokens: of all different sentences.
        by_size: these sentences by their tokens.

    Raises:
        ValueError: no sentence.
    """

    def __init__(self, stories: Iterable[str], tokenizer: Tokenizer) -> None:
        self._stories = [found for story in stories if (found := sentences(story))]
        if not self._stories:
            raise ValueError("there is no sentence in the stories; give others")
        flat = sorted({sentence for story in self._stories for sentence in story})
        self._tokenizer = tokenizer
        self._sizes = dict(zip(flat, self.sizes(flat), strict=True))
        self.tokens = sum(self._sizes.values())
        self.by_size: dict[int, list[str]] = {}
        for sentence, size in self._sizes.items():
            self.by_size.setdefault(size, []).append(sentence)

    def draw(self, draw: Draw, room: int) -> list[Unit]:
        """Stories one after the other, as many sentences as have so many tokens at most."""
        hay: list[Unit] = []
        while True:
            for number, sentence in enumerate(draw.one(self._stories)):
                room -= self._sizes[sentence]
                if room < 0:
                    return hay
                hay.append(Unit(sentence, begins=number == 0))

    def size(self, unit: Unit) -> int:
        """Tokens of a sentence from `draw`."""
        return self._sizes[unit.text]

    def sizes(self, texts: Sequence[str]) -> list[int]:
        """Tokens of any sentences, as they are behind a blank."""
        found = self._tokenizer.encode_batch([f" {text}" for text in texts], add_bos=False)
        return [len(ids) for ids in found]
