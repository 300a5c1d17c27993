"""Random inputs for tests of the attention."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from flasheva import AffineMap, AffineMaps, EvaConfig, PooledMaps, SummaryMaps


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    maps: SummaryMaps
    bias: Tensor
    seq_start: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """Everything differentiable, by name."""
        return {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias} | map_tensors(self.maps)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Inputs":
        def move(x: Tensor) -> Tensor:
            return x.detach().to(device=device, dtype=dtype)

        # Parameters stay in full precision, as the master weights of a model do.
        wide = torch.promote_types(dtype, torch.float32)

        def move_wide(x: Tensor) -> Tensor:
            return x.detach().to(device=device, dtype=wide)

        return Inputs(
            move(self.q),
            move(self.k),
            move(self.v),
            rebuild(self.maps, move_wide),
            move_wide(self.bias),
            None if self.seq_start is None else self.seq_start.to(device),
        )

    def requires_grad(self) -> "Inputs":
        for tensor in self.tensors().values():
            tensor.requires_grad_()
        return self


def map_tensors(maps: SummaryMaps) -> dict[str, Tensor]:
    if isinstance(maps, PooledMaps):
        return {"mu": maps.mu, "phi": maps.phi}
    return {
        f"{side}.{name}": tensor
        for side, affine in maps._asdict().items()
        for name, tensor in affine._asdict().items()
        if tensor is not None
    }


def rebuild(maps: SummaryMaps, change) -> SummaryMaps:
    def affine(old):
        return AffineMap(*(None if x is None else change(x) for x in old))

    if isinstance(maps, PooledMaps):
        return PooledMaps(change(maps.mu), change(maps.phi))
    return AffineMaps(affine(maps.q), affine(maps.k))


def make(
    config: EvaConfig,
    *,
    B: int = 2,
    H: int = 4,
    G: int = 2,
    D: int = 16,
    T: int,
    packed: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """q, k, v [B, heads, T, D] of unit variance, maps near the identity, a bias of size 1."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def affine() -> AffineMap:
        norm = (1 + 0.3 * randn(D), 0.3 * randn(D)) if config.summary_map == "layernorm" else ()
        return AffineMap(torch.eye(D) + randn(D, D) * 0.3 / D**0.5, 0.3 * randn(D), *norm)

    maps: SummaryMaps
    if config.summary_map == "pooled":
        maps = PooledMaps(randn(G, D), randn(G, D))
    else:
        maps = AffineMaps(affine(), affine())
    seq_start = packed_documents(config, B, T, seed) if packed else None
    inputs = Inputs(
        randn(B, H, T, D), randn(B, G, T, D), randn(B, G, T, D), maps, randn(H), seq_start
    )
    return inputs.to(dtype)


def packed_documents(config: EvaConfig, B: int, T: int, seed: int) -> Tensor:
    """int32 [B, T]: documents of random lengths that start on multiples of the chunk size."""
    rng = random.Random(seed)
    out = torch.zeros(B, T, dtype=torch.int32)
    for row in out:
        start = 0
        while start < T:
            row[start:] = start
            start += config.chunk_size * rng.randint(
                1, 4 * config.window_size // config.chunk_size
            )
    return out
