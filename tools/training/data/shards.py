"""tokenize: texts to a folder of tokens, once; open_shards: the folder, mapped into memory.

    manifest.json           what it was made of and with, counts, "complete" at the end
    NAME-0000-00000.tokens  tokens of whole documents: input 0 of source NAME, shard 0; raw, little
                            endian, 2 or 4 bytes each
    NAME.starts.npy         int64 [documents + 1], where each document begins in its source

A shard ends with the document that fills it up to a number of characters, so the same texts make
the same shards on any number of processes. Beside a shard lie the lengths of its documents until
the folder is complete; they are written last and say that the shard is finished.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.training.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    ShardEntry,
    SourceEntry,
    begin,
    plan,
    read_manifest,
    write_manifest,
)
from tools.training.data.readers import check_not_empty, read_documents
from tools.training.data.sources import draw, name_sources
from tools.training.data.writing import (
    Job,
    alone,
    cut,
    is_finished,
    lengths_path,
    remove_leftovers,
    save_array,
    workers,
)
from zoo import Tokenizer

# Of text in a shard: some million tokens. A kill loses less than this for every process.
SHARD_CHARACTERS = 4_000_000
_ADVICE = "remove the folder and tokenise once more"  # a complete one is not looked into again

Lengths = npt.NDArray[np.int64]


def tokenize(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    field: str = "text",
    marker: str | None = None,
    add_bos: bool | None = None,
    end: str = "eos",
    keep: Mapping[str, float] | None = None,
    jobs: int | None = None,
    shard_characters: int = SHARD_CHARACTERS,
    advance: Callable[[int], None] | None = None,
) -> Manifest:
    """Tokenises documents into shards; a folder that a killed call left is gone on with.

    Args:
        sources: files and data sets, see sources.py for their names.
        tokenizer: of the model.
        folder: made if missing; a complete one of the same texts and tokenizer is left alone.
        field, marker: see `read_documents`.
        add_bos: see `Tokenizer.encode`.
        end: see `end_id`.
        keep: of the documents of sources, the share that is used, see `draw`; of others, all are.
        jobs: processes; None: one for each CPU. 1: none but this one.
        shard_characters: see above.
        advance: told how many more bytes of files, or rows of data sets, are done with.

    Returns:
        The manifest.

    Raises:
        OSError: a file cannot be opened.
        ValueError: in one line, a source without text (before any is tokenised), a damaged one,
            a share of no source, one that no document is in (once the source has been read), or
            a folder of another tokenizer, of other texts or of something else.
    """
    jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
    if jobs < 1 or shard_characters < 1:
        raise ValueError(
            f"jobs and shard_characters must be at least 1, not {jobs} and {shard_characters}"
        )
    named, shares = name_sources(sources), dict(sorted((keep or {}).items()))
    for name, share in shares.items():
        if name not in named:
            raise ValueError(f"no source is named {name!r}; there are {', '.join(named)}")
        if not 0 < share <= 1:
            raise ValueError(f"the share of {name} to keep must be in (0, 1], not {share}")
    shares = {name: share for name, share in shares.items() if share < 1}
    for source in (source for inputs in named.values() for source in inputs):
        check_not_empty(source, field=field)  # not after hours of others
    wanted = plan(
        named,
        tokenizer,
        reading={"field": field, "marker": marker, "shard_characters": shard_characters}
        | {f"keep {name}": share for name, share in shares.items()},
        add_bos=add_bos,
        end=end,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        found = begin(folder, wanted)
        if not found["complete"]:
            remove_leftovers(folder)
            names = {name: list[str]() for name in named}
            with workers(tokenizer, wanted, jobs, advance or (lambda _: None)) as submit:
                for job in _jobs(named, shares, folder, field, marker, shard_characters):
                    names[job.source].append(job.path.stem)
                    submit(job)
            found = _finish(folder, wanted, names)
        for path in folder.glob("*.lengths.npy"):
            path.unlink()  # the index of the source has them now
    return found


def _jobs(
    named: dict[str, list[str]],
    keep: Mapping[str, float],
    folder: Path,
    field: str,
    marker: str | None,
    shard_characters: int,
) -> Iterator[Job]:
    """One for each shard, in order; without texts where the shard is finished."""
    read: list[int] = []
    for name, inputs in named.items():
        empty = True
        for index, source in enumerate(inputs):
            documents = read_documents(source, field=field, marker=marker, advance=read.append)
            if name in keep:
                documents = draw(documents, keep[name])
            for number, texts in enumerate(cut(documents, shard_characters)):
                path = folder / f"{name}-{index:04d}-{number:05d}.tokens"
                empty = False
                yield Job(name, path, [] if is_finished(path) else texts, sum(read))
                read.clear()
        if empty:  # of files with text, so what is empty is a share of them
            raise ValueError(
                f"no document of {name} is in the share to keep, {keep[name]}; name a greater one "
                "and a new folder"
            )


def _finish(folder: Path, wanted: Manifest, names: dict[str, list[str]]) -> Manifest:
    """Writes the index of every source, then the manifest."""
    sources: list[SourceEntry] = []
    for entry in wanted["sources"]:
        lengths = [np.load(lengths_path(folder / f"{n}.tokens")) for n in names[entry["name"]]]
        every = np.concatenate(lengths)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(every)])
        save_array(_index_path(folder, entry["name"]), starts)
        shards = [
            ShardEntry(name=name, documents=len(part), tokens=int(part.sum()))
            for name, part in zip(names[entry["name"]], lengths, strict=True)
        ]
        sources.append(
            SourceEntry(
                name=entry["name"],
                inputs=entry["inputs"],
                documents=len(every),
                tokens=int(every.sum()),
                shards=shards,
            )
        )
    manifest: Manifest = {**wanted, "complete": True, "sources": sources}
    write_manifest(folder, manifest)
    return manifest


class TokenSource:
    """The documents of one source, read from disk when asked for.

    Attributes:
        name: of the source.
        lengths: int64 [documents], tokens of each.
    """

    def __init__(self, folder: Path, entry: SourceEntry, dtype: np.dtype[np.generic]) -> None:
        self.name = entry["name"]
        index = _index_path(folder, self.name)
        try:
            starts = np.load(index, mmap_mode="r")
        except (OSError, EOFError, ValueError):  # missing, empty, or no such file
            raise ValueError(f"{index} is missing or damaged; {_ADVICE}") from None
        documents = np.cumsum([0, *(shard["documents"] for shard in entry["shards"])])
        if len(starts) != documents[-1] + 1 or starts[-1] != entry["tokens"]:
            raise ValueError(f"{index} does not fit {MANIFEST_FILE}; {_ADVICE}")
        self._starts, self._first = starts, documents
        self._shards = [_map(folder, shard, dtype) for shard in entry["shards"]]
        self.lengths: Lengths = np.diff(starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> Lengths:
        """int64, the tokens `start` to `stop` (its end) of a document."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        offset = int(self._starts[document] - self._starts[self._first[shard]])
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        return self._shards[shard][offset + start : offset + stop].astype(np.int64)


@dataclass(frozen=True)
class Shards:
    """A complete folder.

    Attributes:
        manifest: see manifest.py.
        sources: in the order in which they were given.
    """

    manifest: Manifest
    sources: tuple[TokenSource, ...]


def open_shards(folder: Path) -> Shards:
    """Maps a folder that `tokenize` has completed.

    Raises:
        ValueError: in one line, no such folder, an unfinished or a damaged one.
    """
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise ValueError(f"{folder} is not complete; run the command that made it once more")
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    return Shards(manifest, tuple(TokenSource(folder, s, dtype) for s in manifest["sources"]))


def _map(folder: Path, shard: ShardEntry, dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    path = folder / f"{shard['name']}.tokens"
    if not path.is_file():
        raise ValueError(f"{path} is missing; {_ADVICE}")
    size, wanted = path.stat().st_size, shard["tokens"] * dtype.itemsize
    if size != wanted:
        raise ValueError(
            f"{path} is damaged: it has {size:,} bytes instead of {wanted:,}; {_ADVICE}"
        )
    if wanted == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _index_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.starts.npy"
