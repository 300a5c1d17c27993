"""Rotary embeddings turn pairs of dims by the angles of the paper, and leave the rest alone."""

import pytest
import torch

from layers import RopeConfig, apply_rotary, rotary_angles


@pytest.mark.parametrize(
    ("D", "factor", "dim"), [(16, 1.0, 16), (64, 0.25, 16), (20, 0.4, 8), (20, 0.25, 6)]
)
def test_pairs_of_dims_are_turned(D, factor, dim):
    """Of an odd number of dims (5 of 20) one more is turned, as transformers does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, D, dtype=torch.float64, generator=generator)
    positions = torch.randint(1000, (2, 7), generator=generator)
    config = RopeConfig(partial_rotary_factor=factor)
    out = apply_rotary(x, rotary_angles(config, positions, D, torch.float64))
    half = dim // 2
    frequency = 10000.0 ** (-2 * torch.arange(half).double() / int(D * factor))
    angle = (positions.double()[..., None] * frequency)[:, None]
    pairs = torch.complex(x[..., :half], x[..., half:dim]) * torch.polar(
        torch.ones_like(angle), angle
    )
    expected = torch.cat([pairs.real, pairs.imag, x[..., dim:]], -1)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
