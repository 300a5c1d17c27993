"""compiled_blocks: the blocks of a model, each kind of them compiled once.

A graph of a whole model has every layer in it: 12 layers take torch.compile most of a minute, 30
more than two. Blocks of one kind run the same code on other tensors, so one graph of a block does
for all of them, and for those of other models of the same sizes.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from layers import Context, RotaryAngles
from zoo.causal_lm import Block, CausalLM
from zoo.compile_apart import compile_apart
from zoo.config import ModelConfig

_RunBlock = Callable[[nn.Module, Tensor, RotaryAngles, Context], Tensor]


def compiled_blocks(model: CausalLM) -> Sequence[Block]:
    """What `CausalLM.hidden_states` takes as `blocks`.

    For inference onto a cache: of each kind of cache a graph is made for the first sizes that
    come, one for any others, and both again for a single row or token.
    """
    kinds = model.config.layer_types
    return [
        partial(_run_compiled, _sizes(model.config, kind), block)
        for kind, block in zip(kinds, model.layers, strict=True)
    ]


def _sizes(config: ModelConfig, kind: str) -> Hashable:
    """All that tells blocks apart: the config of a model that has one of them."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    sizes: Hashable = dataclasses.replace(config, num_hidden_layers=1, layer_types=(kind,))
    return sizes


def _run_compiled(
    sizes: Hashable, block: nn.Module, x: Tensor, rope: RotaryAngles, context: Context
) -> Tensor:
    assert context.cache is not None
    run = _handle(sizes, x.dtype, x.device, context.cache.kind)
    return run(block, x, rope, context)


@functools.cache
def _handle(
    sizes: Hashable, dtype: torch.dtype, device: torch.device, cache_kind: Hashable
) -> _RunBlock:
    return compile_apart(run_block)


def run_block(block: nn.Module, x: Tensor, rope: RotaryAngles, context: Context) -> Tensor:
    """`block(x, rope, context)`, with the block as an argument: what is compiled for a kind."""
    out: Tensor = block(x, rope, context)
    return out
