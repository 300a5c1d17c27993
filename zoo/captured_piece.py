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

# A capture takes as long as two pieces or so: it is not worth it for fewer.
_LEAST_LEFT = 4

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
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ends: deque[torch.cuda.Event] = deque(maxlen=2)  # of the last pieces

    def read(self, piece: Tensor, count: Tensor) -> Tensor:
        """Logits [B, V] behind each row's real tokens; the next call may write over them."""
        self._left -= 1
        if self._graph is not None and piece.shape == self._piece.shape:
            self._piece.copy_(piece)
            self._count.copy_(count)
            self._graph.replay()
            return self._logits
        if not piece.is_cuda or self._left < _LEAST_LEFT:
            return self._run(piece, self._cache, count)
        with torch.cuda.device(piece.device):
            # By now the host has launched the last piece. If the GPU has done the one before
            # that, it does not have enough to do.
            if len(self._ends) == 2 and gpu_is_through(self._ends[0]):
                return self._capture(piece, count)
            logits = self._run(piece, self._cache, count)
            self._ends.append(torch.cuda.Event())
            self._ends[-1].record()
        return logits

    def _capture(self, piece: Tensor, count: Tensor) -> Tensor:
        """Captures this piece and reads it.

        Nothing runs while a graph is captured, so that the cache stays as it is. The memory that
        PyTorch kept for the pieces before goes back first: the graph has its own.
        """
        self._piece, self._count = piece.clone(), count.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._run(self._piece, self._cache, self._count)
        self._graph = graph
        graph.replay()
        return self._logits


def gpu_is_through(event: torch.cuda.Event) -> bool:
    """Whether the GPU has come to an event; the host does not wait."""
    return event.query()
