"""What people read: tables on stdout, progress on stderr; and JSON lines for programs."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_NUMBER = re.compile(r"[\d,.]+( [A-Za-z]+)?")
_WIDE = 10_000  # columns of a file or pipe, where nothing is to be wrapped or cut


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; columns of numbers, with or without a unit, are aligned right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        numbers = all(_NUMBER.fullmatch(row[index]) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else _WIDE
    Console(width=width, markup=False, highlight=False).print(table)


def print_rule(title: str) -> None:
    """A line across the terminal."""
    Console(markup=False, highlight=False).rule(title)


def print_json(value: Mapping[str, object]) -> None:
    """One line of JSON."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not utf8), flush=True)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr if that is a terminal; call the result with the steps done.

    A `total` of None: nobody knows.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(steps: int) -> None:
            bar.advance(task, steps)

        yield advance
