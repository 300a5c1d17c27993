"""beside: an MLP that a step of decoding computes on a second stream, while attention runs.

Where both read the same hidden states (parallel residual), neither waits for the other. A step's
products are small: each takes a few microseconds of latency and a part of the GPU, and attention
waits for memory. Under a CUDA graph the second stream becomes a branch of the graph.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.mlp import MLP, activate


@dataclass(frozen=True)
class Beside:
    """What `beside` began."""

    mlp: MLP
    x: Tensor
    begun: Tensor | None

    def join(self, after: Tensor) -> Tensor:
        """The MLP's output [B, T, E]; `after` is what was computed meanwhile."""
        if self.begun is None:
            return self.mlp(self.x)
        _join(self.begun, self.x, after)
        return self.begun


def beside(mlp: MLP, x: Tensor, ahead: Tensor) -> Beside:
    """Begins `mlp(x)`, x [B, T, E]: a step on a GPU at once, anything else when it is joined.

    `ahead` is what the attention reads; it may be `x`.
    """
    return Beside(mlp, x, _begin_step(mlp, x, ahead) if _is_step(mlp, x) else None)


def _is_step(mlp: MLP, x: Tensor) -> bool:
    # Under autocast the output has another dtype than the op below says.
    if not x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    return x.shape[1] == 1 and _is_plain(mlp)


def _is_plain(mlp: nn.Module) -> bool:
    # The op below sees weights only: no adapters, which subclass or replace modules, and no hooks.
    if type(mlp) is not MLP or not is_unhooked(mlp):
        return False
    up, down = mlp.up_proj, mlp.down_proj
    if type(up) is not nn.Linear or type(down) is not nn.Linear:
        return False
    return is_unhooked(up) and is_unhooked(down)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling a module runs its `forward` and nothing else."""
    return not module._forward_hooks and not module._forward_pre_hooks


def _begin_step(mlp: MLP, x: Tensor, ahead: Tensor) -> Tensor:
    up, down = mlp.up_proj, mlp.down_proj
    return _begin(ahead, x, up.weight, up.bias, down.weight, down.bias, mlp.activation)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# These are ops because torch.compile knows no streams before torch 2.12. It reorders what is
# independent, so they claim more than they do: `_begin` that it writes what attention reads, and
# `_join` that it reads what attention made and writes the MLP's output. `_join` takes `x` too, so
# that its memory is not used again while the other stream may still read it.
@torch.library.custom_op("layers::mlp_beside", mutates_args=("ahead",))
def _begin(
    ahead: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    activation: str,
) -> Tensor:
    def compute() -> Tensor:
        hidden = nn.functional.linear(x, up_weight, up_bias)
        return nn.functional.linear(activate(hidden, activation), down_weight, down_bias)

    if not x.is_cuda:
        return compute()
    with torch.cuda.device(x.device):
        stream = _stream(x.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            return compute()


@_begin.register_fake
def _(
    ahead: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], down_weight.shape[0]))


@torch.library.custom_op("layers::join", mutates_args=("begun",))
def _join(begun: Tensor, x: Tensor, after: Tensor) -> None:
    if not begun.is_cuda:
        return
    with torch.cuda.device(begun.device):
        stream = torch.cuda.current_stream()
        stream.wait_stream(_stream(begun.device))
        # The memory belongs to the other stream, which the next caller of `_begin` may write to,
        # waiting for its own stream only. A graph has memory of its own, and one caller.
        if not torch.cuda.is_current_stream_capturing():
            begun.record_stream(stream)
