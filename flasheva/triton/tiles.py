"""Tile sizes, warps and pipeline stages per kernel, head dim, dtype and GPU generation.

Chosen by measurement (docs/kernels.md), not by autotuning at a user's first call.
"""

from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "queries", "keys", "summaries"]


class Tile(NamedTuple):
    """Queries and keys per tile, warps per program, stages of the pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Head dim (padded to a power of 2), then forward, queries, keys, summaries.
_KERNELS: tuple[Kernel, ...] = ("forward", "queries", "keys", "summaries")
_HALF = {
    16: ((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    32: ((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    64: ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    128: ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    256: ((64, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}
_FULL = {
    16: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    32: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    64: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    128: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    256: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}


def tile_of(kernel: Kernel, dtype: torch.dtype, block_d: int) -> Tile:
    """The tile of `kernel` for inputs of `dtype` and a head dim padded to `block_d`."""
    table = _FULL if dtype == torch.float32 else _HALF
    return Tile(*table[block_d][_KERNELS.index(kernel)])
