"""CorpusFile: JSON lines that grow by whole batches and survive a kill; open_new: all at once.

    stories.jsonl.zst       a frame of zstd for each batch; or stories.jsonl, uncompressed
    stories.jsonl.zst.run   JSON: what made it, how many batches and bytes are whole, counts

The second file is replaced in one step after the first has grown; what a killed run has written
beyond it is cut off.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypedDict, cast

from tools.results import check_appendable
from tools.text_files import read_lines
from zoo.weights.atomic import write_text

SCHEMA = 1
_LINES = 1000  # in a frame of a file that is written at once
_LEVEL = 12  # of zstd: 19 takes ten times as long for 5% less


class Counts(TypedDict):
    """What became of the texts.

    Attributes:
        kept, tokens: texts in the file, and their tokens by the writing model's tokenizer.
        dropped: texts by reason, see `filters.REASONS`.
        written: tokens that the model wrote, dropped texts and ends among them.
        seconds: that it wrote for.
    """

    kept: int
    tokens: int
    dropped: dict[str, int]
    written: int
    seconds: float


class RunState(TypedDict):
    """The file beside the texts.

    Attributes:
        schema: of this file; another one is refused.
        made_with: everything that decides about the texts, but for the device.
        runs: command, device and versions of every run, and its first batch.
        batches, bytes: that are whole.
        counts: of all runs together.
    """

    schema: int
    made_with: Mapping[str, object]
    runs: list[Mapping[str, object]]
    batches: int
    bytes: int
    counts: Counts


class CorpusFile:
    """A file to go on with.

    Attributes:
        path: of the texts.
        state: what is whole.
    """

    def __init__(self, path: Path, state: RunState) -> None:
        self.path, self.state = path, state

    @classmethod
    def open(cls, path: Path, made_with: Mapping[str, object], run: Mapping[str, object]) -> Self:
        """A new file, or one that the same options have begun.

        Args:
            path: ends in .jsonl or .jsonl.zst.
            made_with: everything that decides about the texts, but for the device.
            run: what is recorded of this run.

        Raises:
            OSError: the file cannot be written.
            ValueError: as `check_target`.
        """
        state = check_target(path, made_with)
        if state is None:
            path.write_bytes(b"")
            counts = Counts(kept=0, tokens=0, dropped={}, written=0, seconds=0.0)
            state = RunState(
                schema=SCHEMA, made_with=made_with, runs=[], batches=0, bytes=0, counts=counts
            )
            state["runs"].append({**run, "batch": 0})
            return cls(path, state)
        _check_same(path, state, dict.fromkeys(state["made_with"]) | dict(made_with))
        os.truncate(path, state["bytes"])
        state["runs"].append({**run, "batch": state["batches"]})
        return cls(path, state)

    def texts(self) -> Iterator[str]:
        """Of the documents that are there."""
        for line in read_lines(self.path).splitlines() if self.state["bytes"] else ():
            yield json.loads(line)["text"]

    def append(self, documents: Iterable[Mapping[str, object]], counts: Counts) -> None:
        """Adds the documents of one batch, perhaps none; `counts` are those of all batches."""
        lines = _packed(self.path, [json.dumps(document) + "\n" for document in documents])
        with self.path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self.state["batches"] += 1
        self.state["bytes"] += len(lines)
        self.state["counts"] = counts
        write_text(_beside(self.path), json.dumps(self.state, indent=1) + "\n")


def check_target(path: Path, made_with: Mapping[str, object]) -> RunState | None:
    """What can be refused before a model is loaded; nothing is written.

    Args:
        path: of `CorpusFile.open`.
        made_with: of `CorpusFile.open`, or as much of it as is known.

    Returns:
        What is whole of a file to go on with; None for a new one.

    Raises:
        OSError: a file cannot be read.
        ValueError: another ending, a file that cannot be written, or one that something else made.
    """
    check_name(path)
    check_appendable(path)
    beside = _beside(path)
    if not beside.exists():
        if path.exists() and path.stat().st_size:
            raise ValueError(f"{path} is there, without {beside.name}; name a new file")
        return None
    state = _read_state(beside)
    _check_same(path, state, made_with)
    if not path.exists() or path.stat().st_size < state["bytes"]:
        raise ValueError(f"{path} is shorter than {beside.name} says; name a new file")
    return state


def check_name(path: Path) -> None:
    """Raises ValueError unless the file is one of JSON lines that can be written."""
    if not path.name.endswith((".jsonl", ".jsonl.zst")):
        raise ValueError(f"the file must end in .jsonl or .jsonl.zst, not {path.name}")
    if path.suffix == ".zst":
        _compressor()


@contextmanager
def open_new(path: Path) -> Iterator[Callable[[str], None]]:
    """A function that takes the lines of a file, which appears at the end of the block.

    Raises:
        OSError: the file cannot be written.
        ValueError: another ending than .jsonl or .jsonl.zst.
    """
    check_name(path)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    lines: list[str] = []
    try:
        with fresh.open("wb") as file:

            def write(line: str) -> None:
                lines.append(line)
                if len(lines) == _LINES:
                    file.write(_packed(path, lines))
                    lines.clear()

            yield write
            file.write(_packed(path, lines))
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    """The file that says what is whole."""
    return path.with_name(path.name + ".run")


def _check_same(path: Path, state: RunState, made_with: Mapping[str, object]) -> None:
    """Raises ValueError if the file was made with something else; what is not given may differ."""
    for key, new in json.loads(json.dumps(made_with)).items():
        old = state["made_with"].get(key)
        if old != new:
            raise ValueError(
                f"{path} was made with {key} {old!r}, not {new!r}; give the same or name a "
                "new file"
            )


def _packed(path: Path, lines: Sequence[str]) -> bytes:
    """Lines as the file holds them."""
    content = "".join(lines).encode()
    return _compressor()(content) if content and path.suffix == ".zst" else content


def _read_state(path: Path) -> RunState:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; name a new file") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not of version {SCHEMA}; name a new file")
    return cast(RunState, found)


def _compressor() -> Callable[[bytes], bytes]:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ValueError(
            "writing .zst files needs a package that is missing: pip install zstandard"
        ) from None
    return zstandard.ZstdCompressor(level=_LEVEL).compress
