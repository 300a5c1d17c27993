"""Which parameters a stage trains, in which dtype, and the optimizer that trains them.

A stage begins with `prepare(model, stage)`, then `build_optimizer(model, stage)`; each step runs
under `autocast(stage, device)`, after `set_learning_rates(optimizer, stage, step)`.

Weights are float32. A stage of "bfloat16" computes under autocast: the float32 parameters are the
master weights, and there is no second copy to keep in step. Only where it has adapters, which are
for big models, do weights that do not train keep their dtype.
"""

import fnmatch
from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import nn

from recipes import Stage
from tools.training.lora import add_lora
from tools.training.memory import converted_layers
from tools.training.schedule import rate_factor
from zoo import CausalLM


class Group(TypedDict):
    """Parameters of one learning rate and weight decay, as optimizers take them.

    `names` are those of `params`, and `peak_lr` is the highest rate of the stage: `lr` is what
    `set_learning_rates` has made of it.
    """

    params: list[nn.Parameter]
    names: list[str]
    lr: float
    peak_lr: float
    weight_decay: float


def prepare(model: nn.Module, stage: Stage) -> dict[str, nn.Parameter]:
    """Readies a model for a stage: adapters, float32 weights, and who gets a gradient.

    Call it before FSDP wraps the model, and make the optimizer afterwards.

    Args:
        model: changed in place; without adapters of a stage before.
        stage: what trains.

    Returns:
        The parameters that train, by name.

    Raises:
        ValueError: patterns that fit nothing, or a weight that is to train and to have an adapter.
    """
    if stage.lora is not None:
        _refuse_both(model, stage, add_lora(model, stage.lora, stage.seed))
    names = set(trained_names(model, stage))
    keeps_dtype = stage.lora is not None and stage.dtype == "bfloat16"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names or not keeps_dtype:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return {name: p for name, p in model.named_parameters() if name in names}


def trained_names(model: nn.Module, stage: Stage) -> list[str]:
    """The names of the parameters that train, in the order of the model.

    A weight with two names, such as that of a tied `lm_head`, goes by either in patterns, and by
    its first one here. Adapters that are there always train. Of an alignment alone, only the
    attention of converted layers and the norm before it do: nothing else has a gradient.

    Raises:
        ValueError: a pattern of `train` or `lr_groups` that fits nothing.
    """
    fits = {pattern: set(_matching(model, pattern)) for pattern in stage.train}
    for pattern, found in fits.items():
        if not found:
            raise ValueError(
                f"stage {stage.name!r}: {pattern!r} in train fits no parameter; there are "
                f"{_examples(model)}"
            )
    wanted = set().union(*fits.values())
    names = [
        name
        for name, _ in model.named_parameters()
        if (name in wanted or is_adapter(name)) and _is_reached(model, stage, name)
    ]
    for pattern, _ in stage.lr_groups:
        if not set(_matching(model, pattern)) & set(names):
            raise ValueError(
                f"stage {stage.name!r}: {pattern!r} in lr_groups fits no parameter that trains"
            )
    return names


def optimizer_groups(model: nn.Module, stage: Stage) -> list[Group]:
    """The parameters that train, by learning rate and weight decay.

    Matrices decay, but for those of summary maps: these start at the identity and have no reason
    to go to zero.
    """
    rates: dict[str, float] = {}
    for pattern, rate in stage.lr_groups:
        for name in _matching(model, pattern):
            rates.setdefault(name, rate)
    groups: dict[tuple[float, float], Group] = {}
    parameters = dict(model.named_parameters())
    for name in trained_names(model, stage):
        parameter = parameters[name]
        rate = rates.get(name, stage.lr)
        decay = stage.weight_decay if parameter.ndim > 1 and ".attend." not in name else 0.0
        group = groups.setdefault(
            (rate, decay),
            Group(params=[], names=[], lr=rate, peak_lr=rate, weight_decay=decay),
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """AdamW over the groups; fused where that runs."""
    groups = [dict(group) for group in optimizer_groups(model, stage)]
    kinds = {parameter.device.type for parameter in model.parameters()}
    fused = kinds <= {"cuda", "cpu"}
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, fused=fused)


def set_learning_rates(optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> float:
    """Sets every group's rate for a step, from 0; returns the factor of its peak."""
    factor = rate_factor(stage, step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return factor


def autocast(stage: Stage, device: torch.device) -> torch.autocast:
    """The context in which the stage computes its losses; `backward` runs outside of it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=stage.dtype == "bfloat16")


def _matching(model: nn.Module, pattern: str) -> Iterable[str]:
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(parameter, name)
        if fnmatch.fnmatchcase(name, pattern):
            yield first[parameter]


def _refuse_both(model: nn.Module, stage: Stage, targets: list[str]) -> None:
    weights = {f"{target}.weight" for target in targets}
    for pattern in stage.train:
        both = sorted(weights & set(_matching(model, pattern)))
        if both:
            raise ValueError(
                f"stage {stage.name!r}: {both[0]!r} has an adapter, but {pattern!r} in train fits "
                "it too; weights train or have adapters, not both"
            )


def _is_reached(model: nn.Module, stage: Stage, name: str) -> bool:
    if not isinstance(model, CausalLM) or set(stage.weights) != {"attention_mse"}:
        return True
    return any(
        name.startswith((f"layers.{layer}.attention.", f"layers.{layer}.input_layernorm."))
        for layer in converted_layers(model)
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of LoRA's."""
    return name.endswith((".lora_a", ".lora_b"))


def _examples(model: nn.Module, limit: int = 4) -> str:
    names = [name for name, _ in model.named_parameters()]
    middle = names[:: max(len(names) // limit, 1)][:limit]
    return ", ".join(middle)
