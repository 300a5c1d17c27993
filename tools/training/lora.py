"""Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / rank * B A, with W frozen.

`add_lora` puts them into a model, `merge_lora` makes plain weights of them. The names of all other
parameters stay as they are; a layer's adapter is `<layer>.lora_a` and `<layer>.lora_b`.
"""

import fnmatch
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.stages import Lora
from zoo.weights.encoding import Factors


class LoraLinear(nn.Linear):
    """A linear layer x W^T + b + alpha / rank * (x A^T) B^T. x: [..., in]; returns [..., out].

    Parameters: `weight` and `bias` of the layer that it replaces, which it shares with it;
    `lora_a` [rank, in], uniform at the start, and `lora_b` [out, rank], zero: nothing changes.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        # A skeleton on "meta" allocates nothing; the parameters are those of `linear`.
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        # Adapters of float32 at least: they are what trains.
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, self.in_features, dtype=wide))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(self.out_features, rank, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        low = F.linear(x, self.lora_a.to(x.dtype))
        return out + self.scale * F.linear(low, self.lora_b.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the sum, computed in float32 at least and rounded once."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        wide = self.lora_a.dtype
        weight = self.weight.to(wide) + self.scale * (self.lora_b @ self.lora_a)
        linear.weight = nn.Parameter(weight.to(self.weight.dtype))
        linear.bias = self.bias
        return linear


def lora_targets(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The names of the linear layers that patterns fit.

    The maps of EVA layers are not among them: their weights are read, not called. Nor is
    `lm_head`, whose weight losses read.

    Raises:
        ValueError: a pattern that fits no such layer.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".attend." not in name and name != "lm_head"
    ]
    found: set[str] = set()
    for pattern in patterns:
        fits = fnmatch.filter(names, pattern)  # names have one case
        if not fits:
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(
                f"lora.targets: {pattern!r} fits no linear layer; their names end in "
                f"{', '.join(ends)}"
            )
        found.update(fits)
    return [name for name in names if name in found]


def add_lora(model: nn.Module, lora: Lora, seed: int = 0) -> list[str]:
    """Gives every target an adapter and freezes its weight; returns the targets' names.

    Args:
        model: changed in place, without adapters.
        lora: rank, scale and targets.
        seed: of A, the same on every device.

    Raises:
        ValueError: targets that fit nothing, or adapters that are there already.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ValueError("the model has adapters already; merge_lora makes weights of them")
    generator = torch.Generator().manual_seed(seed)
    targets = lora_targets(model, lora.targets)
    for name in targets:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        adapter = LoraLinear(linear, lora.rank, lora.alpha)
        bound = 1 / math.sqrt(adapter.in_features)  # as nn.Linear, and as published code
        if not adapter.lora_a.is_meta:
            drawn = torch.empty(adapter.lora_a.shape).uniform_(-bound, bound, generator=generator)
            adapter.lora_a.data.copy_(drawn)
        adapter.weight.requires_grad_(False)
        adapter.train(linear.training)
        model.set_submodule(name, adapter)
    return targets


def lora_factors(model: nn.Module) -> dict[str, Factors]:
    """The adapters as `zoo.save_adapter` takes them: by the name of the weight, not copied."""
    return {
        f"{name}.weight": Factors(a=module.lora_a, b=module.lora_b, scale=module.scale)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }


def merge_lora(model: nn.Module) -> list[str]:
    """Makes plain layers of all adapters, in place; returns their names."""
    adapters = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLinear)]
    for name, adapter in adapters:
        model.set_submodule(name, adapter.merged().train(adapter.training))
    return [name for name, _ in adapters]
