"""How an adapter keeps numbers: integers in groups, and the best factors of a rank."""

import math

import pytest
import torch
from torch import Tensor

from zoo.weights.encoding import Encoding, Entry, decode, encode_difference, plan
from zoo.weights.packing import GROUP, INTEGERS, Stored, layout, pack, unpack

LARGEST = {"int8": 127, "int4": 7}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of very different sizes from group to group."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * torch.logspace(-8, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))


def scales(values: Tensor, stored: str) -> Tensor:
    """By value: the smallest bfloat16 that is no smaller than the largest of the group / 127."""
    found = []
    for group in values.flatten().split(GROUP):
        exact = float(group.abs().max()) / LARGEST[stored]
        scale = torch.tensor(exact).bfloat16()
        if float(scale) < exact:
            scale = torch.nextafter(scale, torch.tensor(math.inf).bfloat16())
        found += [float(scale)] * len(group)
    return torch.tensor(found).view(values.shape)


@pytest.mark.parametrize("stored", INTEGERS)
@pytest.mark.parametrize("shape", [(1,), (63,), (2, 32), (65,), (7, 33), (3, 128)], ids=str)
def test_integers_err_by_half_a_step_at_most(shape: tuple[int, ...], stored: Stored) -> None:
    values = noise(*shape)
    parts = pack(values, stored)
    assert {end: (part.dtype, tuple(part.shape)) for end, part in parts.items()} == layout(
        shape, stored
    )
    error = (unpack(parts, shape, stored) - values).abs()
    # The quotient and the product are rounded to float32, each by 2^-24 of 127 steps at most.
    assert (error <= scales(values, stored) * (0.5 + 2**-16)).all()


@pytest.mark.parametrize("stored", INTEGERS)
def test_zeros_and_multiples_of_a_step_are_exact(stored: Stored) -> None:
    assert torch.equal(unpack(pack(torch.zeros(70), stored), (70,), stored), torch.zeros(70))
    largest = LARGEST[stored]
    codes = torch.arange(-largest, largest + 1).split(GROUP - 1)
    steps = torch.cat([torch.cat((torch.tensor([largest]), part)) for part in codes]) * 2.0**-9
    assert torch.equal(unpack(pack(steps, stored), steps.shape, stored), steps)


def test_two_int4_share_a_byte_and_64_values_a_scale() -> None:
    assert layout((3, 5), "int4") == {
        "": (torch.uint8, (8,)),
        ".scales": (torch.bfloat16, (1,)),
    }
    assert layout((3, 64), "int8")[".scales"] == (torch.bfloat16, (3,))


def kept(values: Tensor, base: Tensor, encoding: str) -> tuple[Entry, Tensor]:
    encoded = encode_difference(values, base, Encoding.parse(encoding))
    found = {end: (part.dtype, tuple(part.shape)) for end, part in encoded.parts.items()}
    assert found == encoded.entry.parts()
    assert Entry.from_json(encoded.entry.to_json()) == encoded.entry
    return encoded.entry, decode(encoded.entry, encoded.parts.__getitem__, lambda: base)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)], ids=str)
@pytest.mark.parametrize("rank", [1, 5])
def test_no_matrix_of_that_rank_is_nearer_to_the_difference(
    shape: tuple[int, int], rank: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    base, change = torch.randn(2, *shape, generator=generator)
    entry, found = kept(base + 1e-3 * change, base, f"low_rank:{rank}:float32")
    assert (entry.rank, entry.shape) == (rank, shape)
    difference = (base + 1e-3 * change).double() - base.double()
    left = torch.linalg.svdvals(difference)[rank:].square().sum().sqrt()
    error = torch.linalg.vector_norm(found.double() - base.double() - difference)
    # `found` is rounded to float32 beside a base of size 4: 2^-23 a value.
    assert error <= left + 2**-23 * math.sqrt(difference.numel())


@pytest.mark.parametrize(
    ("stored", "step"), [("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_factors_lose_what_their_dtype_loses(stored: str, step: float) -> None:
    generator = torch.Generator().manual_seed(2)
    change = 1e-4 * torch.randn(24, 16, generator=generator)
    _, found = kept(change, torch.zeros_like(change), f"low_rank:16:{stored}")
    # Of each factor's numbers a step, in norm, and float16's denormal ones are scaled away.
    lost = torch.linalg.vector_norm(found - change) / torch.linalg.vector_norm(change)
    assert lost <= 2 * step


def test_float64_stays_float64() -> None:
    values = torch.ones(3, 4, dtype=torch.float64) / 3
    _, found = kept(values, torch.zeros_like(values), "whole")
    assert torch.equal(found, values)
    _, found = kept(values, torch.zeros_like(values), "low_rank:1")
    assert found.dtype == torch.float64


def test_a_rank_above_that_of_the_matrix_means_all_of_it() -> None:
    assert plan((3, 8), Encoding.parse("low_rank:99"), torch.float32).rank == 3


def test_a_matrix_that_is_its_base_is_kept_as_it_is() -> None:
    base = noise(5, 6)
    for encoding in ("low_rank:2", "int4"):
        assert torch.equal(kept(base, base, encoding)[1], base)


def test_values_that_float16_cannot_hold_are_scaled() -> None:
    values = 1e9 * torch.ones(3, 4)
    _, found = kept(values, torch.zeros_like(values), "low_rank:1")
    torch.testing.assert_close(found, values, rtol=2**-10, atol=0)


@pytest.mark.parametrize(
    "text", ["", "low", "low_rank", "low_rank:x", "low_rank:2:int2", "int8:3", "whole:1"]
)
def test_unknown_encodings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"an encoding must be whole, low_rank:RANK.*not '"):
        Encoding.parse(text)


@pytest.mark.parametrize("text", ["whole", "low_rank:16:float16", "low_rank:2:int8", "int4"])
def test_an_encoding_says_how_to_write_it(text: str) -> None:
    assert str(Encoding.parse(text)) == text
