"""RecallWriter: stories with facts planted between their sentences, and questions behind them.

A document is as long as a row of training, to the chunk: a row holds exactly one, and no answer is
cut off from its fact. What is told and asked for, and in which order, is drafts.py's.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.corpus.prompts import Draw
from tools.corpus.recall.drafts import draw_draft
from tools.corpus.recall.facts import Fact, draw_facts
from tools.corpus.recall.hay import Hay
from tools.corpus.recall.units import Unit, starts_of, text_of
from tools.corpus.recall.wordings import Choices, Split, Worded, word
from zoo import Tokenizer

_LEAST_SIZE = 256
_SLACK = 24  # tokens that a draft lacks; the last sentences are chosen by their length
_TRIES = 20


@dataclass(frozen=True)
class RecallDocument:
    """One document.

    Attributes:
        text: all of it.
        tokens: of the text, bos and end included.
        asked: the facts that are asked for, in the order of the questions; most several times.
        distances: tokens between where the value of each was last said, in the fact or in an
            answer, and where the answer is due.
    """

    text: str
    tokens: int
    asked: tuple[Fact, ...]
    distances: tuple[int, ...]


class RecallWriter:
    """Writes documents of one length.

    Args:
        stories: texts of sentences.
        tokenizer: in whose tokens lengths are.
        size: most tokens of a document, bos and end included.
        chunk_size: a document has fewer than so many tokens less.
        seed: of everything that is drawn; document i is a function of (seed, i) and the stories.
        split: which wordings.

    Raises:
        ValueError: too little text, or sizes that leave no room for it.
    """

    def __init__(
        self,
        stories: Sequence[str],
        tokenizer: Tokenizer,
        *,
        size: int,
        chunk_size: int = 1,
        seed: int = 0,
        split: Split = "train",
    ) -> None:
        if size < _LEAST_SIZE:
            raise ValueError(f"recall documents need at least {_LEAST_SIZE} tokens, not {size}")
        if not 1 <= chunk_size < size:
            raise ValueError(f"chunk_size must be 1 to {size - 1}, not {chunk_size}")
        self._hay = Hay(stories, tokenizer)
        if self._hay.tokens < size:
            raise ValueError(
                f"the stories have fewer tokens than one document of {size}; give more of them"
            )
        self._tokenizer, self._size, self._chunk = tokenizer, size, chunk_size
        self._seed, self._split = seed, split

    def document(self, index: int) -> RecallDocument:
        """Document `index`.

        Raises:
            ValueError: the stories have no sentences that fill it up, in 20 tries.
        """
        for attempt in range(_TRIES):
            draw = Draw("recall", self._seed, self._split, index, attempt)
            units = self._shortened(
                draw, draw_draft(draw, self._hay, self._size - _SLACK, self._split)
            )
            filled = self._filled(draw, units, len(units) - 1)
            if filled is not None:
                return self._document(filled)
        raise ValueError(
            f"the stories have no sentences that fill a document of {self._size} tokens to the "
            f"last {self._chunk}; give more stories, or a greater chunk_size"
        )

    def _shortened(self, draw: Draw, units: list[Unit]) -> list[Unit]:
        """The units without some questions, if they are too long. The last one stays."""
        while self._length(text_of(units)) > self._size - _SLACK // 2:
            places = [i for i, unit in enumerate(units[:-1]) if unit.asks is not None]
            if not places:
                break
            at = draw.one(places)
            units = units[:at] + units[at + 1 :]
        return units

    def _filled(self, draw: Draw, units: list[Unit], last: int) -> list[Unit] | None:
        """The units with sentences before `last` that fill the document up; None: not possible."""
        by_size = self._hay.by_size
        while True:
            missing = self._size - self._length(text_of(units))
            if missing < 0:
                return None
            if missing < self._chunk:
                return units
            sizes = [n for n in by_size if missing - self._chunk < n <= missing]
            sizes = sizes or [n for n in by_size if n < missing]
            if not sizes:
                return None
            sentence = draw.one(by_size[draw.one(sorted(sizes))])
            units = [*units[:last], Unit(sentence), *units[last:]]
            last += 1

    def _length(self, text: str) -> int:
        return len(self._tokenizer.encode(text)) + (self._tokenizer.eos_id is not None)

    def _document(self, units: list[Unit]) -> RecallDocument:
        text = text_of(units)
        said: dict[Fact, int] = {}
        asked: list[tuple[Fact, int, int]] = []  # what, where it was said last, where it is due
        for unit, start in zip(units, starts_of(units), strict=True):
            if unit.tells is not None:
                said[unit.tells.fact] = start + unit.tells.value_ends
            if unit.asks is not None:
                fact, due = unit.asks.fact, start + len(unit.asks.question)
                asked.append((fact, said[fact], due))
                said[fact] = due + 1 + len(fact.value)
        tokens = self._tokens_before(text, {place for _, *places in asked for place in places})
        return RecallDocument(
            text=text,
            tokens=self._length(text),
            asked=tuple(fact for fact, _, _ in asked),
            distances=tuple(tokens[due] - tokens[last] for _, last, due in asked),
        )

    def _tokens_before(self, text: str, places: Iterable[int]) -> dict[int, int]:
        """How many tokens stand before each of these ends of words, counted from wherever."""
        edges = sorted(places)
        # Behind a newline a part is cut up as in the midst of a text, not as at its beginning.
        parts = ["", *(text[a:b] for a, b in itertools.pairwise((0, *edges)))]
        found = self._tokenizer.encode_batch([f"\n{part}" for part in parts], add_bos=False)
        newline, *sizes = map(len, found)
        return dict(zip(edges, itertools.accumulate(n - newline for n in sizes), strict=True))


def draw_worded(draw: Draw, count: int, split: Split) -> list[Worded]:
    """Facts of one document, each in a wording of the split."""
    choices = [(draw.below(60), draw.below(60), draw.below(60)) for _ in range(count)]
    facts = draw_facts(draw, count)
    return [
        word(fact, split, Choices(*choice)) for fact, choice in zip(facts, choices, strict=True)
    ]
