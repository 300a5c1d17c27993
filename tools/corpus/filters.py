"""Filters: which sampled texts are kept, and for which reason the others are not.

`tidy` makes plain ASCII of what a model wrote, up to its last full sentence; `Filters.reject`
names the first reason against a text. Copies of earlier texts are found by their first words and
by the hashes of some of their word 8-grams, so what is kept depends on the order.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence

MIN_WORDS = 40
_REPEATED = 0.08  # of the 4-grams of a text; the examples of examples.py have none
_COPIED = 0.3  # of the 8-grams that are compared
_COMPARED = 8  # one 8-gram in so many is
_FIRST_WORDS = 14
_LONG_WORD, _LONG_WORDS = 10, 0.05  # letters, and the share of words that have so many

REASONS = {
    "example": "speaks of somebody in the example that the prompt showed",
    "short": f"fewer than {MIN_WORDS} words in full sentences",
    "not_ascii": "a letter that is not ASCII",
    "markup": "lists, titles, code, links",
    "meta": "speaks of the task or of itself",
    "hard_words": f"more than {_LONG_WORDS:.0%} of the words have {_LONG_WORD} letters",
    "repetition": f"more than {_REPEATED:.0%} of the 4-grams have been before, or a sentence",
    "same_start": f"begins with the {_FIRST_WORDS} words of an earlier text",
    "near_copy": f"{_COPIED:.0%} of the 8-grams are those of earlier texts",
}

_PLAIN = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{EN DASH}": " - ",
        "\N{EM DASH}": " - ",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{NO-BREAK SPACE}": " ",
        "\t": " ",
        "\r": " ",
    }
)
_MARKUP = re.compile(r"[*#`<>|\[\]{}\\_=~^@$]|https?:|www\.|^(?:\d+[.)]|[-+]) ", re.MULTILINE)
_META = re.compile(
    r"\b(?:an? ai\b|language model|artificial intelligence|chatbot|smollm|hugging face"
    r"|i'm sorry, but|i (?:can't|cannot) (?:help|assist|write|provide)|i hope this|sure[,!]"
    r"|certainly!|here(?:'s| is) (?:an?|the|your|one) (?:\w+ ){0,3}(?:story|text|talk|dialogue|way"
    r"|description|paragraph|explanation|list|example)|year[- ]old child"
    r"|(?:this|the) (?:story|text|paragraph|description|dialogue|tale) (?:is|was|shows|teaches))",
    re.IGNORECASE,
)
_END = re.compile(r'[.!?]["\')]*(?=\s|$)')
_WORD = re.compile(r"[A-Za-z']+|\d+")


def tidy(text: str) -> str:
    """Plain quotes and dashes, single blanks, paragraphs parted by a blank line.

    Returns:
        The text up to the end of its last full sentence; "" if there is none.
    """
    lines = [" ".join(line.split()) for line in text.translate(_PLAIN).split("\n")]
    text = "\n\n".join(line for line in lines if line)
    ends = [match.end() for match in _END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; one that a paragraph cuts off is one, too."""
    found = []
    for paragraph in text.split("\n\n"):
        cuts = [0, *(match.end() for match in _END.finditer(paragraph)), len(paragraph)]
        parts = [paragraph[a:b].strip() for a, b in itertools.pairwise(cuts)]
        found += [part for part in parts if part]
    return found


class Filters:
    """Keeps texts one after the other; remembers 64 bits of each start and compared 8-gram."""

    def __init__(self) -> None:
        self._starts: set[int] = set()
        self._grams: set[int] = set()

    def reject(self, text: str) -> str | None:
        """Why a text from `tidy` is not kept, a key of `REASONS`; None if it is, from now on."""
        found = words(text)
        reason = _own_reason(text, found)
        if reason is not None:
            return reason
        start, grams = _prints(found)
        if start in self._starts:
            return "same_start"
        if grams and sum(gram in self._grams for gram in grams) >= _COPIED * len(grams):
            return "near_copy"
        self.remember(text)
        return None

    def remember(self, text: str) -> None:
        """Takes a text for kept, as when a file is gone on with."""
        start, grams = _prints(words(text))
        self._starts.add(start)
        self._grams.update(grams)


def words(text: str) -> list[str]:
    """Its words and numbers, in lower case."""
    return _WORD.findall(text.lower())


def repeated_part(found: Sequence[str], size: int = 4) -> float:
    """The share of n-grams of `size` words that the text has had before."""
    grams = list(_grams(found, size))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _own_reason(text: str, found: Sequence[str]) -> str | None:
    """The first reason that needs no other text."""
    if len(found) < MIN_WORDS:
        return "short"
    if not text.isascii():
        return "not_ascii"
    if _MARKUP.search(text):
        return "markup"
    if _META.search(text):
        return "meta"
    if sum(len(word) >= _LONG_WORD for word in found) > _LONG_WORDS * len(found):
        return "hard_words"
    parts = [part.lower() for part in sentences(text) if part.count(" ") >= 3]
    if repeated_part(found) > _REPEATED or len(set(parts)) < len(parts):
        return "repetition"
    return None


def _prints(found: Sequence[str]) -> tuple[int, list[int]]:
    """Hashes of the first words, and of one 8-gram in `_COMPARED`, chosen by its hash."""
    grams = [_hash(gram) for gram in _grams(found, 8)]
    return _hash(found[:_FIRST_WORDS]), [gram for gram in grams if gram % _COMPARED == 0]


def _grams(found: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(found[i : i + size]) for i in range(len(found) - size + 1))


def _hash(gram: Sequence[str]) -> int:
    """64 bits that are the same in every process, unlike `hash`."""
    digest = hashlib.blake2b(" ".join(gram).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
