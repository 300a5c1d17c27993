"""RecallWriter: stories with facts planted between their sentences, and questions far behind them.

    hay FACT hay hay FACT hay ... QUESTIONS hay FACT ... hay QUESTIONS

A fact stands anywhere before the question for it, so distances are spread from a few tokens to the
whole document; each is asked for at most once, and some are not. A document is as long as a row of
training, to the chunk: a row holds exactly one, and no answer is cut off from its fact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.corpus.prompts import Draw
from tools.corpus.recall.facts import Fact, draw_facts
from tools.corpus.recall.hay import Hay
from tools.corpus.recall.units import Unit, starts_of, text_of
from tools.corpus.recall.wordings import Split, Worded, word
from zoo import Tokenizer

_LEAST_SIZE = 256
_FACTS = range(4, 10)
_GROUPS = 3  # of questions, at most
_NOT_ASKED = 5  # one fact in so many
_ALONE = 4  # in one document of so many facts are paragraphs of their own
_SLACK = 24  # tokens that a draft lacks; the last sentences are chosen by their length
_TRIES = 20


@dataclass(frozen=True)
class RecallDocument:
    """One document.

    Attributes:
        text: all of it.
        tokens: of the text, bos and end included.
        asked: the facts that are asked for, in the order of the questions.
        distances: tokens between where each of these is told and where the answer is due.
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
            units, last = self._draft(draw)
            filled = self._filled(draw, units, last)
            if filled is not None:
                return self._document(filled)
        raise ValueError(
            f"the stories have no sentences that fill a document of {self._size} tokens to the "
            f"last {self._chunk}; give more stories, or a greater chunk_size"
        )

    def _draft(self, draw: Draw) -> tuple[list[Unit], int]:
        """A document that is a little too short, and where its last questions begin."""
        worded = draw_worded(draw, draw.one(_FACTS), self._split)
        parts = 1 + draw.below(_GROUPS)
        groups = [worded[i::parts] for i in range(parts)]
        alone = draw.below(_ALONE) == 0
        around = "\n\n".join(text for w in worded for text in (w.told, w.answered))
        hay = self._hay.draw(draw, self._size - self._length(around) - _SLACK)
        spots: list[list[Unit]] = [[] for _ in range(len(hay) + 1)]
        ends = [number * len(hay) // parts for number in range(1, parts + 1)]
        for group, end in zip(groups, ends, strict=True):
            for w in group:
                spots[draw.below(max(end, 1))].append(Unit(w.told, alone=alone, tells=w))
        questions: list[Unit] = []
        for group, end in zip(groups, ends, strict=True):
            asked = [w for w in draw.several(group, len(group)) if draw.below(_NOT_ASKED)]
            questions = [Unit(w.answered, alone=True, asks=w) for w in asked or group[:1]]
            spots[end] += questions
        units: list[Unit] = []
        for planted, sentence in zip(spots, hay, strict=False):
            units += [*planted, sentence]
        units += spots[-1]
        return units, len(units) - len(questions)

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
        told: dict[Fact, str] = {}
        asked: list[tuple[Fact, str]] = []
        for unit, start in zip(units, starts_of(units), strict=True):
            if unit.tells is not None:
                told[unit.tells.fact] = text[: start + unit.tells.value_ends]
            if unit.asks is not None:
                asked.append((unit.asks.fact, text[: start + len(unit.asks.question)]))
        heads = [told[fact] for fact, _ in asked] + [head for _, head in asked]
        sizes = [len(ids) for ids in self._tokenizer.encode_batch(heads)]
        pairs = zip(sizes, sizes[len(asked) :], strict=False)
        return RecallDocument(
            text=text,
            tokens=self._length(text),
            asked=tuple(fact for fact, _ in asked),
            distances=tuple(there - here for here, there in pairs),
        )


def draw_worded(draw: Draw, count: int, split: Split) -> list[Worded]:
    """Facts of one document, each in a wording of the split."""
    choices = [(draw.below(60), draw.below(60), draw.below(60)) for _ in range(count)]
    facts = draw_facts(draw, count)
    return [word(fact, split, choice) for fact, choice in zip(facts, choices, strict=True)]
