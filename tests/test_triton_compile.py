"""Every kernel compiles for GPUs that are not here, fits their shared memory, and spills little.

In processes of their own: the interpreter, which other tests need, is chosen at import.
"""

import json
import os
import subprocess
import sys
from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may have

# Bytes of stack per thread with Triton 3.7; kernels that are not here have none. On Hopper, tiles
# of `summary_gradients` and `key_gradients` that spill were faster than those that do not.
# `summary_forward` spills that much onto a cache only: in training nothing with head_dim 64, and
# with 128 104, 144 and 128 bytes. The summary kernels in training and `attention_forward` do not
# with Triton 3.6. Nobody has measured the rest.
SPILLS = {
    (80, 64): {"summary_forward": 112, "summary_backward": 112},
    (80, 128): {"summary_forward": 520, "summary_backward": 336},
    (80, 256): {"map_gradients": 8},
    (90, 64): {
        "attention_forward": 8,
        "summary_forward": 24,
        "summary_gradients": 304,
        "summary_backward": 120,
    },
    (90, 128): {
        "summary_forward": 216,
        "summary_gradients": 96,
        "summary_backward": 368,
        "key_gradients": 80,
    },
    (90, 256): {"map_gradients": 8},
    (100, 64): {
        "attention_forward": 8,
        "summary_forward": 24,
        "summary_backward": 112,
        "decode_step": 8,  # onto a float8 cache; onto others none
    },
    (100, 128): {
        "summary_forward": 208,
        "output_dot": 8,
        "summary_gradients": 8,
        "summary_backward": 376,
    },
    (100, 256): {},
}
KERNELS = {
    "add_sink_gradients",
    "attention_forward",
    "decode_step",
    "key_gradients",
    "map_gradients",
    "move_tokens",
    "output_dot",
    "query_gradients",
    "summary_backward",
    "summary_forward",
    "summary_gradients",
}


def compiled(capability: int, dtype: str, D: int, *maps: str) -> list[dict[str, int | str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_ahead", str(capability), dtype, str(D), *maps]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "D"), [(90, 64), *(slow(*key) for key in SPILLS if key != (90, 64))]
)
def test_bfloat16_fits_and_spills_no_more_than_known(capability, D):
    rows = compiled(capability, "bfloat16", D, "linear")
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY[capability], row
        assert row["stack"] <= SPILLS[capability, D].get(row["kernel"], 0), row


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "D"), [(80, 16), (90, 80)])
def test_float32_and_every_map_fit(capability, D):
    for row in compiled(capability, "float32", D):
        assert row["shared"] <= SHARED_MEMORY[capability], row
