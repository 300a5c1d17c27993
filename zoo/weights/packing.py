"""pack and unpack: arrays as an adapter's file stores them, as floats or as small integers.

Integers come in groups of 64 neighbours (in the order of memory; the last group may be shorter)
that share a scale: value = code * scale, code in [-127, 127] (int8) or [-7, 7] (int4). The scale
is the smallest bfloat16 that lets the largest value of its group in, so the error is at most half
a scale. Two int4 codes, each plus 8, share a byte, the first one in the low bits.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Stored = Literal["float64", "float32", "bfloat16", "float16", "int8", "int4"]
STORED: tuple[str, ...] = get_args(Stored)
INTEGERS = ("int8", "int4")
GROUP = 64

_LARGEST = {"int8": 127, "int4": 7}
_SCALES = ".scales"

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def layout(shape: tuple[int, ...], stored: Stored) -> Layout:
    """The parts that `pack` makes of an array, by the end of their names: dtypes and shapes."""
    if stored not in INTEGERS:
        return {"": (getattr(torch, stored), shape)}
    size = math.prod(shape)
    codes = (torch.int8, (size,)) if stored == "int8" else (torch.uint8, (-(-size // 2),))
    return {"": codes, _SCALES: (torch.bfloat16, (-(-size // GROUP),))}


def pack(values: Tensor, stored: Stored) -> dict[str, Tensor]:
    """The parts of an array of any float dtype; `layout` says their dtypes and shapes.

    Raises:
        ValueError: values that are not finite, or too large for `stored`.
    """
    if stored in INTEGERS:
        parts = _to_integers(values.float(), stored)
    else:
        parts = {"": values.to(getattr(torch, stored)).contiguous()}
    if not all(torch.isfinite(part).all() for part in (values, *parts.values())):
        raise ValueError(f"values that are not finite, or too large for {stored}")
    return parts


def unpack(parts: dict[str, Tensor], shape: tuple[int, ...], stored: Stored) -> Tensor:
    """The array of `shape`: float32 from integers, else in the dtype that it is stored in."""
    if stored not in INTEGERS:
        return parts[""]
    codes, size = parts[""], math.prod(shape)
    if stored == "int4":
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten()[:size].to(torch.int8) - 8
    scales = parts[_SCALES].float().repeat_interleave(GROUP)[:size]
    return (codes.float() * scales).view(shape)


def _to_integers(values: Tensor, stored: Stored) -> dict[str, Tensor]:
    size, largest = values.numel(), _LARGEST[stored]
    grouped = F.pad(values.flatten(), (0, -size % GROUP)).view(-1, GROUP)
    scales = _bfloat16_above(grouped.abs().amax(1) / largest)
    steps = torch.where(scales == 0, 1, scales.float())
    codes = (grouped / steps[:, None]).round().clamp(-largest, largest).to(torch.int8)
    if stored == "int8":
        return {"": codes.flatten()[:size].clone(), _SCALES: scales}
    nibbles = (codes.flatten() + 8).to(torch.uint8)
    packed = nibbles[0::2] | nibbles[1::2] << 4
    return {"": packed[: -(-size // 2)].clone(), _SCALES: scales}


def _bfloat16_above(values: Tensor) -> Tensor:
    """The smallest bfloat16 that is no smaller; values >= 0 in float32, of which it is a half."""
    bits = values.contiguous().view(torch.int32) + 0xFFFF
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)
