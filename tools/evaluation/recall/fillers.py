"""Fillers: the long texts in which things are hidden, for searching and for judging.

A placement of exact layers that was searched with some fillers is judged with others. Of each
half, one filler repeats a few sentences and one is prose: a text of the user's, or else sentences
that are put together at random.
"""

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.scoring.passkey_prompts import FILLER
from tools.text_files import name_with_checksum, read_text

Split = Literal["search", "judge", "all"]

_SENTENCES = 3_000  # some 40,000 tokens


@dataclass(frozen=True, kw_only=True)
class Filler:
    """A text to hide things in.

    Attributes:
        name: in results.
        text: all of it, or a few sentences.
        repeats: whether the text is a few sentences that are repeated.
    """

    name: str
    text: str
    repeats: bool = False


def text_filler(path: Path) -> Filler:
    """A user's text.

    Raises:
        OSError, ValueError: as `read_text`.
    """
    text = read_text(path)
    return Filler(name=name_with_checksum(path, text), text=text)


GRASS = Filler(name="grass", text=FILLER, repeats=True)
RIVER = Filler(
    name="river",
    text="The river runs to the sea. The wind is cold. The hills are far away. We walk on. "
    "The road bends and goes up.",
    repeats=True,
)


def repeated_fillers(split: Split) -> tuple[Filler, ...]:
    """The fillers of repeated sentences."""
    return {"search": (GRASS,), "judge": (RIVER,), "all": (GRASS, RIVER)}[split]


def prose_fillers(
    split: Split, search: Filler | None = None, judge: Filler | None = None
) -> tuple[Filler, ...]:
    """The fillers of prose: those given, or else generated ones."""
    searching, judging = search or _tales(), judge or _notices()
    return {"search": (searching,), "judge": (judging,), "all": (searching, judging)}[split]


@functools.cache
def _tales() -> Filler:
    """Sentences of an old-fashioned story."""
    return Filler(
        name="tales",
        text=_prose(
            "The old miller | My aunt | A tired sailor | The schoolmaster | Her brother | "
            "The shepherd | A young painter | Our neighbour | The widow | The gardener",
            "carried | looked for | talked about | forgot | mended | painted | sold | "
            "dreamed of | hid | admired",
            "a basket of pears | the broken clock | an umbrella | the blue curtains | "
            "two silver spoons | the letters of a friend | a pair of boots | the lame dog | "
            "a jar of honey | the garden gate",
            "in the evening | before the rain came | while the bells rang | without a word | "
            "on the way home | as if nothing had happened | after a long winter | "
            "under the chestnut tree | when the guests had gone | by the light of a candle",
        ),
    )


@functools.cache
def _notices() -> Filler:
    """Sentences of a handbook."""
    return Filler(
        name="notices",
        text=_prose(
            "The pump | Each valve | The control panel | A spare filter | The main switch | "
            "This cover | The cooling fan | The supply hose | Every sensor | The drive belt",
            "must be fitted with | is connected to | should be kept away from | rests on | "
            "is delivered with | can be replaced by | is protected by | drives | "
            "is checked against | shares a housing with",
            "a rubber seal | the lower bracket | an ordinary fuse | the outer casing | "
            "a short length of pipe | the second bearing | a metal plate | the drain tray | "
            "a pair of bolts | the return line",
            "before first use | at all times | unless the manual says otherwise | in summer | "
            "during maintenance | when the machine is idle | for reasons of safety | "
            "if the floor is wet | after a cold start | wherever there is room",
        ),
    )


def _prose(*parts: str) -> str:
    """Sentences of a subject, a verb, one or two objects and an adverbial, in paragraphs."""
    subjects, verbs, objects, ends = (part.split(" | ") for part in parts)
    source = random.Random(parts[0])
    paragraphs: list[list[str]] = [[]]
    for _ in range(_SENTENCES):
        first, second = source.sample(objects, 2)
        what = f"{first} and {second}" if source.random() < 0.3 else first
        words = (source.choice(subjects), source.choice(verbs), what, source.choice(ends))
        paragraphs[-1].append(" ".join(words) + ".")
        if source.random() < 0.15:
            paragraphs.append([])
    return "\n\n".join(" ".join(sentences) for sentences in paragraphs)
