"""sweep: the hidden states of a batch under many placements, what they share computed once.

Two placements that agree on layers 0 to d have the same hidden states behind layer d. So the
placements form a tree, whose nodes at depth d are the different choices for layers 0 to d, and
each node is one run of one block. Where one layer of L changes at a time, that is half of the
L x L blocks of L forward passes. Nodes of a depth run the same block and join in batches.

Dims: B rows, T tokens, E hidden, L layers.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from layers import Context
from recipes.placement import LayerSet
from tools.placement.branches import Branches

_Choices = tuple[bool, ...]  # of the layers so far, whether each is exact


@torch.inference_mode()
def sweep(
    branches: Branches, ids: Tensor, placements: Sequence[LayerSet], *, rows: int
) -> Iterator[tuple[int, Tensor]]:
    """Runs a batch under each placement.

    Args:
        branches: the model.
        ids: int64 [B, T], on the model's device.
        placements: sets of exact layers; equal ones are computed once.
        rows: how many rows a block is given at a time, at least B.

    Yields:
        The index of each placement and what `lm_head` takes, [B, T, E].
    """
    model = branches.model
    context = Context.of(ids, None, None, None)
    x = model.embed(ids)
    ropes = model.rotary(context, x.dtype)
    choices = _choices(placements, branches.depth)
    at_once = max(rows // len(ids), 1)
    states: dict[_Choices, Tensor] = {(): x}
    for layer, block in enumerate(model.layers):
        before, states = states, {}
        nodes = list(dict.fromkeys(path[: layer + 1] for path in choices))
        for exact in (False, True):
            branches.choose(layer, exact=exact)
            chosen = [node for node in nodes if node[layer] is exact]
            for first in range(0, len(chosen), at_once):
                part = chosen[first : first + at_once]
                x = torch.cat([before[node[:layer]] for node in part])
                x = block(x, ropes[layer], context)
                states.update(zip(part, x.split(len(ids)), strict=True))
        branches.choose(layer, exact=False)
    for index, path in enumerate(choices):
        yield index, model.norm(states[path])


def blocks_run(placements: Sequence[LayerSet], depth: int) -> int:
    """How many blocks `sweep` runs for each batch; one by one, every placement takes `depth`."""
    choices = _choices(placements, depth)
    return sum(len({path[:end] for path in choices}) for end in range(1, depth + 1))


def _choices(placements: Sequence[LayerSet], depth: int) -> list[_Choices]:
    return [tuple(layer in exact for layer in range(depth)) for exact in placements]
