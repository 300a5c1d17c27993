"""captured: a call as a CUDA graph, so that its replays cost the host next to nothing.

What PyTorch asks of a capture (its notes on CUDA semantics, section CUDA graphs): warm-up runs on
a side stream first, no synchronisation during it, and the same addresses in every replay.
"""

import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

_WARM_UPS = 3
_TOLERANCE = 0.02  # between a replay and an eager call; atomics add in any order


class NotCaptured(Exception):
    """A call that no graph holds, or whose replay gives other numbers; the message says why."""


@contextmanager
def captured(
    run: Callable[[], Mapping[str, Tensor]], device: torch.device
) -> Iterator[Callable[[], None]]:
    """A function that replays what `run` does on a GPU; the graph and its memory go at the end.

    Args:
        run: gives its results by name, each in memory of its own; the warm-up runs compile and
            tune what was not yet.
        device: where it computes.

    Raises:
        NotCaptured: the GPU can go on with eager calls.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        _capture_and_check(graph, run, device)
        yield graph.replay
    finally:
        torch.cuda.synchronize(device)
        graph.reset()
        torch.cuda.empty_cache()


def _capture_and_check(
    graph: torch.cuda.CUDAGraph, run: Callable[[], Mapping[str, Tensor]], device: torch.device
) -> None:
    try:
        expected = run()
        found = _capture(graph, run, device)
        # What a replay does not write must not pass for an answer.
        for tensor in found.values():
            tensor.fill_(float("nan"))
        graph.replay()
        wrong = [name for name in found if not _near(found[name], expected[name])]
    except NotCaptured:
        raise
    except Exception as error:
        raise NotCaptured(_reason(error)) from error
    if wrong:
        raise NotCaptured(f"a replay gives another {', '.join(wrong)} than an eager call")


def _near(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.double(), expected.double()
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm())


def _capture(
    graph: torch.cuda.CUDAGraph, run: Callable[[], Mapping[str, Tensor]], device: torch.device
) -> Mapping[str, Tensor]:
    """The results of the capture, which only a replay computes."""
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    current.wait_stream(side)
    # A cycle could hold nodes of autograd that belong to another stream, or free memory meanwhile.
    gc.collect()
    pool = torch.cuda.graph_pool_handle()
    reason = None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side):
            try:
                found = run()
            except Exception as error:
                reason = _reason(error)
                raise
    except Exception as error:
        _abandon(current, pool)
        # The end of a capture that has failed fails too, and says no more than that.
        raise NotCaptured(reason or _reason(error)) from error
    return found


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all warm-ups and captures: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)


def _abandon(current: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """Undoes what a capture leaves behind that fails to end (torch 2.11).

    The current stream is still that of the capture, and the allocator believes that the capture
    goes on, so that the next `empty_cache` is an internal error (pytorch/pytorch#180395, mended
    in a later version). What the capture had allocated stays lost.
    """
    torch.cuda.set_stream(current)
    with suppress(RuntimeError):  # it did end
        torch._C._cuda_endAllocateToPool(current.device_index, pool)
    _side_stream.cache_clear()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
