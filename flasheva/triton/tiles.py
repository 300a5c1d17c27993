"""Tile sizes, warps and pipeline stages per kernel, head dim, dtype and GPU generation.

Those of Hopper for head dims 64 and 128 come from a search on an H100 (docs/kernels.md); the
others are guesses that compile within the chip's shared memory (tests/test_triton_compile.py).
There is no autotuning at a user's first call.
"""

from typing import Literal, NamedTuple

import torch
import triton

Kernel = Literal["forward", "queries", "keys", "summaries"]


class Tile(NamedTuple):
    """Queries and keys per tile, warps per program, stages of the pipeline, registers per thread.

    max_registers: None: as many as the compiler likes.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


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
    64: _Tiles(
        forward=Tile(64, 32, 4, 3, 96),
        queries=Tile(64, 32, 4, 3, 128),
        keys=Tile(32, 64, 4, 1, 168),
        summaries=Tile(64, 64, 4, 3),
    ),
    128: _Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 1), Tile(32, 64, 4, 2)),
    256: _Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}
# Of rows with so many summaries that most queries see little else.
MANY_SUMMARIES = 1024
_HOPPER_FAR = {
    64: _HOPPER[64]._replace(forward=Tile(64, 64, 4, 3, 128), queries=Tile(64, 32, 4, 3)),
}
_OTHERS = {
    16: _Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    32: _Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    64: _Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    128: _Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    256: _Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}
_FLOAT32 = {
    16: _Tiles(*(Tile(32, 32, 4, 1),) * 4),
    32: _Tiles(*(Tile(32, 32, 4, 1),) * 4),
    64: _Tiles(*(Tile(32, 16, 4, 1),) * 4),
    128: _Tiles(*(Tile(16, 16, 4, 1),) * 4),
    256: _Tiles(*(Tile(16, 16, 8, 1),) * 4),
}
# Whole chunks of 16 tokens at a time are fastest, but spill with Triton 3.7.
_TOKENS = 16 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 4
_SUMMARY = {
    16: SummaryTile(16, 32, 4),
    32: SummaryTile(16, 8, 4),
    64: SummaryTile(16, _TOKENS, 4),
    128: SummaryTile(16, _TOKENS, 8),
    256: SummaryTile(16, 1, 8),
}


def tile_of(
    kernel: Kernel, dtype: torch.dtype, block_d: int, capability: int, num_summaries: int
) -> Tile:
    """The tile of an attention kernel.

    Args:
        kernel: which one.
        dtype: of the inputs.
        block_d: head dim, padded to a power of 2.
        capability: major compute capability of the GPU, such as 9.
        num_summaries: of a row.
    """
    table = _FLOAT32 if dtype == torch.float32 else _HOPPER if capability == 9 else _OTHERS
    if table is _HOPPER and num_summaries >= MANY_SUMMARIES:
        table = _HOPPER | _HOPPER_FAR
    tile: Tile = getattr(table[block_d], kernel)
    return tile


def summary_tile_of(block_d: int, pooled: bool) -> SummaryTile:
    """The tile of both summary kernels; `block_d` as for `tile_of`."""
    tile = _SUMMARY[block_d]
    return tile._replace(block_c=tile.block_c // 4) if pooled else tile
