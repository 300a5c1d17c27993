"""`zoo generate`: text from a model, one prompt as it comes or a batch of them."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.display import print_json, print_rule
from tools.entry import run_command
from tools.generation_options import GenerationOptions
from tools.model_options import AttentionOptions, RuntimeOptions, SourceOptions, load_model
from tools.options import EMBEDDED_MODEL, Json, ModelName, with_options
from tools.prompts import collect_prompts

if TYPE_CHECKING:
    from zoo import CausalLM


@with_options
def generate(
    source: SourceOptions,
    runtime: RuntimeOptions,
    attention: AttentionOptions,
    generation: GenerationOptions,
    name: ModelName = EMBEDDED_MODEL,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Texts to continue, each in quotes."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="One more; may be repeated.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='One prompt a line; a .jsonl file has a "prompt" in each.'
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A smaller model with the same tokens, which drafts for this one (speculative "
            "decoding); the text stays what it would be.",
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --draft, drafted at a time.", show_default="4"),
    ] = None,
    json: Json = False,
) -> None:
    """Continues prompts, or the text on stdin; prints what the model writes, without the prompt.

    One prompt is printed as its text comes; several are computed as one batch.
    """
    if draft is None and draft_tokens is not None:
        raise ValueError(f"--draft-tokens {draft_tokens} needs --draft NAME; give it as well")
    if draft_tokens is not None and draft_tokens < 1:
        raise ValueError(f"--draft-tokens must be at least 1, not {draft_tokens}")
    sampling = generation.sampling()
    _resolve(name, text_given=bool(prompts or prompt or prompts_file))
    if draft is not None:
        from zoo.target import resolve

        resolve(draft)
    texts = collect_prompts([*(prompts or ()), *(prompt or ())], prompts_file)
    model = load_model(name, source, attention, runtime)
    import zoo

    helper = None
    if draft is not None:
        helper = zoo.load(draft, device=model.device, dtype=runtime.dtype, impl=runtime.impl)

    rows = [_chat_ids(model, text) if chat else text for text in texts]
    if len(rows) == 1 and not json:
        for piece in zoo.stream(
            model,
            rows[0],
            max_new_tokens=generation.max_new_tokens,
            sampling=sampling,
            stop=generation.stop or (),
            max_seq_len=generation.max_seq_len,
            cache_dtype=generation.cache_dtype,
            compile=generation.compile,
            draft=helper,
            draft_tokens=draft_tokens,
        ):
            print(piece, end="", flush=True)
        print()
        return
    start = time.perf_counter()
    results = zoo.generate(
        model,
        rows,
        max_new_tokens=generation.max_new_tokens,
        sampling=sampling,
        stop=generation.stop or (),
        max_seq_len=generation.max_seq_len,
        cache_dtype=generation.cache_dtype,
        compile=generation.compile,
        draft=helper,
        draft_tokens=draft_tokens,
    )
    seconds = round(time.perf_counter() - start, 3)
    for number, (text, result) in enumerate(zip(texts, results, strict=True), start=1):
        if json:
            print_json(
                {
                    "prompt": text,
                    "text": result.text,
                    "prompt_tokens": len(result.prompt_ids),
                    "new_tokens": len(result.ids),
                    "finish_reason": result.finish_reason,
                    "model": name,
                    "weights_source": model.weights_source,
                    "seconds": seconds,  # of the whole batch
                }
            )
        else:
            print_rule(f"{number} of {len(texts)}")
            print(result.text)


def _resolve(name: str, *, text_given: bool) -> None:
    """Refuses a name that means nothing, before stdin is read and anything is loaded."""
    from zoo.target import resolve

    try:
        resolve(name)
    except ValueError as error:
        if text_given and len(name.split()) == 1:
            raise
        hint = "(the first argument is NAME; give the text with --prompt)"
        raise ValueError(f"{error} {hint}") from None


def _chat_ids(model: "CausalLM", text: str) -> list[int]:
    """A prompt as the first message of a conversation, up to where the model answers."""
    if model.tokenizer is None:
        raise ValueError("--chat needs a tokenizer, which this model does not have")
    messages = [{"role": "user", "content": text}]
    rendered = model.tokenizer.render_chat(messages, add_generation_prompt=True)
    return model.tokenizer.encode(rendered, add_bos=False)


if __name__ == "__main__":
    sys.exit(run_command(generate, "generate"))
