"""run: what happens round every command, for `zoo X` and `python -m tools.X` alike.

A mistake of the user is one line on stderr and exit status 2, Ctrl-C is 130, and a closed pipe
(`zoo list | head`) ends the command without a word. stdout carries results only; what the
library logs goes to stderr.
"""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from io import TextIOWrapper
from typing import cast

import typer

_USER_MISTAKE, _INTERRUPTED, _CLOSED_PIPE = 2, 130, 141  # as shells report SIGINT and SIGPIPE

# Typer builds on click or on its own copy of it, by version; this is its UsageError.
_USAGE_ERROR = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])

_command_line: ContextVar[str] = ContextVar("command_line")


def command_line() -> str:
    """The running command as somebody else would type it, for the record of a measurement."""
    return _command_line.get()


def run_command(function: Callable[..., None], name: str) -> int:
    """`python -m tools.<name>`: one command with the arguments of the process; its exit status."""
    app = typer.Typer(add_completion=False)
    app.command(name)(function)
    module = name.replace("-", "_")
    return run(app, sys.argv[1:], program=f"python -m tools.{module}", words=("zoo", name))


def run(
    app: typer.Typer, arguments: Sequence[str], *, program: str, words: Sequence[str] = ("zoo",)
) -> int:
    """Runs a command line.

    Args:
        app: one command or a group of them.
        arguments: what follows the program's name.
        program: that name, in help texts.
        words: what `arguments` follow where the command line is recorded.

    Returns:
        The exit status.
    """
    token = _command_line.set(shlex.join([*words, *arguments]))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack what a model writes
    try:
        with _logging_to_stderr():
            command = typer.main.get_command(app)
            with command.make_context(program, list(arguments)) as context:
                command.invoke(context)
            sys.stdout.flush()  # here, where a closed pipe is still ours to handle
    except typer.Exit as exit_:
        return exit_.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # What is still in the buffer would fail again, loudly, when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except (ValueError, OSError, _USAGE_ERROR) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return _USER_MISTAKE
    finally:
        _command_line.reset(token)
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, _USAGE_ERROR):
        text = error.format_message()
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Shows what `zoo` logs: where weights came from, and warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("zoo")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Formatter(logging.Formatter):
    """One line: the message, and its level where somebody should look."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        quiet = record.levelno <= logging.INFO
        return message if quiet else f"{record.levelname.lower()}: {message}"
