"""measure_replay, measure_time: the median of repeated runs, with device events on a GPU.

On a GPU the L2 cache is overwritten before every run, so that inputs come from memory as they do
in a model. A run's time goes from its first kernel to its last one. Where the host issues kernels
more slowly than the GPU executes them, that of an eager call contains waiting, and `host` says so;
that of a replayed CUDA graph does not.
"""

import gc
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tools.benchmarks.cuda_graph import NotCaptured, captured

_TOTAL = 300.0  # ms of timed runs that are aimed at
_FEWEST, _MOST = 10, 100
_WARM_UP = 50.0  # ms, in which a GPU's clocks rise
_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache


class Timing(NamedTuple):
    """Of one call, in milliseconds.

    Attributes:
        median: of the repetitions.
        spread: half their interquartile range.
        repetitions: how many.
        host: until an eager call returns to an idle host, None on a CPU; where the median of eager
            calls is near it, the host is what was measured.
        cuda_graph: whether a CUDA graph was replayed.
        not_captured: why not, where that was wanted.
    """

    median: float
    spread: float
    repetitions: int
    host: float | None
    cuda_graph: bool = False
    not_captured: str | None = None


def measure_replay(
    run: Callable[[], Mapping[str, Tensor]], device: torch.device, repetitions: int | None = None
) -> Timing:
    """Times a CUDA graph of `run`, or eager calls if there can be none; `not_captured` says so.

    Args:
        run: what to time; gives its results by name, each in memory of its own.
        device: a GPU.
        repetitions: as `measure_time`.
    """
    host = _host_time(run, device)
    try:
        with captured(run, device) as replay:
            timing = _measure(replay, device, repetitions)
        return timing._replace(host=host, cuda_graph=True)
    except NotCaptured as error:
        reason = str(error)
    # Here, where nothing holds the memory of the failure any more.
    free_memory(device)
    return measure_time(run, device, repetitions)._replace(not_captured=reason)


def measure_time(
    run: Callable[[], object], device: torch.device, repetitions: int | None = None
) -> Timing:
    """Times calls of `run`, which is warmed up first.

    Args:
        run: what to time.
        device: where it computes.
        repetitions: None: between 10 and 100, for about 0.3 s in all.
    """
    timing = _measure(run, device, repetitions)
    if device.type != "cuda":
        return timing
    return timing._replace(host=_host_time(run, device))


def _measure(run: Callable[[], object], device: torch.device, repetitions: int | None) -> Timing:
    measure = _cuda_times if device.type == "cuda" else _cpu_times
    measure(run, 1)
    estimate = sum(measure(run, 3)) / 3
    warm = _WARM_UP / estimate if device.type == "cuda" else 0
    for _ in range(min(int(warm), _MOST)):
        run()
    count = repetitions or min(max(int(_TOTAL / estimate), _FEWEST), _MOST)
    times = torch.tensor(measure(run, count), dtype=torch.float64)
    low, median, high = times.quantile(times.new_tensor([0.25, 0.5, 0.75])).tolist()
    return Timing(median, (high - low) / 2, count, None)


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a run allocates at its peak, results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free_memory(device: torch.device) -> None:
    """Gives what no tensor holds back to the GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _cuda_times(run: Callable[[], object], count: int) -> list[float]:
    flush = _cache_filler()
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    torch.cuda.synchronize()
    for start, end in pairs:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _cache_filler() -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _cpu_times(run: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _host_time(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        times += _cpu_times(run, 1)
    torch.cuda.synchronize(device)
    return sorted(times)[len(times) // 2]
