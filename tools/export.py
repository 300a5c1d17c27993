"""`zoo export`: a folder that `transformers` loads without this package."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from recipes import is_converted
from tools.entry import run_command
from tools.model_options import AttentionOptions, SourceOptions, configured
from tools.options import ModelName, with_options


@with_options
def export(
    source: SourceOptions,
    attention: AttentionOptions,
    name: ModelName,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New, or empty.")],
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16, float16 or float64.")
    ] = "float32",
    tokenizer: Annotated[
        bool, typer.Option(help="Write the tokenizer too; without one it is an error.")
    ] = True,
) -> None:
    """Writes a folder that transformers loads: AutoModelForCausalLM, AutoTokenizer.

    A model that is not converted is loaded natively. Any other brings its own modelling
    code, which needs torch and transformers only: pass trust_remote_code=True.
    """
    eva, layer_types = configured(name, source, attention)
    import zoo
    from zoo.export import check_exportable, export_model

    check_exportable(folder)
    model = zoo.load(
        name,
        device="cpu",
        dtype=dtype,
        eva=eva,
        layer_types=layer_types,
        revision=source.revision,
        weights=source.weights,
    )
    export_model(model, folder, tokenizer=tokenizer)
    native = not is_converted(model.config.layer_types)
    arguments = f'"{folder}"' if native else f'"{folder}", trust_remote_code=True'
    print(f"AutoModelForCausalLM.from_pretrained({arguments})")


if __name__ == "__main__":
    sys.exit(run_command(export, "export"))
