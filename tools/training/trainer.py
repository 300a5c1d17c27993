"""train_stage: the loop of one stage, from its newest checkpoint to its last step.

A step: batches are a function of the step; micro-batches add up gradients; the norm is looked at
before weights change (guard.py); then the optimizer. Nothing is remembered between steps but
weights, the optimizer's moments and the last norms, all of which a checkpoint holds.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes import LossName, Stage
from tools.training.checkpoints import Checkpoints
from tools.training.data.batches import Batches
from tools.training.data.packing import Batch
from tools.training.guard import Diverged, Guard
from tools.training.logit_pieces import IGNORED
from tools.training.metrics import Metrics
from tools.training.objective import Objective
from tools.training.parameters import autocast, build_optimizer, prepare, set_learning_rates
from tools.training.preflight import rows_at_a_time
from tools.training.ranks import Parallel, Ranks, is_sharded, shard, whole
from tools.training.recompute import recompute_blocks
from tools.training.speed import flops_per_token, peak_flops
from zoo import CausalLM

Check = Callable[[CausalLM], Mapping[str, float]]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How a stage runs; none of it changes what is computed, but for the guard.

    Attributes:
        rows: rows that a process computes at a time; None: all that it has.
        compile: whether blocks and losses are compiled.
        checkpointing: whether blocks are computed again in the backward pass.
        parallel: how several processes share a model; see ranks.py.
        save_every: steps between checkpoints, of which the last step has one too; 0: none.
        check_every: steps between checks; 0: none.
        spike: see `Guard`.
    """

    rows: int | None = None
    compile: bool = False
    checkpointing: bool = False
    parallel: Parallel = "auto"
    save_every: int = 200
    check_every: int = 0
    spike: float = 20.0


@dataclass(frozen=True)
class Hooks:
    """What a stage calls, on the first process but for `check`.

    Attributes:
        metrics: where steps are written; None on all but the first process.
        check: measures a model, on every process; called every `check_every` steps.
        advance: called with the steps done.
        say: called with a line now and then.
    """

    metrics: Metrics | None
    check: Check | None
    advance: Callable[[int], None]
    say: Say


def train_stage(
    student: CausalLM,
    teacher: CausalLM | None,
    stage: Stage,
    batches: Batches,
    ranks: Ranks,
    loop: Loop,
    hooks: Hooks,
    checkpoints: Checkpoints,
    bad_batch: Path,
) -> None:
    """Trains `student` in place; it stays sharded if it is.

    Args:
        student: loaded for this stage, in float32.
        teacher: for losses that need one, on the same device.
        stage: what is minimised, of what, how long.
        batches: of this process, at the step of the newest checkpoint.
        ranks: the processes.
        loop: how it runs.
        hooks: what it calls.
        checkpoints: of this stage; the newest one is gone on with.
        bad_batch: where the batch of a step that is not taken goes, a .safetensors file; those
            of other processes have their rank behind the name.

    Raises:
        Diverged: see `Guard`; the weights are those before the step.
        ValueError: rows that do not divide a process's batch, or patterns that fit nothing.
    """
    rows = rows_at_a_time(stage, loop.rows, ranks.count)
    prepare(student, stage)
    if loop.checkpointing:
        recompute_blocks(student)
    sharded = "attention_mse" not in stage.weights and is_sharded(student, loop.parallel, ranks)
    if sharded:
        shard(student)
    if ranks.count > 1 and ranks.first:
        how = "parameters sharded (FSDP2)" if sharded else "gradients averaged (DDP)"
        hooks.say(f"stage {stage.name}: {ranks.count} processes, {how}")
    objective = Objective(student, teacher, stage)
    run = _callable(objective, ranks, sharded=sharded, compile=loop.compile)
    optimizer = build_optimizer(student, stage)
    first, guard = checkpoints.newest() or 0, Guard(loop.spike)
    if first:
        guard = Guard(loop.spike, checkpoints.load(first, student, optimizer))
    hooks.advance(first)
    meter = _Meter(student, teacher, stage, ranks)
    student.train()
    try:
        for step in range(first, stage.num_steps):
            factor = set_learning_rates(optimizer, stage, step)
            if student.config.eva.training_noise:
                torch.manual_seed(hash((stage.seed, step, ranks.rank)) & (2**63 - 1))
            batch = Batch(*(x.to(ranks.device, non_blocking=True) for x in next(batches)))
            found, norm = _gradients(run, student, stage, batch, rows, ranks)
            try:
                guard.check(found["loss"], norm)
            except Diverged as error:
                _keep(batch, bad_batch, ranks)
                ranks.wait()  # whoever ends first makes torchrun end the others
                again = checkpoints.newest() or 0
                raise Diverged(
                    f"stage {stage.name!r} stopped before step {step}: {error}; its batch is in "
                    f"{bad_batch}, and the same command goes on from step {again}"
                ) from None
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            values = meter.values(done)
            values |= found | {"grad_norm": norm, "lr": stage.lr * factor}
            if hooks.check is not None and _due(done, loop.check_every, stage.num_steps):
                student.eval()
                with autocast(stage, ranks.device):
                    values |= hooks.check(student)
                student.train()
                meter.restart()
            if hooks.metrics is not None:
                hooks.metrics.write(step, values)
                hooks.say(_line(stage, done, values))
            hooks.advance(1)
            # The last one is for what follows training: writing the model may fail.
            if _due(done, loop.save_every, stage.num_steps):
                if hooks.metrics is not None:
                    hooks.metrics.sync()
                checkpoints.save(done, student, optimizer, list(guard.norms))
                meter.restart()
    finally:
        objective.close()
        student.eval()


def _callable(
    objective: Objective, ranks: Ranks, *, sharded: bool, compile: bool
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[LossName, Tensor]]]:
    if compile:
        objective.compile_parts(sharded=sharded)
    if ranks.count == 1 or sharded:
        return objective
    return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)


def _gradients(
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[LossName, Tensor]]],
    student: CausalLM,
    stage: Stage,
    batch: Batch,
    rows: int,
    ranks: Ranks,
) -> tuple[dict[str, float], float]:
    """Adds up the gradients of a batch and clips them; mean losses, and the norm before."""
    count = ranks.sum((batch.labels != IGNORED).sum().double()).clamp(min=1)
    sums: Tensor | None = None
    names: list[str] = []
    parts = [*zip(*(x.split(rows) for x in batch), strict=True)]
    for part in parts:
        with _unaveraged(run) if part is not parts[-1] else nullcontext():
            with autocast(stage, ranks.device):
                total, losses = run(*part)
            # Processes average their gradients; a step's is their sum.
            (total * (ranks.count / count).to(total.dtype)).backward()
        names = ["loss", *losses]
        new = torch.stack([x.detach().double() for x in (total, *losses.values())])
        sums = new if sums is None else sums + new
    assert sums is not None
    trained = [p for p in student.parameters() if p.requires_grad]
    limit = stage.clip or float("inf")
    norm = whole(nn.utils.clip_grad_norm_(trained, limit)).double()
    means = ranks.sum(sums) / count
    *values, last = torch.cat([means, norm[None]]).tolist()  # the only wait for the device
    return dict(zip(names, values, strict=True)), last


def _unaveraged(run: object) -> AbstractContextManager[None]:
    """Leaves gradients to be averaged with those of a step's last part, as DDP can.

    Those of sharded parameters are summed in every part: whole ones would take memory.
    """
    if isinstance(run, nn.parallel.DistributedDataParallel):
        return run.no_sync()
    return nullcontext()


class _Meter:
    """Tokens per second, MFU and memory; what is not a step (checks, saving) is left out."""

    def __init__(
        self, student: CausalLM, teacher: CausalLM | None, stage: Stage, ranks: Ranks
    ) -> None:
        self._tokens, self._device = stage.tokens_per_step, ranks.device
        peak = peak_flops(ranks.device, stage.dtype)
        flops = flops_per_token(student, teacher, stage)
        self._mfu = None if peak is None else flops / (peak * ranks.count)
        self.restart()

    def restart(self) -> None:
        self._since = time.perf_counter()

    def values(self, done: int) -> dict[str, float | None]:
        now = time.perf_counter()
        speed = self._tokens / (now - self._since)
        self._since = now
        cuda = self._device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30 if cuda else None
        return {
            "tokens": done * self._tokens,
            "tokens_per_second": speed,
            "mfu": None if self._mfu is None else speed * self._mfu,
            "memory_gib": memory,
        }


def _due(done: int, every: int, steps: int) -> bool:
    return bool(every) and (done % every == 0 or done == steps)


def _line(stage: Stage, done: int, values: Mapping[str, float | None]) -> str:
    shown = {
        "loss": "{:.4f}",
        "grad_norm": "norm {:.3g}",
        "lr": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "memory_gib": "{:.1f} GiB",
        "perplexity": "perplexity {:.3f}",
        "passkey": "passkey {:.2f}",
    }
    parts = [text.format(values[k]) for k, text in shown.items() if values.get(k) is not None]
    return f"{stage.name} {done}/{stage.num_steps}: {', '.join(parts)}"


def _keep(batch: Batch, path: Path, ranks: Ranks) -> None:
    if not ranks.first:
        path = path.with_name(f"{path.stem}-{ranks.rank}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.cpu() for name, x in batch._asdict().items()}, path)
