"""train, compare: does a small model learn with one path of EVA attention as with the reference?

A byte-level Llama whose layers are all EVA attention is trained from scratch, once for each
implementation and seed. A seed decides the initial weights and the batches, so that runs of one
seed differ in nothing but the implementation. No tolerance is chosen: the reference itself, with
two seeds, says how far apart two curves may be.

Weights and optimizer are float32, and the model runs under autocast.

`training_noise` is off, which is also the default: what is left to differ is rounding.

Dims: B rows of a batch, T = length bytes, H heads, G key/value heads, D head dim, P chunk size.
"""

import functools
import itertools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from flasheva import EvaConfig, resolve_impl
from flasheva.choice import Implementation
from zoo.llama import Llama, LlamaConfig
from zoo.weights.filling import fill_random

BASE: Implementation = "reference"  # the path that the others are compared with
SPAN = 50  # steps of which a point of a curve is the mean
_BYTES = 256
_WARM_UP = 100  # steps
_PEAK, _FLOOR = 1e-3, 0.1  # the highest learning rate, and the last one as a part of it
_WEIGHT_DECAY = 0.1
_MAX_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained.

    Attributes:
        impls: among them `BASE`.
        seeds: at least two different ones.
        steps: of the optimizer.
        batch_size, length: B and T; length + 1 bytes are read.
        window_size: W, of the sliding window.
        dtype: bfloat16, or float32 for no autocast.
        device: where it trains.

    Raises:
        ValueError: numbers that do not fit, or an implementation that cannot run them.
    """

    impls: tuple[Implementation, ...]
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    length: int
    window_size: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if BASE not in self.impls:
            raise ValueError(f"impl {BASE!r} must be among those trained, to compare with")
        if len(set(self.seeds)) < 2:
            raise ValueError("at least two different seeds are needed, to compare with")
        config = self.config
        # The first chunk holds the sinks; the second one is summarised when it leaves the window.
        shortest = self.window_size + 2 * config.eva.chunk_size
        if self.length < shortest:
            raise ValueError(
                f"length must be at least {shortest}, or no byte sees a summary, not {self.length}"
            )
        shape = (self.batch_size, config.num_attention_heads, self.length, config.head_dim)
        q = torch.empty(1, dtype=self.dtype, device=self.device).expand(shape)
        for impl in self.impls:
            resolve_impl(q, config.eva, impl, needs_grad=True)

    @property
    def config(self) -> LlamaConfig:
        """The model: 4 layers, H = G = 4, D 64, P 16, one chunk of sinks."""
        return LlamaConfig(
            vocab_size=_BYTES,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=self.length,
            layer_types=("eva_attention",) * 4,
            eva=EvaConfig(window="sliding", window_size=self.window_size, chunk_size=16),
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of one training.

    Attributes:
        impl, seed: which.
        losses: nats per byte, of every step up to the failure.
        failure: what was not finite, and when; None if nothing was.
        seconds: all steps together; the first ones may contain compilation.
    """

    impl: Implementation
    seed: int
    losses: tuple[float, ...]
    failure: str | None
    seconds: float

    @property
    def curve(self) -> list[float]:
        """The mean loss of every `SPAN` steps; the last point may have fewer."""
        starts = range(0, len(self.losses), SPAN)
        return [statistics.fmean(self.losses[start : start + SPAN]) for start in starts]

    @property
    def final_loss(self) -> float:
        """The mean of the last `SPAN` steps, of which there must be one."""
        return statistics.fmean(self.losses[-SPAN:])


# Training


def train(
    plan: Plan,
    impl: Implementation,
    seed: int,
    text: Tensor,
    advance: Callable[[float], None] = lambda loss: None,
) -> Run:
    """Trains a new model; a loss or a gradient that is not finite ends it.

    Args:
        plan: sizes, precision, device.
        impl: of its attention.
        seed: of weights and batches.
        text: of `load_text`.
        advance: is told the loss after every step.
    """
    model = initial_model(plan, impl, seed).train()
    # As usual: matrices decay, norms and biases do not.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": _WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_PEAK, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan.steps))
    losses: list[float] = []
    failure = None
    start = time.perf_counter()
    for batch in batches(plan, seed, text):
        loss = _loss(plan, model, batch)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), _MAX_NORM)
        found = torch.stack([loss.detach(), norm]).tolist()  # one wait for the device
        failure = _not_finite(found[0], found[1], len(losses) + 1)
        if failure is not None:
            break
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(found[0])
        advance(found[0])
    seconds = time.perf_counter() - start
    return Run(impl=impl, seed=seed, losses=tuple(losses), failure=failure, seconds=seconds)


def train_all(
    plan: Plan,
    content: bytes,
    jobs: int,
    advance: Callable[[Implementation, int, float], None],
) -> Iterator[Run]:
    """Every implementation with every seed, in this order, `jobs` at a time.

    `advance` is told implementation, seed and loss after every step, if there is one job.
    """
    pairs = [(impl, seed) for impl in plan.impls for seed in plan.seeds]
    if jobs == 1:
        text = load_text(plan, content)
        for impl, seed in pairs:
            yield train(plan, impl, seed, text, functools.partial(advance, impl, seed))
        return
    # Not forks: CUDA does not survive them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(pairs)), mp_context=context) as pool:
        waiting = [pool.submit(_train_alone, plan, content, *pair) for pair in pairs]
        for run in waiting:
            yield run.result()


def _train_alone(plan: Plan, content: bytes, impl: Implementation, seed: int) -> Run:
    return train(plan, impl, seed, load_text(plan, content))


def initial_model(plan: Plan, impl: Implementation, seed: int) -> Llama:
    """A model in float32, with the same weights on every device and with every `impl`."""
    with torch.device("meta"):
        model = Llama(plan.config, impl=impl)
    # Not torch.manual_seed, which seeds all GPUs too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        fill_random(model, torch.device("cpu"), torch.float32)
    return model.to(plan.device)


def load_text(plan: Plan, content: bytes) -> Tensor:
    """uint8 [bytes], on the device.

    Raises:
        ValueError: not enough for one row.
    """
    if len(content) <= plan.length:
        raise ValueError(
            f"a row needs {plan.length + 1} bytes, but the text has {len(content)}; give more"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(plan.device)


def batches(plan: Plan, seed: int, text: Tensor) -> Iterator[Tensor]:
    """int64 [B, T + 1] for every step: pieces of the text [bytes] that begin anywhere."""
    piece = torch.arange(plan.length + 1, device=plan.device)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(plan.steps):
        starts = torch.randint(len(text) - plan.length, (plan.batch_size, 1), generator=rng)
        yield text[starts.to(plan.device) + piece].long()


def _loss(plan: Plan, model: Llama, batch: Tensor) -> Tensor:
    """The mean over the bytes of a batch [B, T + 1], in nats; float32, a scalar."""
    autocast = plan.dtype != torch.float32
    with torch.autocast(plan.device.type, dtype=plan.dtype, enabled=autocast):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a part of the highest one."""
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    done = (step - _WARM_UP) / max(1, steps - _WARM_UP)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


def _not_finite(loss: float, norm: float, step: int) -> str | None:
    for what, value in (("loss", loss), ("norm of the gradients", norm)):
        if not math.isfinite(value):
            return f"the {what} is {value} at step {step}"
    return None


# Comparing


class Difference(NamedTuple):
    """Between two curves: absolute, in nats per byte, over their points."""

    mean: float
    max: float

    @classmethod
    def between(cls, a: Sequence[float], b: Sequence[float]) -> "Difference":
        """Of curves with the same number of points."""
        apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
        return cls(statistics.fmean(apart), max(apart))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far apart curves are.

    Attributes:
        spread: the curves of two seeds of the reference; of more seeds, what the least different
            pair has.
        differences: by implementation and seed, to the curve of the reference with that seed.
    """

    spread: Difference
    differences: Mapping[tuple[Implementation, int], Difference]

    @property
    def within_spread(self) -> bool:
        """Whether no difference exceeds the spread, neither on average nor at most."""
        return all(
            mean <= self.spread.mean and most <= self.spread.max
            for mean, most in self.differences.values()
        )


def compare(runs: Sequence[Run]) -> Comparison:
    """Compares curves with those of the reference.

    Args:
        runs: without failures; the reference with two seeds at least, and with every seed that
            another implementation has.
    """
    base = {run.seed: run.curve for run in runs if run.impl == BASE}
    pairs = [Difference.between(a, b) for a, b in itertools.combinations(base.values(), 2)]
    return Comparison(
        spread=Difference(min(pair.mean for pair in pairs), min(pair.max for pair in pairs)),
        differences={
            (run.impl, run.seed): Difference.between(run.curve, base[run.seed])
            for run in runs
            if run.impl != BASE
        },
    )
