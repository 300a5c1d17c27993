"""`zoo chat`: a conversation with a model, in its own chat template."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated

import typer

from tools.entry import run_command
from tools.generation_options import GenerationOptions
from tools.model_options import AttentionOptions, RuntimeOptions, SourceOptions, load_model
from tools.options import DEFAULT_MODEL, ModelName, with_options
from tools.text_files import decode


@with_options
def chat(
    source: SourceOptions,
    runtime: RuntimeOptions,
    attention: AttentionOptions,
    generation: GenerationOptions,
    name: ModelName = DEFAULT_MODEL,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told beforehand.")
    ] = None,
) -> None:
    """Talks with a model, a line of input at a time.

    /reset forgets the conversation, /exit or the end of the input ends it.
    """
    sampling = generation.sampling()
    model = load_model(name, source, attention, runtime)
    import zoo

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("a chat needs a tokenizer, which this model does not have")
    opening = [] if system is None else [{"role": "system", "content": system}]
    # Before anybody writes anything: does the model chat at all?
    tokenizer.render_chat([*opening, {"role": "user", "content": "?"}], add_generation_prompt=True)
    history = list(opening)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            history = list(opening)
            continue
        if line.startswith("/") and " " not in line:
            print(f"unknown command {line}; there are /reset and /exit", file=sys.stderr)
            continue
        turn = {"role": "user", "content": line}
        rendered = tokenizer.render_chat([*history, turn], add_generation_prompt=True)
        reply = ""
        try:
            for piece in zoo.stream(
                model,
                tokenizer.encode(rendered, add_bos=False),
                max_new_tokens=generation.max_new_tokens,
                sampling=sampling,
                stop=generation.stop or (),
                max_seq_len=generation.max_seq_len,
                cache_dtype=generation.cache_dtype,
                compile=generation.compile,
            ):
                print(piece, end="", flush=True)
                reply += piece
        except ValueError as error:
            if len(history) == len(opening) or not sys.stdin.isatty():
                raise
            print(f"error: {error}; /reset forgets the conversation so far", file=sys.stderr)
            continue
        print()
        history += [turn, {"role": "assistant", "content": reply}]


def _lines() -> Iterator[str]:
    """What the user writes, without blank lines; a prompt is shown on a terminal only."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # gives input() its history and editing
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            if line:
                yield line
    for raw in sys.stdin.buffer:
        line = decode(raw, "stdin").strip()
        if line:
            yield line


if __name__ == "__main__":
    sys.exit(run_command(chat, "chat"))
