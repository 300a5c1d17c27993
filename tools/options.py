"""with_options: options that commands share are written once, as a dataclass.

    @with_options
    def info(name: ModelName, attention: AttentionOptions) -> None: ...

Typer sees the fields of `AttentionOptions` in the place of `attention`; the command gets the
object. Options of a single type that several commands have are defined here as well.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "smollm2-135m-instruct-eva-hybrid"
# Comes with this package, so that text needs no download. It has no chat template, and its context
# is too short for what the other commands measure by default.
EMBEDDED_MODEL = "tiny-eva-hybrid"

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A registered name (see `zoo list`), a recipe (.toml), a folder, a .gguf file, or "
        "org/name on the Hugging Face hub.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl", help="Append the measurement to this file, with versions and device."
    ),
]
Device = Annotated[str, typer.Option(help="Such as cuda, cuda:1 or cpu.")]
WindowSize = Annotated[int, typer.Option(help="Tokens that a query sees exactly.")]
ChunkSize = Annotated[int, typer.Option(help="Tokens that share one summary.")]
BatchSize = Annotated[int, typer.Option(help="Rows that are computed at once.")]


def option(panel: str, text: str, *names: str, default: str | None = None) -> object:
    """An option in the box `panel` of the help; `default` is what to say of a default of None."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=default or True)


def parse_shares(given: list[str] | None, option: str) -> dict[str, float]:
    """The numbers of SOURCE=NUMBER by source, of an option that may be repeated.

    Raises:
        ValueError: no such text, or a source twice.
    """
    shares: dict[str, float] = {}
    for text in given or []:
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(
                f"{option} must be SOURCE=NUMBER, such as books=0.5, not {text!r}"
            ) from None
        if name in shares:
            raise ValueError(f"{option} names the source {name!r} twice")
        shares[name] = number
    return shares


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Puts the fields of a command's dataclass parameters among its own, where Typer reads them.

    Typer itself has no groups of options.
    """
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        group = parameter.annotation
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            groups[parameter.name] = group
            parameters.extend(inspect.signature(group).parameters.values())
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: object) -> None:
        for name, group in groups.items():
            fields = inspect.signature(group).parameters
            values[name] = group(**{field: values.pop(field) for field in fields})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
