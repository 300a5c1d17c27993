"""read_text: a text file, plain or compressed, as one string; read_blocks: in pieces."""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20  # bytes read at once
_ZSTANDARD_WINDOW = 1 << 27  # what `zstd --long` writes; more needs as much memory


def read_text(path: Path) -> str:
    """Reads a UTF-8 file: text, or JSON lines with a "text" each, which blank lines then part.

    Args:
        path: .xz, .gz and .zst files are decompressed; .jsonl, alone or before that, means JSON
            lines.

    Raises:
        OSError: the file cannot be opened.
        ValueError: in one line, a file that is damaged, not UTF-8, not such JSON, or empty.
    """
    text = read_lines(path)
    if ".jsonl" in path.suffixes:
        text = "\n\n".join(_documents(path, text))
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text


def read_lines(path: Path) -> str:
    """Reads a UTF-8 file as it is, but decompressed and without a byte order mark."""
    return decode(b"".join(read_blocks(path)), str(path))


def read_blocks(path: Path, advance: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The bytes of a file, decompressed by its suffix, piece by piece.

    Args:
        path: see `read_text`.
        advance: told how many more bytes of the file itself have been read, for a progress bar.

    Raises:
        OSError: the file cannot be opened.
        ValueError: in one line, a damaged file.
    """
    try:
        with path.open("rb") as raw:
            told = 0
            for block in _blocks(raw, path.suffix):
                if advance is not None:
                    advance(raw.tell() - told)
                    told = raw.tell()
                yield block
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file: {error}") from None


def decode(content: bytes, source: str) -> str:
    """UTF-8 to text, line ends as they are, without a byte order mark in front.

    Raises:
        ValueError: it is not UTF-8; names the `source`.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text (at byte {error.start})") from None


def _documents(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield json_field(line, "text", f"{path}, line {number}")


def json_field(line: str, field: str, source: str) -> str:
    """A string of a JSON object; a ValueError names the `source`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not only JSONDecodeError: numbers of 4,301 digits
        raise ValueError(f"{source}: not valid JSON") from None
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{source}: expected an object with a string "{field}"')
    return text


def _blocks(raw: BinaryIO, suffix: str) -> Iterator[bytes]:
    match suffix:
        case ".xz":
            with lzma.open(raw) as file:
                yield from iter(partial(file.read, _BLOCK), b"")
        case ".gz":
            with gzip.open(raw) as file:
                yield from iter(partial(file.read, _BLOCK), b"")
        case ".zst":
            yield from _zstandard_blocks(raw)
        case _:
            yield from iter(partial(raw.read, _BLOCK), b"")


def _zstandard_blocks(raw: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ValueError(
            "reading .zst files needs a package that is missing: pip install zstandard"
        ) from None
    # Not `zstandard.open`: it reads one frame only, and takes a truncated one for whole.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTANDARD_WINDOW)
    frame = None
    try:
        for block in iter(partial(raw.read, _BLOCK), b""):
            while block:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data  # the beginning of the next frame
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    if frame is not None:
        raise EOFError("it ends too early")


def name_with_checksum(path: Path, text: str) -> str:
    """What records call a text: another one in a file of the same name is told apart."""
    return f"{path.name}-{zlib.crc32(text.encode()):08x}"


def contents(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes of all files in a folder, by which a record tells data apart."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted((str(path.relative_to(folder)), path.stat().st_size) for path in files)
