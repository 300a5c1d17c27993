"""The least work that attention is, and the least time that this device could take for it.

    least time = max(bytes / copy bandwidth, FLOPs / matrix rate [+ exponentials / their rate])

Least work: no tensor is read or written twice, and every pair of a query and a key or summary that
the rule shows costs 4 D FLOPs forward (two products), 10 D backward (five), and one exponential
each way. Computing the summaries counts nothing.

Dims: as inputs.py.
"""

import subprocess
from typing import NamedTuple

import torch

from flasheva import EvaConfig
from flasheva.visibility import window_start
from tools.benchmarks.inputs import Shape
from tools.benchmarks.names import PassName
from tools.benchmarks.timing import free_memory, measure_time

# Results per clock and multiprocessor of the special function unit, compute capability 7.0 to 10.0
# (CUDA C++ programming guide, throughput of native arithmetic instructions).
_EXPONENTIALS_PER_CLOCK = 16


class Work(NamedTuple):
    """The least that a pass must do."""

    bytes: int
    flops: int
    exponentials: int


class Ceilings(NamedTuple):
    """What the device reaches: bytes, FLOPs and exponentials per second.

    The first two are measured. The third follows from the hardware: multiprocessors, 16 results a
    clock each, and the highest clock; None where that is not known.
    """

    copy: float
    matrix: float
    exponentials: float | None


class Roofline(NamedTuple):
    """Least time over measured time; the second, with exponentials, needs their rate."""

    fraction: float
    with_exponentials: float | None


def causal_config(T: int) -> EvaConfig:
    """The rule under which a row of T tokens is full causal attention."""
    return EvaConfig(window="block", window_size=T, chunk_size=T, sink_size=0)


def visible_pairs(config: EvaConfig, T: int) -> int:
    """How many keys and summaries all queries of a row of T tokens see, in O(T)."""
    query = torch.arange(T)
    start = window_start(config, query)
    sinks = start.clamp(max=config.sink_size)  # those before the window
    P = config.chunk_size
    summaries = (start // P - config.sink_size // P).clamp(min=0)
    return int((query - start + 1 + sinks + summaries).sum())


def least_work(shape: Shape, config: EvaConfig, dtype: torch.dtype, pass_: PassName) -> Work:
    """What a pass over a shape must do.

    Bytes: forward q, k, v are read and o is written; with the backward pass q, k, v, o, do are
    read and o, dq, dk, dv written, each once.
    """
    B, H, G, T, D = shape
    pairs = B * H * visible_pairs(config, T)
    rows = B * T * D * dtype.itemsize  # of one head
    if pass_ == "forward":
        return Work((2 * H + 2 * G) * rows, 4 * D * pairs, pairs)
    return Work((5 * H + 4 * G) * rows, 14 * D * pairs, 2 * pairs)


def roofline(work: Work, ms: float, ceilings: Ceilings) -> Roofline:
    """How near to the ceilings `ms` milliseconds for `work` are."""
    memory = work.bytes / ceilings.copy
    arithmetic = work.flops / ceilings.matrix
    seconds = ms / 1e3
    if ceilings.exponentials is None:
        return Roofline(max(memory, arithmetic) / seconds, None)
    both = arithmetic + work.exponentials / ceilings.exponentials
    return Roofline(max(memory, arithmetic) / seconds, max(memory, both) / seconds)


def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Copies 1 GiB within the device and multiplies random matrices of 8192 x 8192 in `dtype`.

    By eager calls: the host issues them in far less time than the GPU takes. On a CPU both are
    small and few: there the numbers only show that everything runs.
    """
    gpu = device.type == "cuda"
    copy = _copy_bandwidth(2**30 if gpu else 2**20, device)
    free_memory(device)
    matrix = _matrix_rate(8192 if gpu else 256, dtype, device)
    free_memory(device)
    return Ceilings(copy, matrix, _exponential_rate(device))


def _copy_bandwidth(size: int, device: torch.device) -> float:
    """Bytes read and written per second."""
    source = torch.randint(100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ms = measure_time(lambda: target.copy_(source), device, _repetitions(device)).median
    return 2 * size / ms * 1e3


def _matrix_rate(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of an n x n product; of random numbers, because zeros multiply faster."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    ms = measure_time(lambda: torch.mm(a, b, out=product), device, _repetitions(device)).median
    return 2 * n**3 / ms * 1e3


def _repetitions(device: torch.device) -> int | None:
    return None if device.type == "cuda" else 5


def _exponential_rate(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock = _highest_clock(str(properties.uuid))
    if clock is None:
        return None
    return properties.multi_processor_count * _EXPONENTIALS_PER_CLOCK * clock


def _highest_clock(uuid: str) -> float | None:
    """Of the multiprocessors, in Hz; from nvidia-smi, which every driver brings."""
    command = [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        "--query-gpu=clocks.max.sm",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return float(done.stdout) * 1e6
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
