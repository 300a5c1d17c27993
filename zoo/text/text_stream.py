"""Text as it is generated: whole characters only, and in sum exactly what decoding at once gives.

`tokenizers.decoders.DecodeStream` is not used because it raises on byte tokens that form no valid
UTF-8, which a sampled model does produce, and has no way to ask for what it still holds back.
"""

import re
from collections.abc import Callable, Sequence
from enum import Enum

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows bytes that are no character (yet)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TokenKind(Enum):
    """What the stream must know of a token."""

    TEXT = "text"
    BYTE = "byte"
    SKIPPED = "skipped"


def token_kind(token: str | None, *, skipped: bool) -> TokenKind:
    """The kind of the token with this spelling, None if the vocabulary has no such id."""
    if token is None or skipped:
        return TokenKind.SKIPPED
    return TokenKind.BYTE if _BYTE.fullmatch(token) else TokenKind.TEXT


class TextStream:
    """Incremental decoding of one sequence; the pieces concatenate to `decode(all ids)`.

    Only a window of ids is decoded again at each step: those whose text came out last, because
    a token's spelling may depend on its left neighbour, and those held back since. Byte tokens
    are held until the run of them ends, because one bad byte makes the whole run unreadable.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], kind: Callable[[int], TokenKind]
    ) -> None:
        self._decode, self._kind = decode, kind
        self._window: list[int] = []
        self._shown = 0  # how many ids of the window are already in the text given out
        self._in_bytes = False

    def step(self, token: int) -> str:
        """The text that this id completes; "" while a character is unfinished."""
        self._window.append(token)
        kind = self._kind(token)
        if kind is not TokenKind.SKIPPED:
            self._in_bytes = kind is TokenKind.BYTE
        text = "" if self._in_bytes else self._pending()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """What is still held back, at the end of the sequence."""
        text = self._pending()
        if text:
            self._advance()
        return text

    def _pending(self) -> str:
        given = self._decode(self._window[: self._shown])
        return self._decode(self._window)[len(given) :]

    def _advance(self) -> None:
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
