"""`zoo train-tokenizer`: a SentencePiece tokenizer of texts, as a folder for `zoo tokenize`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tools.display import print_json, progress
from tools.entry import run_command
from tools.options import Json


def train_tokenizer(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help='JSON lines with a "text" each (.jsonl) or texts, also with .xz, .gz or .zst.',
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="An earlier tokenizer there is replaced.")
    ],
    vocab_size: Annotated[
        int, typer.Option(metavar="N", help="Pieces, 256 bytes and 4 special ones among them.")
    ] = 4096,
    json: Json = False,
) -> None:
    """Trains a tokenizer (BPE, digits alone, bytes for what it lacks) by SentencePiece.

    The same files give the same tokenizer.
    """
    from tools.corpus.tokenizer import train_tokenizer as train_into
    from tools.training.data.readers import read_documents

    total = sum(path.stat().st_size for path in files)
    start = time.perf_counter()
    with progress("bytes", total) as advance:
        texts = (text for path in files for text in read_documents(str(path), advance=advance))
        found = train_into(texts, vocab_size, out)
    seconds = time.perf_counter() - start
    if json:
        print_json(
            {"folder": str(out), "vocab_size": found.vocab_size, "seconds": round(seconds, 3)}
        )
    else:
        print(f"a tokenizer of {found.vocab_size:,} pieces in {out}, in {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(run_command(train_tokenizer, "train-tokenizer"))
