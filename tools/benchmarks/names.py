"""What the benchmarks may be asked for, by name. Imports no torch, so that help stays quick."""

from typing import Literal

KernelName = Literal[
    "triton",
    "flex",
    "flex_prebuilt",
    "reference",
    "sdpa_cudnn",
    "sdpa_flash",
    "fla_chunk_gla",
    "fla_gated_delta_rule",
]
PassName = Literal["forward", "forward_backward"]
DtypeName = Literal["bfloat16", "float16", "float32"]
WindowName = Literal["sliding", "block"]
