"""write_documents: a file of recall documents, which appears whole or not at all."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from tools.corpus.recall.documents import RecallDocument, RecallWriter
from tools.corpus.recall.wordings import Split
from tools.corpus.store import open_new
from tools.training.data.readers import read_documents
from tools.training.data.tokenizers import open_tokenizer

_EDGES = (0, 64, 128, 256, 512, 1024)


class Distances(TypedDict):
    """Answers whose facts are at least `least` tokens before them, and fewer than `below`."""

    least: int
    below: int
    answers: int


class Written(TypedDict):
    """What is in the file; `tokens` with those that stand round each document."""

    documents: int
    tokens: int
    answers: int
    distances: list[Distances]


def write_documents(
    files: Sequence[Path],
    tokenizer: str,
    out: Path,
    *,
    documents: int,
    size: int,
    chunk_size: int,
    split: Split,
    seed: int,
    advance: Callable[[int], None] = lambda documents: None,
) -> Written:
    """Writes documents 0 to `documents` - 1 of a `RecallWriter`.

    Args:
        files: of the stories.
        tokenizer: a model, or a folder.
        out: ends in .jsonl or .jsonl.zst; replaced in one step.
        documents: how many.
        size, chunk_size, split, seed: see `RecallWriter`.
        advance: told how many more documents are written.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: in one line, a damaged file, no such tokenizer, too few stories, or numbers
            that do not fit.
    """
    if documents < 1:
        raise ValueError(f"documents must be at least 1, not {documents}")
    with open_new(out) as write:
        stories = [text for path in files for text in read_documents(str(path))]
        writer = RecallWriter(
            stories,
            open_tokenizer(tokenizer),
            size=size,
            chunk_size=chunk_size,
            seed=seed,
            split=split,
        )
        tokens, found = 0, list[int]()
        for index in range(documents):
            document = writer.document(index)
            write(_line(document, f"recall-{split}-{seed}-{index}"))
            tokens += document.tokens
            found += document.distances
            advance(1)
    last = max(_EDGES[-1], size)
    bins = list(zip(_EDGES, (*_EDGES[1:-1], last), strict=False))
    return Written(
        documents=documents,
        tokens=tokens,
        answers=len(found),
        distances=[
            Distances(least=a, below=b, answers=sum(a <= distance < b for distance in found))
            for a, b in bins
        ],
    )


def _line(document: RecallDocument, name: str) -> str:
    asked = [
        {"kind": fact.kind, "value": fact.value, "distance": distance}
        for fact, distance in zip(document.asked, document.distances, strict=True)
    ]
    return json.dumps({"id": name, "text": document.text, "asked": asked}) + "\n"
