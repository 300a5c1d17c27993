"""collect_prompts: the prompts of a command line, from wherever the user put them."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tools.text_files import decode, json_field


def collect_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts `given` on the command line and those of `file`; if none, stdin as one.

    Args:
        given: arguments and options, in order.
        file: one prompt a line, or JSON lines with a "prompt" each if it ends in .jsonl.

    Raises:
        OSError: the file cannot be read.
        ValueError: no prompt, an empty one, or one that is not UTF-8.
    """
    prompts = [*given, *(() if file is None else _read_file(file))]
    if not prompts and file is None:
        if sys.stdin.isatty():
            raise ValueError("there is no prompt; give one as an argument, in a file or on stdin")
        prompts = [decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n")]
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise ValueError(f"{which} is empty; give at least one character")
    if not prompts:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return prompts


def _read_file(path: Path) -> list[str]:
    lines = decode(path.read_bytes(), str(path)).split("\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line's end
    prompts = []
    for number, line in enumerate(lines, start=1):
        source = f"{path}, line {number}"
        text = line.removesuffix("\r")
        prompt = json_field(text, "prompt", source) if path.suffix == ".jsonl" else text
        if not prompt:
            raise ValueError(f"{source}: the prompt is empty")
        prompts.append(prompt)
    return prompts
