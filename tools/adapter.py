"""`zoo adapter`: a small folder with what a fine-tuned model has that its base has not."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.display import print_json, print_table
from tools.entry import run_command
from tools.options import Json, ModelName

if TYPE_CHECKING:
    from tools.adapter_budget import Trial


def adapter(
    name: ModelName,
    base: Annotated[
        str, typer.Option(metavar="NAME", help="The model that was fine-tuned, as published.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New, or of an adapter.")],
    encode: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODING",
            help="Of matrices that changed: whole, low_rank:RANK, low_rank:RANK:STORED with "
            "factors in float32, bfloat16, float16, int8 or int4, or the difference in int8 or "
            "int4.",
            show_default="none may have changed",
        ),
    ] = None,
    budget_mb: Annotated[
        float | None,
        typer.Option(
            metavar="MB",
            help="Instead of --encode: try what fits into so many millions of bytes, take the one "
            "with the smallest error of the weights.",
            show_default="no limit",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Makes an adapter of a fine-tuned model, and says what it loses.

    EVA parameters, norms and biases are kept whole, matrices that changed as --encode says. What
    that means for the model, `zoo perplexity` and `zoo evaluate` measure on the adapter's folder.
    """
    if encode is not None and budget_mb is not None:
        raise ValueError("--encode and --budget-mb exclude each other: the budget chooses")
    if budget_mb is not None and not 0 < budget_mb < float("inf"):
        raise ValueError(f"--budget-mb must be a positive number, not {budget_mb}")
    import zoo
    from tools.adapter_budget import Trials, lost
    from zoo.weights.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
    from zoo.weights.encoding import Encoding

    if encode is not None:
        Encoding.parse(encode)
    model = zoo.load(name, device="cpu", dtype="float32")
    published = zoo.load(base, device="cpu", dtype="float32", weights="published")
    trials = []
    if budget_mb is not None:
        able = Trials(model, published)
        trials = able.run(able.candidates(int(budget_mb * 1e6)))
        encode = str(min(trials, key=lambda trial: trial.lost).encoding)
    zoo.save_adapter(model, out, base=published, base_name=base, encode=encode)
    found = lost(model, zoo.load(out, device="cpu", dtype="float32"), published)
    size = sum(file.stat().st_size for file in (out / ADAPTER_CONFIG, out / ADAPTER_WEIGHTS))
    if json:
        print_json(
            {
                "folder": str(out),
                "bytes": size,
                "encode": encode,
                "lost": {kind: {"tensors": n, "lost": part} for kind, (n, part) in found.items()},
                "trials": [each._asdict() | {"encoding": str(each.encoding)} for each in trials],
            }
        )
        return
    if trials:
        _show_trials(trials)
    print(f"{out}: {size / 1e6:.2f} MB" + ("" if encode is None else f", {encode}"))
    if found:
        print("What is lost of the difference to the base, |D - D'| / |D|:\n")
        rows = [(kind, str(count), f"{part:.2e}") for kind, (count, part) in found.items()]
        print_table(("parameter", "tensors", "lost"), rows)


def _show_trials(trials: list["Trial"]) -> None:
    rows = [(str(t.encoding), f"{t.bytes / 1e6:.2f} MB", f"{t.lost:.2e}") for t in trials]
    print_table(("encoding", "at most", "lost"), rows)
    print()


if __name__ == "__main__":
    sys.exit(run_command(adapter, "adapter"))
