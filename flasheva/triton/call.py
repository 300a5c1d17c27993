"""Call: the sizes, the rule and the tiles that a call gives its kernels; how it launches them."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import JITFunction

from flasheva.triton.tiles import Kernel, SummaryTile, Tile, summary_tile_of, tile_of

_SINK_TILE = 64  # sinks at a time


class Maps(NamedTuple):
    """Parameters as kernels take them: of pooled maps w_q is phi [G, D] and w_k is mu."""

    w_q: Tensor | None = None
    b_q: Tensor | None = None
    w_k: Tensor | None = None
    b_k: Tensor | None = None
    g_q: Tensor | None = None
    s_q: Tensor | None = None
    g_k: Tensor | None = None
    s_k: Tensor | None = None

    @staticmethod
    def of(kind: str, tensors: list[Tensor]) -> "Maps":
        """Of what `arguments.flatten` gives."""
        tensors = [x.contiguous() for x in tensors]
        if kind == "pooled":
            return Maps(w_q=tensors[0], w_k=tensors[1])
        return Maps(*tensors)


@dataclass(frozen=True)
class Call:
    """What every kernel of one call is specialised for, and how kernels are launched.

    Attributes:
        B, H, G, T, D: sizes, see ops.py.
        W, P, S, sliding: of the rule: window, chunk, sinks.
        packed: whether rows hold several documents.
        dtype, capability: of the inputs; of the GPU (major), 0 in the interpreter.
        chosen: tiles by kernel, "summary" for both summary kernels; others are those of tiles.py.
    """

    B: int
    H: int
    G: int
    T: int
    D: int
    W: int
    P: int
    S: int
    sliding: bool
    packed: bool
    dtype: torch.dtype
    capability: int
    chosen: Mapping[str, Tile | SummaryTile] = field(default_factory=dict)

    @property
    def C(self) -> int:
        """Chunks whose summary some query may see; those of the last window are nobody's."""
        return num_summaries(self.T, self.W, self.P, self.sliding, self.packed)

    @property
    def block_d(self) -> int:
        return max(16, power_of_2(self.D))

    @property
    def scale(self) -> float:
        """Of logits, in units of log 2."""
        return float(self.D**-0.5 * math.log2(math.e))

    @property
    def precision(self) -> str:
        return "ieee" if self.dtype == torch.float32 else "tf32"

    @property
    def map_precision(self) -> str:
        """Of the products of the maps: errors of at most a quarter of a rounding of the inputs."""
        by_dtype = {torch.float32: "ieee", torch.float16: "tf32x3", torch.bfloat16: "tf32"}
        return by_dtype[self.dtype]

    @property
    def rule(self) -> dict[str, Any]:
        return {"W": self.W, "P": self.P, "S": self.S, "SLIDING": self.sliding}

    def tile(self, kernel: Kernel) -> Tile:
        tile = self.chosen.get(kernel)
        if not isinstance(tile, Tile):
            tile = tile_of(kernel, self.dtype, self.block_d, self.capability, self.C)
        if kernel in ("forward", "queries"):
            # The rule of sinks wants tiles of queries no larger than a window.
            most = 1 << (self.W.bit_length() - 1)
            tile = tile._replace(block_m=min(tile.block_m, most))
        return tile

    def summary_tile(self, kind: str) -> SummaryTile:
        tile = self.chosen.get("summary")
        if not isinstance(tile, SummaryTile):
            tile = summary_tile_of(self.block_d, kind == "pooled")
        return tile._replace(tokens=min(tile.tokens, power_of_2(self.P)))

    def of_summaries(self, kind: str) -> dict[str, Any]:
        """What both summary kernels are compiled for; `kind` of maps."""
        tile = self.summary_tile(kind)
        return {
            "G": self.G,
            "R": self.H // self.G,
            "D": self.D,
            "P": self.P,
            "MAP": kind,
            "PRECISION": self.map_precision,
            "BLOCK_D": self.block_d,
            "BLOCK_K": self.map_part,
            "BLOCK_P": power_of_2(self.P),
            "SLICE": tile.tokens,
            "BLOCK_C": tile.block_c,
            "num_warps": tile.num_warps,
        }

    def chunks_of(self, tokens: int) -> int:
        """Chunks that a tile of tokens may touch, as the size of a matrix product."""
        whole = tokens % self.P == 0  # tiles begin at multiples of their size
        most = tokens // self.P if whole else ceil_div(tokens - 1, self.P) + 1
        return max(16, power_of_2(most))

    @property
    def sink_tile(self) -> int:
        most = _SINK_TILE if self.block_d <= 128 else 16
        return min(most, max(16, power_of_2(self.S)))

    @property
    def map_part(self) -> int:
        """Rows of a map that a program takes at a time."""
        return self.block_d if self.block_d <= 128 else 32

    @staticmethod
    def launch(
        kernel: JITFunction, grid: tuple[int, ...], *args: object, **options: object
    ) -> None:
        """On the GPU of the first argument; nothing for an empty grid."""
        if 0 not in grid:
            with torch.cuda.device_of(args[0]):  # Triton launches on the current device
                kernel[grid](*args, **options)


def num_summaries(T: int, W: int, P: int, sliding: bool, packed: bool) -> int:
    """C of rows of T tokens; the last query's window begins C * P tokens into its row."""
    if sliding:
        return torch.sym_max(T - W, 0) // P
    if packed:  # blocks are counted from where a document starts
        return T // P
    return torch.sym_max(T - 1, 0) // W * W // P


def call_of(
    q: Tensor, k: Tensor, seq_start: Tensor | None, W: int, P: int, S: int, window: str
) -> Call:
    """For q [B, H, T, D], k [B, G, N, D] and a rule; `seq_start` says whether rows are packed."""
    B, H, T, D = q.shape
    sliding, packed = window == "sliding", seq_start is not None
    static = (sliding, packed, q.dtype, capability_of(q.device))
    return Call(B, H, k.shape[1], T, D, W, P, S, *static)


@functools.cache
def capability_of(device: torch.device) -> int:
    """The major compute capability; 0 in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


# Triton's own cdiv and next_power_of_2 cost ten microseconds a call.
def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def power_of_2(x: int) -> int:
    """The least power of 2 that is not below x."""
    return 1 << max(x - 1, 0).bit_length()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of the first three dims; the entries of the last one lie side by side."""
    assert x.stride(3) == 1
    return x.stride(0), x.stride(1), x.stride(2)


def like_projection(B: int, heads: int, T: int, D: int, like: Tensor) -> Tensor:
    """[B, heads, T, D], in memory [B, T, heads, D]: the output projection needs no copy."""
    return torch.empty((B, T, heads, D), dtype=like.dtype, device=like.device).transpose(1, 2)
