"""`zoo passkey`: does a model find a number that is hidden in a long text?"""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tools.display import print_json, progress
from tools.entry import command_line, run_command
from tools.measurement import implementation, model_case, tokenizer_for_rows
from tools.model_options import AttentionOptions, RuntimeOptions, SourceOptions, load_model
from tools.options import DEFAULT_MODEL, BatchSize, Json, ModelName, Out, with_options
from tools.results import append_result, check_results
from tools.scoring.passkey_prompts import DEFAULT_DEPTHS, WORDINGS, PasskeyPrompts
from tools.text_files import read_text

log = logging.getLogger("zoo")

_WORDS = ", ".join(WORDINGS)


@with_options
def passkey(
    source: SourceOptions,
    runtime: RuntimeOptions,
    attention: AttentionOptions,
    name: ModelName = DEFAULT_MODEL,
    length: Annotated[
        int, typer.Option(metavar="TOKENS", help="Of a prompt, question and answer included.")
    ] = 2048,
    n: Annotated[int, typer.Option("--n", help="Prompts per wording.")] = 48,
    seed: Annotated[int, typer.Option(help="Of numbers, depths and slices of the hay.")] = 0,
    min_depth: Annotated[
        float, typer.Option(help="Of the number in the hay: 0 is its beginning, 1 its end.")
    ] = DEFAULT_DEPTHS[0],
    max_depth: Annotated[
        float, typer.Option(help="The default fits 2,048 tokens and a window of 256.")
    ] = DEFAULT_DEPTHS[1],
    wording: Annotated[
        list[str] | None,
        typer.Option(
            "--wording",  # Typer 0.27 would call it --WORDING
            metavar="NAME",
            help=f"How the number is told and asked for: {_WORDS}, or all; may be repeated.",
            show_default="magic",
        ),
    ] = None,
    hay: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The long text: UTF-8, or JSON lines; .xz, .gz and .zst work.",
            show_default="The grass is green. The sky is blue. ...",
        ),
    ] = None,
    batch_size: BatchSize = 1,
    json: Json = False,
    out: Out = None,
) -> None:
    """Hides a 5-digit number at a random depth of a long text and asks for it.

    A prompt counts when every token of the answer is the most likely one, given those before.
    """
    check_results(out)
    wordings = _chosen(wording or ["magic"])
    text = None if hay is None else read_text(hay)
    model = load_model(name, source, attention, runtime)
    from tools.scoring.passkey import measure_passkey

    prompts = PasskeyPrompts(tokenizer_for_rows(name, model, length), text, length)
    window = model.config.eva.window_size
    windowed = {"eva_attention", "window_attention"} & set(model.config.layer_types)
    if windowed and (1 - max_depth) * length < window:
        log.warning(
            "%s: numbers in the last %d of %d tokens are inside its window; a greater --length or "
            "a smaller --max-depth keeps out of it",
            *(name, window, length),
        )
    depths = (min_depth, max_depth)
    drawn = {chosen: prompts.draw(WORDINGS[chosen], n, seed, depths) for chosen in wordings}
    for chosen, rows in drawn.items():
        start = time.perf_counter()
        with progress(chosen, n) as advance:
            result = measure_passkey(model, rows, batch_size=batch_size, advance=advance)
        seconds = time.perf_counter() - start
        case = model_case(name, model) | {
            "task": "passkey",
            "wording": chosen,
            "hay": "filler" if hay is None else hay.name,
            "context": length,
            "n": n,
            "seed": seed,
            "depths": list(depths),
            "batch": batch_size,
        }
        error = result.log_likelihood_error
        if json:
            values = {
                "accuracy": result.accuracy,
                "accuracy_error": result.accuracy_error,
                "log_likelihood": result.log_likelihood,
                "log_likelihood_error": error,
            }
            print_json(case | values | {"seconds": round(seconds, 3)})
        else:
            shown = "" if error is None else f" ± {error:.3f}"
            print(
                f"{chosen}: accuracy {result.accuracy:.3f} ± {result.accuracy_error:.3f}, "
                f"log-likelihood {result.log_likelihood:.3f}{shown} "
                f"({n} prompts of {length} tokens in {seconds:.1f} s)",
                flush=True,
            )
        if out is not None:
            for metric, value, spread, unit in (
                ("accuracy", result.accuracy, result.accuracy_error, ""),
                ("log_likelihood", result.log_likelihood, error, "nats"),
            ):
                append_result(
                    out,
                    bench="evaluate",
                    case=case,
                    impl=implementation(model, runtime.impl, length),
                    metric=metric,
                    value=value,
                    unit=unit,
                    spread=spread,
                    device=model.device,
                    command=command_line(),
                )


def _chosen(names: list[str]) -> list[str]:
    if "all" in names:
        return list(WORDINGS)
    for name in names:
        if name not in WORDINGS:
            raise ValueError(f"wording must be one of {_WORDS}, or all, not {name!r}")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(run_command(passkey, "passkey"))
