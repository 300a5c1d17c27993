"""Tile sizes, warps and pipeline stages per kernel, head dim, dtype and GPU generation.

Those of Hopper for head dims 64 and 128 come from a search on an H100 (docs/kernels.md); the
others are guesses that compile within the chip's shared memory (tests/test_triton_compile.py).
There is no autotuning at a user's first call.
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


class SummaryTile(NamedTuple):
    """Chunks per program, tokens of each chunk at a time, warps per program.

    Where maps are products of matrices, a program needs 16 chunks.
    """

    block_c: int
    tokens: int
    num_warps: int


class _Tiles(NamedTuple):
    forward: Tile
    queries: Tile
    keys: Tile
    summaries: Tile


# By head dim, padded to a power of 2.
_HOPPER = {
    16: _Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    32: _Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    64: _Tiles(Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 1), Tile(64, 64, 4, 3)),
    128: _Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
}
_OTHERS = {
    16: _Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    32: _Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    64: _Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    128: _Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}
_FLOAT32 = {
    16: _Tiles(*(Tile(32, 32, 4, 1),) * 4),
    32: _Tiles(*(Tile(32, 32, 4, 1),) * 4),
    64: _Tiles(*(Tile(32, 16, 4, 1),) * 4),
    128: _Tiles(*(Tile(16, 16, 4, 1),) * 4),
}
_SUMMARY = {
    16: SummaryTile(16, 32, 4),
    32: SummaryTile(16, 8, 4),
    64: SummaryTile(16, 4, 4),
    128: SummaryTile(16, 4, 8),
}


def tile_of(kernel: Kernel, dtype: torch.dtype, block_d: int, capability: int) -> Tile:
    """The tile of an attention kernel.

    Args:
        kernel: which one.
        dtype: of the inputs.
        block_d: head dim, padded to a power of 2.
        capability: major compute capability of the GPU, such as 9.
    """
    table = _FLOAT32 if dtype == torch.float32 else _HOPPER if capability == 9 else _OTHERS
    tile: Tile = getattr(table[block_d], kernel)
    return tile


def summary_tile_of(block_d: int, pooled: bool) -> SummaryTile:
    """The tile of both summary kernels; `block_d` as for `tile_of`."""
    tile = _SUMMARY[block_d]
    return tile._replace(block_c=tile.block_c // 4) if pooled else tile
