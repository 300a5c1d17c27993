"""resolve_impl: the one place where an implementation is chosen, from what a graph's trace knows.

`impl="auto"` decides from device, dtype, shape and whether gradients are wanted; an explicit
`impl` that cannot run raises ValueError and says what would. Nothing falls back.
"""

import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from flasheva.config import EvaConfig

Impl = Literal["auto", "triton", "flex", "reference"]
Implementation = Literal["triton", "flex", "reference"]

# Below this many queries attention is bound by reading keys, and tiles of 64 or 128 queries are
# mostly padding. Onto a cache our kernels run all the same: one query has a kernel of its own.
_FEW_QUERIES = 16
_MAX_TRITON_HEAD_DIM = 256
_MIN_TRITON_WINDOW = 16  # the smallest tile of queries
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolve_impl(
    q: Tensor,
    config: EvaConfig,
    impl: Impl,
    *,
    needs_grad: bool = False,
    cached: bool = False,
) -> Implementation:
    """The implementation that runs queries `q` [B, H, T, D] under `impl`.

    Args:
        q: for its device, dtype and shape.
        config: the layer's attention.
        impl: what was asked for.
        needs_grad: whether a backward pass will follow.
        cached: whether the queries come onto a cache.

    Raises:
        ValueError: `impl` is unknown or cannot run `q`; the message says what would work.
    """
    if impl not in get_args(Impl):
        choices = ", ".join(repr(choice) for choice in get_args(Impl))
        raise ValueError(f"impl must be one of {choices}, not {impl!r}")
    if impl == "reference":
        return impl
    refusals = {
        "triton": why_not_triton(q, config, needs_grad=needs_grad, cached=cached),
        "flex": _why_not_flex(q, needs_grad=needs_grad),
    }
    if impl == "auto":
        few = q.shape[2] < _FEW_QUERIES
        if q.device.type != "cuda" or (few and not cached):
            return "reference"
        if refusals["triton"] is None:
            return "triton"
        return "flex" if refusals["flex"] is None and not few else "reference"
    if refusals[impl] is not None:
        raise ValueError(f"impl={impl!r} {refusals[impl]}")
    return impl


def why_not_triton(q: Tensor, config: EvaConfig, *, needs_grad: bool, cached: bool) -> str | None:
    """Why our kernels cannot run `q`, behind their name in a sentence; None if they can."""
    D = q.shape[3]
    why = _why_no_triton(q.device.type, q.device.index)
    if why is not None:
        return why
    if q.dtype not in _TRITON_DTYPES or (q.dtype == torch.bfloat16 and q.device.type == "cpu"):
        kinds = "float32 and float16" if q.device.type == "cpu" else "float32, bfloat16, float16"
        return f"needs {kinds}, not {q.dtype}; use impl='reference'"
    if D > _MAX_TRITON_HEAD_DIM:
        return f"needs head_dim <= {_MAX_TRITON_HEAD_DIM}, not {D}; use impl='flex' or 'reference'"
    if config.window_size < _MIN_TRITON_WINDOW:
        return (
            f"needs window_size >= {_MIN_TRITON_WINDOW}, not {config.window_size}; "
            "use impl='flex' or 'reference'"
        )
    if needs_grad and cached:
        return "has no backward onto a cache; use torch.no_grad(), or impl='reference'"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_no_triton(device: str, index: int | None) -> str | None:
    """Whether kernels can run on a device at all, asked once per trace."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton; pip install triton, or use impl='flex' or 'reference'"
    if device == "cuda":
        if torch.version.hip is not None:
            return "was written for NVIDIA GPUs; use impl='flex' or 'reference'"
        capability = torch.cuda.get_device_capability(index)
        if capability < (8, 0):
            return (
                f"needs compute capability 8.0 or later, not {capability[0]}.{capability[1]}; "
                "use impl='flex' or 'reference'"
            )
        return None
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"runs on cuda, not {device}; use impl='flex' or 'reference'"


def _why_not_flex(q: Tensor, *, needs_grad: bool) -> str | None:
    """The end of a sentence that begins with the name, or None if FlexAttention can run."""
    device, D = q.device.type, q.shape[3]
    if device not in ("cpu", "cuda"):
        return f"runs on cpu and cuda, not {device}; use impl='reference'"
    if device == "cpu" and needs_grad:
        return "has no backward on a CPU; use impl='reference', or torch.no_grad()"
    if device == "cpu" and D < 32:
        # torch 2.13: wrong numbers, or NaN, for head_dim 16 where N + C is 8 mod 16.
        return f"on a CPU needs head_dim >= 32, not {D}; use impl='reference'"
    if device == "cuda" and (q.dtype == torch.float64 or D < 16):
        return (
            f"on cuda needs float32, bfloat16 or float16 and head_dim >= 16, not {q.dtype} and "
            f"{D}; use impl='reference'"
        )
    return None
