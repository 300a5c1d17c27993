"""`zoo tokenize`: texts to a folder of tokens that training reads."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tools.display import print_json, print_table, progress
from tools.entry import run_command
from tools.options import Json, parse_shares


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Text files, JSON lines (.jsonl), both also with .xz, .gz or .zst, or data sets "
            "as hf:NAME:SPLIT[:FIELD]; NAME=SOURCE names a source, of which several can be "
            "parts.",
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME", help="A model, or a folder that has a tokenizer.")
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Made, or gone on with if the command was killed."),
    ],
    field: Annotated[
        str, typer.Option(help="Of the JSON objects or the data set, that holds the text.")
    ] = "text",
    marker: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What parts the documents of a text file.",
            show_default="a file is one document",
        ),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin every document with the token for that.",
            show_default="as the model was published",
        ),
    ] = None,
    end: Annotated[
        str,
        typer.Option(
            metavar="TOKEN",
            help="Behind every document: eos (the tokenizer's), none, or such as <|endoftext|>.",
        ),
    ] = "eos",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE=SHARE",
            help="Use this share of a source's documents, chosen by their checksums; may be "
            "repeated.",
            show_default="all of every source",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Processes.", show_default="one for each CPU")
    ] = None,
    json: Json = False,
) -> None:
    """Tokenises texts once, into files that training maps into memory.

    The same command goes on after a kill. A folder of other texts or of another tokenizer is
    refused.
    """
    from tools.training.data.readers import HubSource
    from tools.training.data.shards import tokenize as tokenize_into
    from tools.training.data.sources import name_sources
    from tools.training.data.tokenizers import open_tokenizer

    shares = parse_shares(keep, "--keep")
    inputs = [source for group in name_sources(sources).values() for source in group]
    files = [Path(source) for source in inputs if HubSource.parse(source) is None]
    # Rows of a data set cannot be added to bytes.
    total = sum(p.stat().st_size for p in files) if len(files) == len(inputs) else None
    found = open_tokenizer(tokenizer)
    start = time.perf_counter()
    with progress("bytes", total) as advance:
        manifest = tokenize_into(
            sources,
            found,
            out,
            field=field,
            marker=marker,
            add_bos=bos,
            end=end,
            keep=shares,
            jobs=jobs,
            advance=advance,
        )
    seconds = time.perf_counter() - start
    counts = [(s["name"], s["documents"], s["tokens"]) for s in manifest["sources"]]
    documents, tokens = sum(row[1] for row in counts), sum(row[2] for row in counts)
    if json:
        by_name = {name: {"documents": d, "tokens": t} for name, d, t in counts}
        print_json(
            {"folder": str(out), "tokenizer": tokenizer, "documents": documents}
            | {"tokens": tokens, "sources": by_name, "seconds": round(seconds, 3)}
        )
        return
    print_table(
        ("source", "documents", "tokens"),
        [(name, f"{d:,}", f"{t:,}") for name, d, t in counts],
    )
    print(f"\n{tokens:,} tokens of {documents:,} documents in {out}, in {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(run_command(tokenize, "tokenize"))
