"""capturing: captures a CUDA graph on any GPU, and leaves no trace of a capture that fails."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a GPU: cuBLAS keeps a workspace for every stream it has seen.

    The one that `torch.cuda.graph` makes for itself belongs to the GPU of the first capture: on
    any other, kernels would run at once and the graph be empty.
    """
    return torch.cuda.Stream(device)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Captures what the body does on this GPU, whose replays do it; the body itself does not."""
    current = torch.cuda.current_stream(device)
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=capture_stream(device)):
            yield
    except BaseException:
        _abandon(current, pool)
        raise


def _abandon(current: torch.cuda.Stream, pool: tuple[int, int]) -> None:
    """Undoes what a capture leaves behind that fails to end (torch 2.11).

    The current stream is still that of the capture, and the allocator believes that the capture
    goes on, so that the next `empty_cache` is an internal error (pytorch/pytorch#180395, mended
    in a later version). What the capture had allocated stays lost.
    """
    torch.cuda.set_stream(current)
    with suppress(RuntimeError):  # it did end
        torch._C._cuda_endAllocateToPool(current.device_index, pool)
    capture_stream.cache_clear()
