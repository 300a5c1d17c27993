"""Decoder: the steps of a batch, one token a row each, that wait for nobody.

All state lies in tensors that a step changes in place: the token and the room of each row, whether
it goes on, and what was chosen in the last steps. So a step is the same work every time: on a GPU
it is captured once as a CUDA graph, sampling included, and replayed. Tokens are copied to the host
while the next steps run.
"""

import functools
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from layers import ModelCache
from zoo.causal_lm import CausalLM
from zoo.prefill import NextLogits, next_logits
from zoo.sampling import Sampling, next_tokens


@dataclass(frozen=True)
class _Chosen:
    """Tokens [steps, B] on their way to the host."""

    tokens: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> list[list[int]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        chosen: list[list[int]] = self.tokens.tolist()
        return chosen


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream to warm up on: cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Decoder:
    """Decodes a batch whose prompts the cache holds.

    Args:
        model: of the cache.
        cache: after the prefill.
        run: `next_logits`, or that compiled.
        sampling: how tokens are chosen.
        seen: bool [B, V], tokens of the prompts; changed in place.
        room: tokens that each row may take.
        eos_ids: tokens that end a row.
        steps_at_once: steps between two looks of the host at what was chosen; on a CPU always 1.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: ModelCache,
        *,
        run: NextLogits = next_logits,
        sampling: Sampling,
        seen: Tensor,
        room: Sequence[int],
        eos_ids: Sequence[int] = (),
        steps_at_once: int = 1,
    ) -> None:
        device = cache.length.device
        self._model, self._cache, self._run = model, cache, run
        self._sampling, self._seen = sampling, seen
        self._generator = sampling.generator(device)
        self._on_gpu = device.type == "cuda"
        self._at_once = steps_at_once if self._on_gpu else 1
        self._tokens = torch.zeros_like(cache.length)
        self._going = torch.ones_like(cache.length)
        self._room = torch.tensor(room, device=device)
        self._eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
        self._history = self._tokens.repeat(self._at_once, 1)  # of one round
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._made = 0  # steps, of which `_slot` is where the next one goes
        self._pending: deque[_Chosen] = deque()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._started = False

    def start(self, logits: Tensor) -> None:
        """Chooses the first token of each row from the logits [B, V] behind its prompt."""
        with self._device():
            self._choose(logits)
            self._made = 1
            self._send(1)

    def take(self) -> list[list[int]]:
        """The tokens of the next step, or few steps, [steps][B].

        Those of a row that has ended (an end token, no room left, `stop`) mean nothing.
        """
        # The first tokens do not wait for the graph; later ones arrive while others are made.
        ahead = 2 if self._on_gpu and self._started else 1
        self._started = True
        with self._device():
            while len(self._pending) < ahead:
                self._enqueue()
        return self._pending.popleft().wait()

    def stop(self, row: int) -> None:
        """Ends a row whose text has ended for a reason that only the host knows."""
        self._going[row] = 0

    def step(self) -> None:
        """One step, without looking at what it chose."""
        self._made += 1
        if not self._on_gpu:
            self._step()
            return
        with self._device():
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()

    def _device(self) -> AbstractContextManager[object]:
        """Streams, events and graphs are those of the current GPU, which may be another one."""
        return torch.cuda.device(self._tokens.device) if self._on_gpu else nullcontext()

    def _enqueue(self) -> None:
        for _ in range(self._at_once):
            self.step()
        self._send(self._at_once)

    def _send(self, steps: int) -> None:
        """Copies what the last steps chose to the host."""
        slots = [i % len(self._history) for i in range(self._made - steps, self._made)]
        chosen = torch.stack([self._history[slot] for slot in slots])
        if not self._on_gpu:
            self._pending.append(_Chosen(chosen, None))
            return
        there = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        there.copy_(chosen, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append(_Chosen(there, arrived))

    def _step(self) -> None:
        tokens = self._tokens[:, None]
        self._choose(self._run(self._model, tokens, self._cache, self._going))

    def _choose(self, logits: Tensor) -> None:
        """A row that has ended changes nothing but the history."""
        going = self._going > 0
        chosen = next_tokens(logits, self._seen, self._sampling, self._generator)
        chosen = torch.where(going, chosen, self._tokens)
        index = chosen[:, None]
        self._seen.scatter_(1, index, self._seen.gather(1, index) | going[:, None])
        self._tokens.copy_(chosen)
        self._history.index_copy_(0, self._slot, chosen[None])
        self._slot.add_(1).remainder_(len(self._history))
        self._room -= self._going
        ended = (index == self._eos).any(1) | (self._room <= 0)
        self._going.mul_(~ended)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A step as a graph. While it is tried and captured, every row stands still."""
        going, slot = self._going.clone(), self._slot.clone()
        self._going.zero_()
        aside = _aside(self._tokens.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled or allocated once, is now
            self._step()
            self._step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            self._step()
        self._going.copy_(going)
        self._slot.copy_(slot)
        return graph
