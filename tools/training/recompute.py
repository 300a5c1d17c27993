"""recompute_blocks: activation checkpointing (arXiv 1604.06174), one block at a time."""

import functools

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers import Context, RotaryAngles
from zoo import CausalLM


def recompute_blocks(model: CausalLM) -> None:
    """From now on, a block keeps its input only, and is computed again in the backward pass.

    In place; names of modules and parameters stay as they are.
    """
    for block in model.layers:
        # Not a forward of its own: compiled code would be for that block alone.
        block.__class__ = _recomputed(type(block))  # type: ignore[arg-type]  # it is hashable


@functools.cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with a forward that is checkpointed."""

    def forward(self: nn.Module, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
        out: Tensor = checkpoint(kind.forward, self, x, rope, context, use_reentrant=False)
        return out

    return type(kind.__name__, (kind,), {"forward": forward})
