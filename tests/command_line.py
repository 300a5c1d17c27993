"""`zoo ...` as a test runs it, in this process or in its own, and models to run it on."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import zoo
from tests.tiny import make_model, make_tokenizer
from tools.cli import main

ROOT = Path(__file__).parents[1]
CONTEXT = 256  # of the models of tests/tiny.py
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Run(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: object, stdin: bytes = b"") -> Run:
    """`zoo ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    given = io.TextIOWrapper(io.BytesIO(stdin))
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", given),
    ):
        code = main([str(argument) for argument in arguments])
    return Run(code, out.getvalue(), err.getvalue())


def python(*arguments: str) -> Run:
    """`python ARGUMENTS`, a process of its own."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return Run(done.returncode, done.stdout.decode(), done.stderr.decode())


def assert_mistake(done: Run, what: str) -> None:
    """It ended with status 2 and one line that says `what`."""
    *before, last = done.err.splitlines()
    assert (done.code, done.out) == (2, "")
    assert last.startswith("error: ")
    assert what in last
    # Before it there is at most what loading the weights says.
    assert all("weights from" in line or line.startswith("warning: ") for line in before)


def save(folder: Path, config: dict[str, object], *, seed: int = 0) -> Path:
    """A model with random weights, a tokenizer and a chat template."""
    model = make_model(config, seed=seed)
    model.tokenizer = make_tokenizer()
    model.tokenizer.chat_template = TEMPLATE
    zoo.save(model, folder)
    return folder
