"""PieceReader: reads the pieces of prompts, on a GPU that waits for the host from a CUDA graph.

A small piece of a model with many layers takes the host longer to launch than the GPU to compute.
All pieces of a prompt do the same work on the same tensors, but for tokens and counts, so one of
them is captured and replayed for the others.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from layers import ModelCache
from zoo.gpu_memory import gpu_memory
from zoo.graph_capture import capturing

# A capture takes as long as two pieces or so: it is not worth it for fewer.
_LEAST_LEFT = 4
_WORKSPACES = 2**26  # of cuBLAS on the stream that captures, and the graph itself

Read = Callable[[Tensor, ModelCache, Tensor], Tensor]


class PieceReader:
    """Reads pieces of one prompt onto a cache.

    Args:
        run: from tokens [B, T], cache and counts [B] to logits [B, V].
        cache: of the rows.
        pieces: how many are to be read.
    """

    def __init__(self, run: Read, cache: ModelCache, *, pieces: int) -> None:
        self._run, self._cache, self._left = run, cache, pieces
        self._piece: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ends: deque[torch.cuda.Event] = deque(maxlen=2)  # of the last pieces

    def read(self, piece: Tensor, count: Tensor) -> Tensor:
        """Logits [B, V] behind each row's real tokens; the next call may write over them."""
        self._left -= 1
        # All pieces lie in one place: a graph knows no other, and torch.compile would compile
        # once more for other strides.
        if self._piece is None or self._piece.shape != piece.shape:
            self._piece = piece.clone(memory_format=torch.contiguous_format)
            self._count, self._graph = count.clone(), None
        else:
            self._piece.copy_(piece)
            self._count.copy_(count)
        if self._graph is not None:
            self._graph.replay()
            return self._logits
        if not piece.is_cuda or self._left < _LEAST_LEFT:
            return self._run(self._piece, self._cache, self._count)
        with torch.cuda.device(piece.device):
            # By now the host has launched the last piece. If the GPU has done the one before
            # that, it does not have enough to do.
            if len(self._ends) == 2 and gpu_is_through(self._ends[0]) and _has_room(piece.device):
                return self._capture(self._piece)
            logits = self._run(self._piece, self._cache, self._count)
            self._ends.append(torch.cuda.Event())
            self._ends[-1].record()
        return logits

    def _capture(self, piece: Tensor) -> Tensor:
        """Captures this piece and reads it.

        Nothing runs while a graph is captured, so that the cache stays as it is.
        """
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, piece.device):
            self._logits = self._run(piece, self._cache, self._count)
        self._graph = graph
        graph.replay()
        return self._logits


def gpu_is_through(event: torch.cuda.Event) -> bool:
    """Whether the GPU has come to an event; the host does not wait."""
    return event.query()


def _has_room(device: torch.device) -> bool:
    """Whether the memory of a piece could be there twice: a graph has its own.

    What PyTorch keeps free is at least that of the pieces before. It gives it back to the GPU
    before it captures, but a batch as large as `max_batch` says may still not fit.
    """
    memory = gpu_memory(device)
    return memory.new > memory.kept + _WORKSPACES
