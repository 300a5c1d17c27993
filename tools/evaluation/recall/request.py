"""Request: what a generator of samples is asked for; `places` draws where things are hidden."""

import functools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.evaluation.recall.fillers import Filler, Split
from tools.evaluation.samples import Match, Sample
from tools.scoring.rows import Row, Rows

if TYPE_CHECKING:
    from zoo import Tokenizer

DEPTH_BINS = 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate.

    Attributes:
        tokenizer: the model's.
        contexts: tokens of a prompt and its answer together, one or more lengths.
        n: samples for each context and whatever else a task varies, but the depth: a quarter of
            them for each of its `DEPTH_BINS`.
        seed: of everything that is drawn.
        split: which wordings.
        repeated: fillers of a few sentences.
        prose: fillers that are long texts.
        data: the user's folder of files, for the tasks that read some.
    """

    tokenizer: "Tokenizer"
    contexts: tuple[int, ...]
    n: int
    seed: int
    split: Split
    repeated: tuple[Filler, ...]
    prose: tuple[Filler, ...]
    data: Path | None = None

    def rows(self, filler: Filler, context: int) -> Rows:
        """Rows of `context` tokens in this filler.

        Raises:
            ValueError: the filler is too short.
        """
        return _rows(self.tokenizer, filler, context)

    def places(self, *names: object) -> Iterator["Place"]:
        """`n` places; `names` say for what: other names draw other ones.

        The first places are the same for every `n`.
        """
        for number in range(self.n):
            source = random.Random(repr((self.seed, *names, number)))
            yield Place.draw(f"{self.seed}-{number}", number % DEPTH_BINS, source)


# Tasks share fillers, and the tokens of a long text take a second.
@functools.lru_cache(maxsize=16)
def _rows(tokenizer: "Tokenizer", filler: Filler, context: int) -> Rows:
    return Rows(tokenizer, filler.text, context, repeat=filler.repeats)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one sample hides what it asks for.

    Attributes:
        item: the sample's name.
        depth: in [0, 1), 0 is the beginning of the hay.
        bin: the middle of the depth's bin, which is reported.
        offset: in [0, 1), where in the filler the hay begins.
        source: for everything else that the sample draws.
    """

    item: str
    depth: float
    bin: float
    offset: float
    source: random.Random

    @classmethod
    def draw(cls, item: str, number: int, source: random.Random) -> "Place":
        """A place whose depth is in the bin of this number."""
        return cls(
            item=item,
            depth=(number + source.random()) / DEPTH_BINS,
            bin=(number + 0.5) / DEPTH_BINS,
            offset=source.random(),
            source=source,
        )

    def sample(
        self,
        task: str,
        row: Row,
        cell: Mapping[str, object],
        *,
        answers: tuple[str, ...],
        max_new_tokens: int,
        match: Match,
    ) -> Sample:
        """What was hidden here, as a sample; its depth becomes part of the cell."""
        return Sample(
            task=task,
            cell={**cell, "depth": self.bin},
            item=self.item,
            prompt_ids=row.prompt_ids,
            answer_ids=row.answer_ids,
            answers=answers,
            max_new_tokens=max_new_tokens,
            match=match,
        )
