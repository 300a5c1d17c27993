"""recompute_blocks: activation checkpointing (arXiv 1604.06174), one block at a time."""

import functools
from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layers import Context, RotaryAngles
from zoo import CausalLM

_Forward = Callable[[Tensor, RotaryAngles, Context], Tensor]


def recompute_blocks(model: CausalLM) -> None:
    """From now on, a block keeps its input only, and is computed again in the backward pass.

    In place; names of modules and parameters stay as they are.
    """
    for block in model.layers:
        block.forward = functools.partial(_again, block.forward)


def _again(forward: _Forward, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
    out: Tensor = checkpoint(forward, x, rope, context, use_reentrant=False)
    return out
