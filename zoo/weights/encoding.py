"""How an adapter keeps one tensor: whole, or what differs from the base, of low rank or quantised.

- whole: the tensor as it is; the base has none, or its own is not used.
- low_rank: W = W_base + scale * B A, with A [rank, in] and B [out, rank].
- quantised: W = W_base + D, with D in int8 or int4 (packing.py).

Sums are computed in float32 (float64 if the base is) and not rounded: whoever loads them casts
once. Parts of a tensor NAME are stored as NAME, NAME.a and NAME.b, or NAME.difference.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Self, TypeVar, get_args

import torch
from torch import Tensor

from zoo.weights.packing import INTEGERS, STORED, Layout, Stored, layout, pack, unpack

Kind = Literal["whole", "low_rank", "quantised"]

_Part = TypeVar("_Part")

_TEXTS = "whole, low_rank:RANK, low_rank:RANK:STORED (float32, bfloat16, float16, int8, int4), "
_TEXTS += "int8 or int4"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What to make of a matrix.

    Attributes:
        kind: "whole", "low_rank" or "quantised".
        stored: what the numbers are stored as; None: as the tensor is (whole only).
        rank: of low_rank; 0 for the others.
    """

    kind: Kind
    stored: Stored | None = None
    rank: int = 0

    def __str__(self) -> str:
        if self.kind == "low_rank":
            return f"low_rank:{self.rank}:{self.stored}"
        return self.kind if self.stored is None else self.stored

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "whole", "low_rank:16" (float16), "low_rank:16:int8", "int8" or "int4".

        Raises:
            ValueError: anything else.
        """
        kind, *rest = text.split(":")
        if kind == "whole" and not rest:
            return cls(kind="whole")
        if kind in INTEGERS and not rest:
            return cls(kind="quantised", stored=_stored(kind))
        if kind == "low_rank" and 1 <= len(rest) <= 2 and rest[0].isdecimal() and int(rest[0]) > 0:
            name = rest[1] if len(rest) == 2 else "float16"
            if name in STORED and name != "float64":
                return cls(kind="low_rank", stored=_stored(name), rank=int(rest[0]))
        raise ValueError(f"an encoding must be {_TEXTS}, not {text!r}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What adapter_config.json says of a tensor.

    Attributes:
        encoding: see the module.
        shape: of the tensor itself.
        stored: what its parts are stored as.
        rank, scale: of low_rank.
    """

    encoding: Kind
    shape: tuple[int, ...]
    stored: Stored
    rank: int = 0
    scale: float = 1.0

    def parts(self) -> Layout:
        """What the file has for it, by the end of the name: dtypes and shapes."""
        if self.encoding == "whole":
            return layout(self.shape, self.stored)
        if self.encoding == "quantised":
            return _named(".difference", layout(self.shape, self.stored))
        out, in_ = self.shape
        return _named(".a", layout((self.rank, in_), self.stored)) | _named(
            ".b", layout((out, self.rank), self.stored)
        )

    def to_json(self) -> dict[str, object]:
        """The inverse of `from_json`."""
        fields: dict[str, object] = {
            "encoding": self.encoding,
            "shape": list(self.shape),
            "stored": self.stored,
        }
        if self.encoding == "low_rank":
            fields |= {"rank": self.rank, "scale": self.scale}
        return fields

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Raises ValueError that says which field is wrong; unknown fields are wrong too."""
        if not isinstance(value, Mapping):
            raise ValueError(f"must be an object, not {value!r}")
        fields = dict(value)
        kind, shape, stored = (fields.pop(name, None) for name in ("encoding", "shape", "stored"))
        for known in get_args(Kind):
            if kind == known:
                break
        else:
            raise ValueError(f"encoding must be one of {', '.join(get_args(Kind))}, not {kind!r}")
        if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
            raise ValueError(f"shape must be a list of positive integers, not {shape!r}")
        fits = INTEGERS if kind == "quantised" else STORED
        if stored not in fits or (kind == "whole" and stored in INTEGERS):
            raise ValueError(f"stored does not fit {kind}: {stored!r}")
        rank, scale = 0, 1.0
        if kind == "low_rank":
            rank, scale = fields.pop("rank", None), fields.pop("scale", None)
            if len(shape) != 2:
                raise ValueError(f"shape of low_rank must be [out, in], not {shape!r}")
            if not _is_size(rank):
                raise ValueError(f"rank must be a positive integer, not {rank!r}")
            if not isinstance(scale, int | float) or not math.isfinite(scale):
                raise ValueError(f"scale must be a number, not {scale!r}")
        if fields:
            raise ValueError(f"unknown field {min(fields)!r}")
        return cls(
            encoding=known, shape=tuple(shape), stored=_stored(stored), rank=rank, scale=scale
        )


@dataclass(frozen=True, kw_only=True)
class Factors:
    """W_base + scale * b a, as LoRA trains it: a [rank, in], b [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Encoded:
    """An entry and its parts, by the end of their names."""

    entry: Entry
    parts: dict[str, Tensor]


def plan(shape: tuple[int, ...], encoding: Encoding, dtype: torch.dtype) -> Entry:
    """The entry of a tensor of this shape and dtype, but for its scale: enough to know sizes."""
    stored = encoding.stored or _stored(str(dtype).removeprefix("torch."))
    if encoding.kind != "low_rank":
        return Entry(encoding=encoding.kind, shape=shape, stored=stored)
    rank = min(encoding.rank, *shape)
    return Entry(encoding="low_rank", shape=shape, stored=stored, rank=rank)


def encode_whole(tensor: Tensor) -> Encoded:
    """Keeps a tensor bit for bit."""
    entry = plan(tuple(tensor.shape), Encoding(kind="whole"), tensor.dtype)
    return Encoded(entry, pack(tensor, entry.stored))


def encode_factors(factors: Factors) -> Encoded:
    """Keeps factors bit for bit, both in the wider one's dtype."""
    wide = torch.promote_types(factors.a.dtype, factors.b.dtype)
    stored = _stored(str(wide).removeprefix("torch."))
    shape = (factors.b.shape[0], factors.a.shape[1])
    entry = Entry(
        encoding="low_rank", shape=shape, stored=stored, rank=len(factors.a), scale=factors.scale
    )
    a, b = pack(factors.a, stored), pack(factors.b, stored)
    return Encoded(entry, _named(".a", a) | _named(".b", b))


def encode_difference(
    tensor: Tensor, base: Tensor, encoding: Encoding, vectors: Tensor | None = None
) -> Encoded:
    """Keeps a tensor by what differs from the base's, or whole.

    Args:
        tensor, base: of one shape, [out, in] for low_rank.
        encoding: a rank above that of any such matrix means all of it.
        vectors: `singular_vectors(tensor, base)`, for whoever tries several ranks.

    Raises:
        ValueError: values that are not finite.
    """
    if encoding.kind == "whole":
        return encode_whole(tensor)
    entry = plan(tuple(tensor.shape), encoding, tensor.dtype)
    difference = tensor.double() - base.double()
    if entry.encoding == "quantised":
        return Encoded(entry, _named(".difference", pack(difference, entry.stored)))
    if vectors is None:
        vectors = singular_vectors(tensor, base)
    factors = _truncated(difference, vectors[:, : entry.rank])
    a, b = pack(factors.a, entry.stored), pack(factors.b, entry.stored)
    entry = Entry(
        encoding="low_rank",
        shape=entry.shape,
        stored=entry.stored,
        rank=entry.rank,
        scale=factors.scale,
    )
    return Encoded(entry, _named(".a", a) | _named(".b", b))


def decode(entry: Entry, part: Callable[[str], Tensor], base: Callable[[], Tensor]) -> Tensor:
    """The tensor.

    Args:
        entry: what it is.
        part: gives its parts by the end of their names.
        base: gives the base's tensor, if it is needed.

    Returns:
        `entry.shape`: whole tensors in their own dtype, others in float32 or wider.
    """

    def array(name: str, shape: tuple[int, ...]) -> Tensor:
        ends = layout(shape, entry.stored)
        return unpack({end: part(name + end) for end in ends}, shape, entry.stored)

    if entry.encoding == "whole":
        return array("", entry.shape)
    weight = base()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if entry.encoding == "quantised":
        return weight + array(".difference", entry.shape)
    out, in_ = entry.shape
    a, b = array(".a", (entry.rank, in_)), array(".b", (out, entry.rank))
    wide = torch.promote_types(weight.dtype, torch.promote_types(a.dtype, torch.float32))
    return weight.to(wide) + entry.scale * (b.to(wide) @ a.to(wide))


def singular_vectors(tensor: Tensor, base: Tensor) -> Tensor:
    """Those of the shorter side of the difference, float64 [n, n], the largest first.

    They are eigenvectors of a small square matrix, which is faster than a decomposition of the
    whole, and in float64 precise enough: D V V^T is D for any orthogonal V.

    Raises:
        ValueError: values that are not finite.
    """
    difference = tensor.double() - base.double()
    out, in_ = difference.shape
    gram = difference.T @ difference if out >= in_ else difference @ difference.T
    if not torch.isfinite(gram).all():
        raise ValueError("values that are not finite")
    return torch.linalg.eigh(gram).eigenvectors.flip(1)


def _truncated(difference: Tensor, vectors: Tensor) -> Factors:
    """The nearest matrix that some singular vectors span.

    Columns of b have norm 1, the largest number of a is at most 1.
    """
    out, in_ = difference.shape
    if out >= in_:
        a, b = vectors.T, difference @ vectors
    else:
        a, b = vectors.T @ difference, vectors
    norms = torch.linalg.vector_norm(b, dim=0)
    b, a = b / torch.where(norms == 0, 1, norms), a * norms[:, None]
    largest = float(a.abs().max())
    # A power of two changes no digit, and keeps small numbers out of float16's denormal ones.
    scale = 2.0 ** math.ceil(math.log2(largest)) if 0 < largest < math.inf else 1.0
    return Factors(a=a / scale, b=b, scale=scale)


def _named(end: str, parts: dict[str, _Part]) -> dict[str, _Part]:
    return {end + rest: part for rest, part in parts.items()}


def _stored(name: object) -> Stored:
    for known in get_args(Stored):
        if name == known:
            stored: Stored = known
            return stored
    raise ValueError(f"tensors are stored as {', '.join(STORED)}, not {name!r}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
