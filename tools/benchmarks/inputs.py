"""make_inputs: seeded tensors for one attention call, laid out as a model's projections give them.

Dims: B batch, H query heads, G key/value heads, T tokens, D head dim, P chunk size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flasheva import AffineMap, AffineMaps


class Shape(NamedTuple):
    """Of one attention call."""

    B: int
    H: int
    G: int
    T: int
    D: int

    @classmethod
    def parse(cls, text: str, kv_heads: int | None = None) -> "Shape":
        """Reads "B,H,T,D"; `kv_heads` is G, by default H.

        Raises:
            ValueError: not four positive numbers, or a G that does not divide H.
        """
        words = [word.strip() for word in text.split(",")]
        if len(words) != 4 or not all(word.isdecimal() and int(word) for word in words):
            raise ValueError(
                f"a shape is four positive numbers B,H,T,D such as 4,12,8192,64, not {text!r}"
            )
        B, H, T, D = map(int, words)
        G = H if kv_heads is None else kv_heads
        if G < 1 or H % G:
            raise ValueError(f"the number of key/value heads must divide {H}, not be {G}")
        return cls(B, H, G, T, D)

    def __str__(self) -> str:
        return f"{self.B},{self.H},{self.T},{self.D}"


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradient `do` [B, H, T, D] that its output gets.

    q is [B, H, T, D]; k and v are [B, G, T, D]; the bias is [H], or None for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    maps: AffineMaps
    bias: Tensor | None
    do: Tensor

    def differentiable(self) -> dict[str, Tensor]:
        """Every tensor that gets a gradient, by name."""
        return {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            **({} if self.bias is None else {"bias": self.bias}),
            "q_map.weight": self.maps.q.weight,
            "q_map.bias": self.maps.q.bias,
            "k_map.weight": self.maps.k.weight,
            "k_map.bias": self.maps.k.bias,
        }

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with `change` of every tensor."""
        q_map, k_map = (AffineMap(change(f.weight), change(f.bias)) for f in self.maps)
        return Inputs(
            change(self.q),
            change(self.k),
            change(self.v),
            AffineMaps(q_map, k_map),
            None if self.bias is None else change(self.bias),
            change(self.do),
        )

    def to(self, dtype: torch.dtype) -> "Inputs":
        """A copy of every tensor in `dtype`."""
        return self.apply(lambda x: x.detach().to(dtype))

    def leaves(self) -> "Inputs":
        """The same memory, as tensors that require gradients."""
        fresh = self.apply(Tensor.detach)
        for tensor in fresh.differentiable().values():
            tensor.requires_grad_()
        return fresh


def make_inputs(
    shape: Shape,
    chunk_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool,
    seed: int = 0,
) -> Inputs:
    """Normally distributed q, k, v, do; maps near the identity; with a bias, 0.5 log P as usual.

    Everything is in `dtype`, parameters included, as in a model that was converted to it. q, k, v
    and do are transposed views of [B, T, heads, D].
    """
    B, H, G, T, D = shape
    rng = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=dtype, device=device)

    def affine() -> AffineMap:
        eye = torch.eye(D, dtype=dtype, device=device)
        return AffineMap(eye + 0.02 * randn(D, D), 0.02 * randn(D))

    q, k, v, do = (randn(B, T, heads, D).transpose(1, 2) for heads in (H, G, G, H))
    maps = AffineMaps(affine(), affine())
    if not bias:
        return Inputs(q, k, v, maps, None, do)
    usual = torch.full((H,), 0.5 * math.log(chunk_size), dtype=dtype, device=device)
    return Inputs(q, k, v, maps, usual, do)
