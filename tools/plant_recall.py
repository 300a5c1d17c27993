"""`zoo plant-recall`: documents that ask for facts far behind, made of the texts of a corpus."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from tools.display import print_json, print_table, progress
from tools.entry import run_command
from tools.options import Json


def plant_recall(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Of `zoo sample-corpus`, or texts like those."),
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME", help="A model, or a folder that has a tokenizer.")
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE.jsonl.zst", help="One JSON object a line; replaced if there."),
    ],
    documents: Annotated[int, typer.Option(metavar="N", help="How many.")],
    size: Annotated[
        int, typer.Option(metavar="TOKENS", help="Of a document: a row of the training.")
    ] = 1024,
    chunk_size: Annotated[
        int, typer.Option(help="Of the model's EVA layers: documents end in a row's last chunk.")
    ] = 8,
    split: Annotated[
        Literal["train", "test"], typer.Option(help="Which half of the wordings.")
    ] = "train",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    json: Json = False,
) -> None:
    """Plants facts in stories and asks for them later in the same document.

    Give the file a weight of its own in the training: then a row holds one document, and no answer
    is cut off from its fact.
    """
    from tools.corpus.recall.writing import write_documents

    with progress("documents", documents) as advance:
        found = write_documents(
            files,
            tokenizer,
            out,
            documents=documents,
            size=size,
            chunk_size=chunk_size,
            split=split,
            seed=seed,
            advance=advance,
        )
    if json:
        print_json({"file": str(out), **found})
        return
    print_table(
        ("tokens from fact to answer", "answers"),
        [(f"{x['least']} to {x['below'] - 1}", f"{x['answers']:,}") for x in found["distances"]],
    )
    print(
        f"\n{found['documents']:,} documents of {found['tokens']:,} tokens in {out}; they ask for "
        f"{found['answers']:,} facts"
    )


if __name__ == "__main__":
    sys.exit(run_command(plant_recall, "plant-recall"))
