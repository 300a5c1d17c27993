"""The command `zoo`: one subcommand, or group of them, per module of tools/."""

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from tools.ablate import ablate
from tools.adapter import adapter
from tools.bench import app as bench
from tools.chat import chat
from tools.compare import compare
from tools.curves import curves
from tools.entry import run
from tools.evaluate import evaluate
from tools.export import export
from tools.finetune import finetune
from tools.generate import generate
from tools.info import info
from tools.list import list_models
from tools.passkey import passkey
from tools.perplexity import perplexity
from tools.place import place
from tools.plant_recall import plant_recall
from tools.sample_corpus import sample_corpus
from tools.tokenize import tokenize
from tools.train_tokenizer import train_tokenizer

app = typer.Typer(
    add_completion=False, help="Hybrid language models with FlashEVA and full attention."
)
for name, command in (
    ("generate", generate),
    ("chat", chat),
    ("list", list_models),
    ("info", info),
    ("perplexity", perplexity),
    ("passkey", passkey),
    ("evaluate", evaluate),
    ("compare", compare),
    ("place", place),
    ("ablate", ablate),
    ("sample-corpus", sample_corpus),
    ("train-tokenizer", train_tokenizer),
    ("plant-recall", plant_recall),
    ("tokenize", tokenize),
    ("finetune", finetune),
    ("curves", curves),
    ("export", export),
    ("adapter", adapter),
):
    app.command(name)(command)
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("flasheva-zoo")
        except importlib.metadata.PackageNotFoundError:
            version = "in a checkout that is not installed"
        print(f"zoo {version}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show and exit."),
    ] = False,
) -> None:
    del version  # its callback has done everything


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `zoo ARGUMENTS`, by default those of the process; its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run(app, given or ["--help"], program="zoo")


if __name__ == "__main__":
    sys.exit(main())
