"""TextUntilStop: the text of a row as it grows, cut before the first stop string."""

from collections.abc import Sequence

from zoo.text.text_stream import TextStream


class TextUntilStop:
    """Collects the text of a row's tokens.

    Text that may be the beginning of a stop string is held back until it is certain, so that
    what was streamed never has to be taken back.

    Attributes:
        text: everything that is certain so far.
        stopped: a stop string was found; `text` ends before it.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str]) -> None:
        self._stream = stream
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.stopped = False

    def step(self, token: int) -> str:
        """Adds a token; returns the text that became certain."""
        return self._add(self._stream.step(token))

    def flush(self) -> str:
        """The end of the row: returns what was held back."""
        if self.stopped:
            return ""
        piece = self._add(self._stream.flush())
        if self.stopped:
            return piece
        rest, self._held = self._held, ""
        self.text += rest
        return piece + rest

    def _add(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held, certain = True, "", text[: min(found)]
        else:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            certain, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
