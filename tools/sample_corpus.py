"""`zoo sample-corpus`: short texts in simple English, written by an instruct model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tools.display import print_json, print_table, progress
from tools.entry import command_line, run_command
from tools.model_options import AttentionOptions, RuntimeOptions, SourceOptions, load_model
from tools.options import BatchSize, Json, ModelName, option, with_options

_PANEL = "Generation"


@with_options
def sample_corpus(
    source: SourceOptions,
    runtime: RuntimeOptions,
    attention: AttentionOptions,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl.zst",
            help="One JSON object a line: id, text, form, prompt. Gone on with if the command was "
            "killed, or asked for more tokens.",
        ),
    ],
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Of the kept texts, by the model's own tokenizer.")
    ],
    name: ModelName = "smollm2-135m-instruct",
    seed: Annotated[int, typer.Option(help="Of prompts and random numbers.")] = 0,
    batch_size: BatchSize = 64,
    max_new_tokens: Annotated[int, option(_PANEL, "At most so many per text.")] = 320,
    temperature: Annotated[float, option(_PANEL, "0 takes the most likely token.")] = 0.7,
    top_k: Annotated[int | None, option(_PANEL, "Draw from the k most likely tokens.")] = None,
    top_p: Annotated[
        float,
        option(_PANEL, "Draw from the most likely tokens that together reach this probability."),
    ] = 0.9,
    min_p: Annotated[
        float | None,
        option(_PANEL, "Draw from tokens with this fraction of the best one's probability."),
    ] = None,
    repetition_penalty: Annotated[
        float, option(_PANEL, "Above 1, tokens that were there already lose.")
    ] = 1.05,
    cache_dtype: Annotated[
        str | None,
        option(_PANEL, "float8_e4m3fn stores keys and values in a byte.", default="the weights'"),
    ] = None,
    compile: Annotated[
        bool, option(_PANEL, "Use torch.compile; pays off on a GPU.", "--compile")
    ] = False,
    json: Json = False,
) -> None:
    """Samples short stories, explanations and talks for children from an instruct model.

    What is asked for is drawn from lists of subjects. Texts that are no simple English, that
    repeat themselves or that copy earlier ones are dropped, and counted by reason.
    """
    from tools.corpus.filters import REASONS
    from tools.corpus.sampling import SamplingPlan, check_file, sample
    from zoo import Sampling

    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    plan = SamplingPlan(
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        compile=compile,
        cache_dtype=cache_dtype,
    )
    check_file(name, out, plan)
    model = load_model(name, source, attention, runtime)
    with progress("tokens", tokens) as advance:
        counts = sample(
            model, name, out, plan, tokens=tokens, command=command_line(), advance=advance
        )
    texts = counts["kept"] + sum(counts["dropped"].values())
    speed = counts["written"] / counts["seconds"] if counts["seconds"] else 0.0
    if json:
        print_json({"file": str(out), **counts, "tokens_per_second": round(speed, 1)})
        return
    rows = [("kept", f"{counts['kept']:,}", "")]
    rows += [
        (reason, f"{counts['dropped'][reason]:,}", meaning)
        for reason, meaning in REASONS.items()
        if reason in counts["dropped"]
    ]
    print_table(("texts", "number", "what that means"), rows)
    print(
        f"\n{counts['tokens']:,} tokens in {counts['kept']:,} of {texts:,} texts in {out}; "
        f"{counts['written']:,} tokens written in {counts['seconds']:,.1f} s, {speed:,.0f}/s"
    )


if __name__ == "__main__":
    sys.exit(run_command(sample_corpus, "sample-corpus"))
