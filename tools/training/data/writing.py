"""workers: processes that turn texts into finished files of tokens, each written in one step."""

import fcntl
import io
import multiprocessing
import os
import signal
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tools.training.data.manifest import Manifest
from zoo import Tokenizer

# Encodings have some 200 bytes a token beside its id, so a whole shard at once takes 400 MB.
_AT_ONCE = 500_000  # characters
_NEW = ".new"  # of the names of unfinished files


class Job(NamedTuple):
    """One shard.

    Attributes:
        source: its name.
        path: of the tokens.
        texts: of its documents; none if the shard is finished.
        read: bytes or rows that were read for it.
    """

    source: str
    path: Path
    texts: list[str]
    read: int


class Encoder:
    """Writes shards; a process has one."""

    def __init__(self, tokenizer: Tokenizer, manifest: Manifest) -> None:
        self._tokenizer = tokenizer
        self._add_bos = manifest["tokenizer"]["add_bos"]
        end = manifest["tokenizer"]["end_id"]
        self._end = [] if end is None else [end]
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")

    def write(self, job: Job) -> int:
        """Writes the tokens, then the lengths that say that they are whole; `job.read`."""
        if job.texts:
            lengths, parts = [], []
            for texts in cut(job.texts, _AT_ONCE):
                for ids in self._tokenizer.encode_batch(texts, add_bos=self._add_bos):
                    # Raises where an id does not fit, which the size of the vocabulary rules out.
                    parts.append(np.array([*ids, *self._end], self._dtype))
                    lengths.append(len(parts[-1]))
            with _replacing(job.path) as path:
                path.write_bytes(np.concatenate(parts).data)  # `tofile` hides why it failed
            save_array(lengths_path(job.path), np.array(lengths, np.int64))
        return job.read


@contextmanager
def workers(
    tokenizer: Tokenizer, manifest: Manifest, jobs: int, advance: Callable[[int], None]
) -> Iterator[Callable[[Job], None]]:
    """A function that has a shard written, by this process or the next free one of `jobs`.

    At the end of the block all shards are written. `advance` is told what each was read from.
    """
    if jobs == 1:
        encoder = Encoder(tokenizer, manifest)
        yield lambda job: advance(encoder.write(job))
        return
    waiting: deque[Future[int]] = deque()
    # Not forks: threads of the tokenizer do not survive them.
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _begin_worker, (tokenizer, manifest)
    )

    def submit(job: Job) -> None:
        if not job.texts:
            advance(job.read)
            return
        if len(waiting) >= 2 * jobs:  # more would only fill memory with texts
            advance(waiting.popleft().result())
        waiting.append(pool.submit(_work, job))

    try:
        yield submit
        while waiting:
            advance(waiting.popleft().result())
    except BrokenProcessPool:
        raise ValueError(
            "a process was killed, perhaps for want of memory; go on with fewer jobs"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # of a worker


def _begin_worker(tokenizer: Tokenizer, manifest: Manifest) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says it once for all
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer, manifest)


def _work(job: Job) -> int:
    return _encoder.write(job)


def _end_with_parent() -> None:
    """A worker of a parent that was killed would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def cut(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Runs of documents, each but the last of at least so many characters."""
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= characters:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the folder; the lock goes with the process that holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {folder}; wait for its end") from None
        yield
    finally:
        os.close(descriptor)


def lengths_path(tokens: Path) -> Path:
    """Where the lengths of the documents of a shard are until the folder is complete."""
    return tokens.with_suffix(".lengths.npy")


def is_finished(tokens: Path) -> bool:
    """Whether a shard was written to its end."""
    return tokens.exists() and lengths_path(tokens).exists()


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed were writing."""
    for path in folder.glob(f".*{_NEW}"):
        path.unlink()


def save_array(path: Path, array: npt.NDArray[np.int64]) -> None:
    """A .npy file, in one step."""
    content = io.BytesIO()
    np.save(content, array)
    with _replacing(path) as fresh:
        fresh.write_bytes(content.getbuffer())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when it is on the disk."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_NEW}")
    try:
        yield fresh
        with fresh.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
