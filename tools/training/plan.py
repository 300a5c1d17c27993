"""make_plan: what a recipe's stages would train, for how long, and what memory they need."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from recipes import Stage
from tools.training.lora import merge_lora
from tools.training.memory import Memory, converted_layers, memory_of_stage
from tools.training.parameters import optimizer_groups, prepare
from tools.training.preflight import rows_at_a_time
from zoo.config import ModelConfig
from zoo.families import build

_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Parameters of one name, in all layers that have it.

    Attributes:
        name: with "*" for the number of the layer.
        tensors, numbers: how many there are.
        lr: the highest learning rate.
        weight_decay: 0 for what does not decay.
    """

    name: str
    tensors: int
    numbers: int
    lr: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage does.

    Attributes:
        stage: as the recipe has it.
        trained: what trains, in the order of the model.
        numbers: parameters that train.
        all_numbers: parameters of the model, adapters among them.
        steps, tokens: its length.
        rows: B, of a process.
        memory: an estimate.
        seconds: an estimate; None without a speed to make it of.
    """

    stage: Stage
    trained: tuple[Trained, ...]
    numbers: int
    all_numbers: int
    steps: int
    tokens: int
    rows: int
    memory: Memory
    seconds: float | None


def make_plan(
    config: ModelConfig,
    stages: Sequence[Stage],
    *,
    rows: int | None = None,
    ranks: int = 1,
    checkpointing: bool = False,
    teacher_bytes: int = 2,
    tokens_per_second: float | None = None,
) -> tuple[StagePlan, ...]:
    """Plans every stage.

    Args:
        config: of the student.
        stages: of a recipe.
        rows: rows that a process computes at a time; None: all of its part of the batch.
        ranks: processes.
        checkpointing: blocks are computed again in the backward pass.
        teacher_bytes: of one of the teacher's weights.
        tokens_per_second: of all GPUs together, for the time.

    Raises:
        ValueError: patterns that fit nothing, a loss with nothing to compare, a context that is
            not whole chunks, a speed or number of rows that is not positive, processes that do
            not divide a batch, or rows that do not divide the part of one.
    """
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second must be positive, not {tokens_per_second}")
    plans = []
    with FakeTensorMode():
        model = build(config, "auto")
        weights = sum(p.numel() for p in model.parameters())
        for stage in stages:
            merge_lora(model)
            prepare(model, stage)
            at_once = rows_at_a_time(stage, rows, ranks)
            if "attention_mse" in stage.weights and not converted_layers(model):
                raise ValueError(
                    f"stage {stage.name!r}: 'attention_mse' compares converted layers, and the "
                    "model has none"
                )
            if converted_layers(model) and stage.context % config.eva.chunk_size:
                raise ValueError(
                    f"stage {stage.name!r}: context must be a multiple of chunk_size="
                    f"{config.eva.chunk_size}, not {stage.context}: rows are packed in chunks"
                )
            trained = _trained(model, stage)
            numbers = sum(group.numbers for group in trained)
            tokens = stage.num_steps * stage.tokens_per_step
            plans.append(
                StagePlan(
                    stage=stage,
                    trained=trained,
                    numbers=numbers,
                    all_numbers=sum(p.numel() for p in model.parameters()),
                    steps=stage.num_steps,
                    tokens=tokens,
                    rows=at_once,
                    memory=memory_of_stage(
                        *(model, stage, at_once),
                        checkpointing=checkpointing,
                        teacher=weights * teacher_bytes,
                    ),
                    seconds=None if tokens_per_second is None else tokens / tokens_per_second,
                )
            )
    return tuple(plans)


def plan_text(plans: Sequence[StagePlan]) -> str:
    """The plans for people, as `--dry-run` prints them."""
    return "\n\n".join(_text(plan) for plan in plans)


def _text(plan: StagePlan) -> str:
    stage, memory = plan.stage, plan.memory
    loss = " + ".join(f"{weight:g} {name}" for name, weight in stage.loss)
    steps = f"{plan.steps:,} steps of {stage.batch_size} x {stage.context:,}"
    lines = [
        f"stage {stage.name}: {loss}, {stage.dtype}",
        f"  length      {steps} = {plan.tokens:,} tokens",
        f"  rate        {stage.schedule}, {stage.warmup} steps of warm-up, "
        f"betas {stage.betas[0]:g} and {stage.betas[1]:g}, "
        f"clip {f'{stage.clip:g}' if stage.clip else 'none'}, seed {stage.seed}",
        f"  trains      {plan.numbers:,} of {plan.all_numbers:,} parameters "
        f"({plan.numbers / plan.all_numbers:.1%})",
    ]
    width = max(len(group.name) for group in plan.trained)
    for group in plan.trained:
        decay = f", decay {group.weight_decay:g}" if group.weight_decay else ""
        lines.append(
            f"    {group.name:{width}}  {group.tensors:>4} x {group.numbers // group.tensors:>12,}"
            f"  lr {group.lr:g}{decay}"
        )
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in vars(memory).items() if size)
    lines.append(
        f"  memory      about {_gib(memory.total)} GiB with {plan.rows} rows at a time ({parts})"
    )
    if plan.seconds is not None:
        lines.append(f"  time        about {_duration(plan.seconds)}")
    return "\n".join(lines)


def _trained(model: nn.Module, stage: Stage) -> tuple[Trained, ...]:
    place = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    found = [
        (name, parameter, group)
        for group in optimizer_groups(model, stage)
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]
    found.sort(key=lambda item: place[item[0]])
    merged: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter, group in found:
        key = (_LAYER.sub("layers.*.", name), group["peak_lr"], group["weight_decay"])
        merged.setdefault(key, []).append(parameter)
    return tuple(
        Trained(
            name=name,
            tensors=len(parameters),
            numbers=sum(parameter.numel() for parameter in parameters),
            lr=lr,
            weight_decay=decay,
        )
        for (name, lr, decay), parameters in merged.items()
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
