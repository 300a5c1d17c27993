"""What all ops do with their arguments before a kernel reads them."""

import functools

import torch
from torch import Tensor

from flasheva.summary import AffineMaps, PooledMaps, SummaryMaps


def alike(*tensors: Tensor) -> list[Tensor]:
    """In one dtype that holds them all: autocast leaves q and k in float32 after RoPE."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(dtype) for x in tensors]


def read_maps(maps: SummaryMaps | None, k: Tensor) -> tuple[str, list[Tensor]]:
    """The kind of map and its tensors, as `flatten`, which must fit k [B, G, T, D]."""
    kind, tensors = flatten(maps)
    check_maps(kind, tensors, k.shape[1], k.shape[3])
    return kind, tensors


def flatten(maps: SummaryMaps | None) -> tuple[str, list[Tensor]]:
    """The kind of map, and [w_q, b_q, w_k, b_k(, g_q, s_q, g_k, s_k)], [phi, mu] or []."""
    if maps is None:
        return "none", []
    if isinstance(maps, PooledMaps):
        return "pooled", [maps.phi, maps.mu]
    assert isinstance(maps, AffineMaps)
    tensors = [maps.q.weight, maps.q.bias, maps.k.weight, maps.k.bias]
    norms = (maps.q.norm_weight, maps.q.norm_bias, maps.k.norm_weight, maps.k.norm_bias)
    if all(x is None for x in norms):
        return "linear", tensors
    return "layernorm", tensors + [x for x in norms if x is not None]


def check_maps(kind: str, tensors: list[Tensor], G: int, D: int) -> None:
    """Kernels read parameters by pointer: nothing is broadcast."""
    shapes = [(D, D), (D,)] * 2 + [(D,)] * 4
    if kind == "pooled":
        shapes = [(G, D)] * 2
    expected = shapes[: {"none": 0, "linear": 4}.get(kind, len(shapes))]
    found = [tuple(x.shape) for x in tensors]
    if found != expected:
        raise ValueError(f"impl='triton' needs {kind} maps of shapes {expected}, not {found}")


def sizes(x: Tensor) -> tuple[int, int, int, int]:
    """The shape of a [B, heads, T, D]."""
    B, heads, T, D = x.shape
    return B, heads, T, D


def rows_apart(x: Tensor) -> Tensor:
    """x with the D entries of a row side by side; a copy only if they are not."""
    # Not contiguous(): where a dim has one entry, that may keep the stride.
    return x if x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


def int32(x: Tensor | None) -> Tensor | None:
    """Positions as kernels read them."""
    return None if x is None else x.to(torch.int32).contiguous()
