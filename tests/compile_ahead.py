"""Compiles every kernel for a GPU that need not be there, and says what it uses, as JSON lines.

    python -m tests.compile_ahead 90 bfloat16 64

runs the real launches on tensors without data, so that what is compiled is what a GPU would run.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from flasheva.triton import cache_ops, call, ops

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MAPS = ("linear", "layernorm", "pooled", "none")


class NoDriver:
    """What a launch asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes per thread; a stack means spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    fields = dict(field.split(":", 1) for field in line.split())
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"])}


def report(kernel: JITFunction, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """In place of a launch."""
    compiled = kernel.warmup(*args, grid=grid, **options)
    row = {
        "kernel": kernel.fn.__name__,
        "map": options.get("MAP", ""),
        "packed": options.get("PACKED", False),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "mma": compiled.asm["ptx"].count("mma.sync"),
        **resources(compiled.asm["cubin"]),
    }
    print(json.dumps(row), flush=True)


def compile_all(
    capability: int,
    dtype: torch.dtype,
    D: int,
    summary_map: str,
    launch: Callable[..., None] = report,
) -> None:
    """Compiles what a forward and a backward pass with `summary_map` launch."""
    driver.set_active(NoDriver(capability))
    window, P, S = ("block" if summary_map == "layernorm" else "sliding"), 16, 16
    call.Call.launch = staticmethod(launch)  # type: ignore[method-assign]
    call.capability_of = lambda device: capability // 10  # type: ignore[assignment]
    q, k, v, do = (
        torch.empty(2, 8192, heads, D, dtype=dtype, device="meta").transpose(1, 2)
        for heads in (4, 2, 2, 4)
    )
    square, vector = (torch.empty(*shape, device="meta") for shape in ((D, D), (D,)))
    maps = {
        "none": [],
        "linear": [square, vector] * 2,
        "layernorm": [square, vector] * 2 + [vector] * 4,
        "pooled": [torch.empty(2, D, device="meta")] * 2,
    }[summary_map]
    bias = torch.empty(4, device="meta")
    packed = summary_map == "pooled"
    seq_start = torch.empty(2, 8192, dtype=torch.int32, device="meta") if packed else None
    static = (256, P, S, window, summary_map)
    out, *saved = ops._attention._init_fn(q, k, v, maps, bias, seq_start, None, *static, True)
    ops._attention_backward._init_fn(do, q, k, v, maps, bias, seq_start, out, *saved, *static)
    if summary_map == "linear":
        start = torch.empty(2, dtype=torch.int64, device="meta")
        cache_ops._full_piece._init_fn(q, k, v, start)  # in every layer that is full
    step = [x[:, :, :1] for x in (q, k, v)]
    row = torch.empty(2, dtype=torch.int64, device="meta")
    sums = torch.empty(2, 2, 1, D, device="meta")
    arrived = torch.empty(4, dtype=torch.int32, device="meta")
    # Triton has no float8_e4m3fn for older GPUs, and storage.py refuses it there.
    for cache_dtype in (dtype, torch.float8_e4m3fn) if capability >= 89 else (dtype,):
        ring, sinks, chunks = (
            torch.empty(2, 2, n, D, dtype=cache_dtype, device="meta") for n in (272, 16, 65)
        )
        summaries = [chunks, chunks, sums] if maps else [None] * 3
        cache = [sinks, sinks, ring, ring, *summaries]
        rule = (maps, summary_map, 256, P, S, window)
        cache_ops._piece._init_fn(q, k, v, row, row, bias, *cache, *rule)
        cache_ops._decode._init_fn(*(*step, row, row, bias, *cache, arrived, *rule))


if __name__ == "__main__":
    capability, dtype, D = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
    for summary_map in sys.argv[4:] or MAPS:
        compile_all(capability, dtype, D, summary_map)
