"""captured: a call as a CUDA graph, so that its replays cost the host next to nothing.

What PyTorch asks of a capture (its notes on CUDA semantics, section CUDA graphs): warm-up runs on
a side stream first, no synchronisation during it, and the same addresses in every replay.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from zoo.graph_capture import capture_stream, capturing

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
    current, side = torch.cuda.current_stream(device), capture_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    current.wait_stream(side)
    # A cycle could hold nodes of autograd that belong to another stream, or free memory meanwhile.
    gc.collect()
    reason = None
    try:
        with capturing(graph, device):
            try:
                found = run()
            except Exception as error:
                reason = _reason(error)
                raise
    except Exception as error:
        # The end of a capture that has failed fails too, and says no more than that.
        raise NotCaptured(reason or _reason(error)) from error
    return found


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
