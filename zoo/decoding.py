"""Decoder: the steps of a batch, one token a row each, that wait for nobody.

All state lies in tensors that a step changes in place: the token and the room of each row, whether
it goes on, and what was chosen in the last steps. So a step is the same work every time: on a GPU
it is captured once as a CUDA graph, sampling included, and replayed. Tokens are copied to the host
while the next steps run.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from layers import ModelCache
from zoo.causal_lm import CausalLM
from zoo.compile_apart import compile_apart
from zoo.graph_capture import capturing
from zoo.prefill import compiled_step, next_logits
from zoo.sampling import Sampling, choose, noise


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


class _State(NamedTuple):
    """What a step changes in place, besides the cache.

    int64 [B] each, but for

    - seen: bool [B, V], tokens of prompt and text, kept for a repetition penalty only.
    - history: [steps of a round, B], what was chosen.
    - slot: [1], where in the history the next tokens go.
    - eos: [tokens that end a row].
    """

    tokens: Tensor
    going: Tensor
    room: Tensor
    seen: Tensor
    history: Tensor
    slot: Tensor
    eos: Tensor


def _choose(logits: Tensor, random: Tensor | None, state: _State, sampling: Sampling) -> None:
    """Chooses the next tokens. A row that has ended changes nothing but the history."""
    tokens, going, room, seen, history, slot, eos = state
    chosen = torch.where(going > 0, choose(logits, seen, sampling, random), tokens)
    index = chosen[:, None]
    if sampling.repetition_penalty != 1.0:
        seen.scatter_(1, index, seen.gather(1, index) | (going > 0)[:, None])
    tokens.copy_(chosen)
    history.index_copy_(0, slot, chosen[None])
    slot.copy_((slot + 1) % len(history))
    room.sub_(going)
    going.mul_(~((index == eos).any(1) | (room <= 0)))


_Choose = Callable[[Tensor, Tensor | None, _State, Sampling], None]


def _compiled_choose(state: _State, sampling: Sampling) -> _Choose:
    # One handle for each kind of sampling and for sizes of 1, which get graphs of their own.
    single = tuple(min(x, 2) for x in (*state.history.shape, len(state.eos)))
    return _choose_handle(sampling, single, state.tokens.device)


@functools.cache
def _choose_handle(sampling: Sampling, single: tuple[int, ...], device: torch.device) -> _Choose:
    return compile_apart(_choose)


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream to warm up on: cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Decoder:
    """Decodes a batch whose prompts the cache holds.

    Args:
        model: of the cache.
        cache: after the prefill.
        compile: run steps through torch.compile.
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
        compile: bool = False,
        sampling: Sampling,
        seen: Tensor,
        room: Sequence[int],
        eos_ids: Sequence[int] = (),
        steps_at_once: int = 1,
    ) -> None:
        device = cache.length.device
        self._model, self._cache = model, cache
        self._sampling = dataclasses.replace(sampling, seed=None)  # compiled for all seeds
        self._generator = sampling.generator(device)
        self._on_gpu = device.type == "cuda"
        self._at_once = steps_at_once if self._on_gpu else 1
        tokens = torch.zeros_like(cache.length)
        self._state = _State(
            tokens=tokens,
            going=torch.ones_like(tokens),
            room=torch.tensor(room, device=device),
            seen=seen,
            history=tokens.repeat(self._at_once, 1),
            slot=torch.zeros(1, dtype=torch.int64, device=device),
            eos=torch.tensor(list(eos_ids), dtype=torch.int64, device=device),
        )
        self._run = compiled_step(model, cache) if compile else next_logits
        self._choose = _compiled_choose(self._state, self._sampling) if compile else _choose
        self._made = 0  # steps, of which `slot` is where the next one goes
        self._pending: deque[_Chosen] = deque()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._started = False

    def start(self, logits: Tensor) -> None:
        """Chooses the first token of each row from the logits [B, V] behind its prompt."""
        with self._device():
            self._take(logits)
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
        self._state.going[row].zero_()  # a number from the host would be waited for

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
        return torch.cuda.device(self._state.tokens.device) if self._on_gpu else nullcontext()

    def _enqueue(self) -> None:
        for _ in range(self._at_once):
            self.step()
        self._send(self._at_once)

    def _send(self, steps: int) -> None:
        """Copies what the last steps chose to the host."""
        history = self._state.history
        slots = [i % len(history) for i in range(self._made - steps, self._made)]
        chosen = torch.stack([history[slot] for slot in slots])
        if not self._on_gpu:
            self._pending.append(_Chosen(chosen, None))
            return
        there = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        there.copy_(chosen, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append(_Chosen(there, arrived))

    def _step(self) -> None:
        tokens, going = self._state.tokens[:, None], self._state.going
        self._take(self._run(self._model, tokens, self._cache, going))

    def _take(self, logits: Tensor) -> None:
        random = noise(logits, self._sampling, self._generator)
        self._choose(logits, random, self._state, self._sampling)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A step as a graph. While it is tried and captured, every row stands still."""
        state = self._state
        going, slot = state.going.clone(), state.slot.clone()
        state.going.zero_()
        aside = _aside(state.tokens.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled or allocated once, is now
            self._step()
            self._step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with capturing(graph, state.tokens.device):
            self._step()
        state.going.copy_(going)
        state.slot.copy_(slot)
        return graph
