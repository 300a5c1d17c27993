"""KernelBench: every implementation at one shape, checked first and timed if it is right."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flasheva import EvaConfig
from tools.benchmarks import correctness
from tools.benchmarks.implementations import IMPLEMENTATIONS, Call
from tools.benchmarks.inputs import Inputs, Shape, make_inputs
from tools.benchmarks.names import KernelName, PassName, WindowName
from tools.benchmarks.roofline import Work, causal_config, least_work
from tools.benchmarks.timing import (
    Timing,
    free_memory,
    measure_replay,
    measure_time,
    peak_memory,
)

_RIVALS = ("flex", "flex_prebuilt")  # the first that is right gives the gradients to compare with
_SMALL = 1024  # tokens of the call whose gradients are compared with float64
_LONGEST = 200  # characters of a reason; torch.compile writes pages


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured at each shape.

    Attributes:
        windows, window_size, chunk_size: of the rule.
        sink_sizes: None: one chunk, and for our own kernels also none, which shows their cost.
        bias: whether summaries have a bias, and a backward pass its gradient.
        dtype, device: of all tensors.
        impls, passes: which.
        repetitions: None: as many as `measure_time` thinks right.
        cuda_graph: whether CUDA graphs are replayed, instead of eager calls.
    """

    windows: tuple[WindowName, ...]
    window_size: int
    chunk_size: int
    sink_sizes: tuple[int, ...] | None
    bias: bool
    dtype: torch.dtype
    device: torch.device
    impls: tuple[KernelName, ...]
    passes: tuple[PassName, ...]
    repetitions: int | None
    cuda_graph: bool

    def jobs(self) -> list["Job"]:
        """Every implementation with every rule that it knows, rivals before our own kernels."""
        chosen = [name for name in IMPLEMENTATIONS if name in self.impls]
        ours = [name for name in chosen if IMPLEMENTATIONS[name].sees == "eva"]
        sinks = (self.chunk_size, 0) if self.sink_sizes is None else self.sink_sizes
        jobs = []
        for window in self.windows:
            for size in sinks:
                config = EvaConfig(
                    window=window,
                    window_size=self.window_size,
                    chunk_size=self.chunk_size,
                    sink_size=size,
                )
                extra = self.sink_sizes is None and size == 0
                jobs += [Job(n, config) for n in ours if n == "triton" or not extra]
        return jobs + [Job(name, None) for name in chosen if name not in ours]


class Job(NamedTuple):
    """One implementation under one rule; None for a peer, which knows no windows."""

    impl: KernelName
    config: EvaConfig | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one implementation, rule and pass.

    Attributes:
        shape, impl, config, pass_: what it was.
        status: "timed"; "wrong", so that a time would mean nothing; "missing", not installed; or
            "failed".
        reason: of any other status than "timed", one line; of "timed", why eager calls were timed
            where a CUDA graph was wanted.
        timing, peak_memory: None unless timed; bytes, None also on a CPU.
        work: the least work; None where a peer does not compute a softmax.
    """

    shape: Shape
    impl: KernelName
    config: EvaConfig | None
    pass_: PassName
    status: Literal["timed", "wrong", "missing", "failed"]
    reason: str = ""
    timing: Timing | None = None
    peak_memory: int | None = None
    work: Work | None = None

    @property
    def fails_the_run(self) -> bool:
        """A wrong answer, and any failure of our own kernels; peers may fail."""
        return self.status == "wrong" or (self.impl == "triton" and self.status != "timed")


class KernelBench:
    """Runs a plan, one shape after another."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # The small call is the same for many shapes, and to compile it takes seconds.
        self._checked: dict[tuple[Job, Shape], str | None] = {}

    def measure(self, shape: Shape) -> Iterator[Outcome]:
        """Everything at one shape; one outcome for each job and pass."""
        plan = self.plan
        x = make_inputs(shape, plan.chunk_size, plan.dtype, plan.device, bias=plan.bias)
        rivals: dict[EvaConfig, Mapping[str, Tensor]] = {}
        for job in plan.jobs():
            for pass_ in plan.passes:
                yield self._measure(shape, job, pass_, x, rivals)
                free_memory(plan.device)

    def _measure(
        self,
        shape: Shape,
        job: Job,
        pass_: PassName,
        x: Inputs,
        rivals: dict[EvaConfig, Mapping[str, Tensor]],
    ) -> Outcome:
        plan, kind = self.plan, IMPLEMENTATIONS[job.impl]
        config = causal_config(shape.T) if job.config is None else job.config

        def outcome(status: Literal["wrong", "missing", "failed"], reason: str) -> Outcome:
            return Outcome(
                shape=shape,
                impl=job.impl,
                config=job.config,
                pass_=pass_,
                status=status,
                reason=reason,
            )

        try:
            call = kind.prepare(config, x if pass_ == "forward" else x.leaves())
            if pass_ == "forward":
                wrong = self._check_forward(job, config, x, call)
            else:
                wrong = self._check_backward(shape, job, config, x, call, rivals)
            if wrong is not None:
                return outcome("wrong", wrong)
            run = _pass(call, pass_, x.do)
            peak = peak_memory(run, plan.device)
            measure = measure_replay if plan.cuda_graph else measure_time
            timing = measure(run, plan.device, plan.repetitions)
            return Outcome(
                shape=shape,
                impl=job.impl,
                config=job.config,
                pass_=pass_,
                status="timed",
                reason=_one_line(timing.not_captured or ""),
                peak_memory=peak,
                timing=timing,
                work=None if kind.sees == "gated" else least_work(shape, config, x.q.dtype, pass_),
            )
        except ImportError as error:
            return outcome("missing", _one_line(str(error)))
        # A peer may fail in any way; that must not end the measurement of the others.
        except Exception as error:
            return outcome("failed", _one_line(f"{type(error).__name__}: {error}"))

    def _check_forward(self, job: Job, config: EvaConfig, x: Inputs, call: Call) -> str | None:
        with torch.no_grad():
            out = call.run()
        return self._check_output(job, config, x, out)

    def _check_output(self, job: Job, config: EvaConfig, x: Inputs, out: Tensor) -> str | None:
        if IMPLEMENTATIONS[job.impl].sees == "gated":
            return None if out.isfinite().all() else "the output has numbers that are not finite"
        return correctness.check_rows(config, x, out)

    def _check_backward(
        self,
        shape: Shape,
        job: Job,
        config: EvaConfig,
        x: Inputs,
        call: Call,
        rivals: dict[EvaConfig, Mapping[str, Tensor]],
    ) -> str | None:
        if job.config is not None:
            wrong = self._check_small(shape, job, job.config)
            if wrong is not None:
                return wrong
        out = call.run()
        wrong = self._check_output(job, config, x, out.detach())
        if wrong is not None:
            return wrong
        found = correctness.gradients(out, call.differentiable, x.do)
        wrong = correctness.check_against_rival(found, rivals.get(config))
        if wrong is None and job.impl in _RIVALS:
            rivals.setdefault(config, found)
        return wrong

    def _check_small(self, shape: Shape, job: Job, config: EvaConfig) -> str | None:
        plan, R = self.plan, shape.H // shape.G
        small = Shape(2, 2 * R, 2, min(shape.T, _SMALL), shape.D)
        if (job, small) not in self._checked:
            x = make_inputs(
                small, plan.chunk_size, plan.dtype, plan.device, bias=plan.bias, seed=1
            )
            prepare = IMPLEMENTATIONS[job.impl].prepare
            self._checked[job, small] = correctness.check_gradients(prepare, config, x)
        return self._checked[job, small]


def _pass(call: Call, pass_: PassName, do: Tensor) -> Callable[[], Mapping[str, Tensor]]:
    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"output": call.run()}

    def forward_backward() -> dict[str, Tensor]:
        return correctness.gradients(call.run(), call.differentiable, do)

    return forward if pass_ == "forward" else forward_backward


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST else words[:_LONGEST] + " ..."
