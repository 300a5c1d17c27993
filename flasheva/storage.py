"""How caches store keys, values and summaries: as they are, or rounded to float8_e4m3fn.

float8 saturates: in e4m3fn, which has no infinities, what overflows would become NaN. PyTorch
neither gathers nor scatters float8, so bytes are moved in its place.

Dims: B batch, G key/value heads, N entries, L of which are read or written, D head dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max  # 448


def storage_dtype(
    cache_dtype: str | torch.dtype | None, dtype: torch.dtype, device: torch.device | str
) -> torch.dtype:
    """What the cache of a model of this `dtype` stores; None: the same.

    Raises:
        ValueError: neither float8_e4m3fn nor the dtype of the model, or a GPU without float8.
    """
    if cache_dtype is None:
        return dtype
    found = getattr(torch, cache_dtype, None) if isinstance(cache_dtype, str) else cache_dtype
    if found not in (FLOAT8, dtype):
        own = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"cache_dtype must be float8_e4m3fn or the model's {own}, not {cache_dtype!r}"
        )
    if found == FLOAT8 and torch.device(device).type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):  # Triton has no float8_e4m3fn there
            raise ValueError(
                "cache_dtype float8_e4m3fn needs compute capability 8.9 or later, not "
                f"{capability[0]}.{capability[1]}; leave cache_dtype out"
            )
    return found


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a cache of `dtype` stores it."""
    return (x.clamp(-_LARGEST, _LARGEST) if dtype == FLOAT8 else x).to(dtype)


def gather(source: Tensor, index: Tensor) -> Tensor:
    """[B, G, N, D] at int [B, L] along N: [B, G, L, D]."""
    found = _bytes(source).gather(2, _index(index, source))
    return found.view(FLOAT8) if source.dtype == FLOAT8 else found


def readable(sinks: Tensor, ring: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    """[B, G, S + L + T, D] in the dtype of `new`.

    Args:
        sinks: [B, G, S, D].
        ring: [B, G, N, D].
        slot: int [B, L], entries of the ring in order.
        new: [B, G, T, D].
    """
    make = _readable_op if _is_traced_inference() else _readable
    return make(sinks, ring, slot, new)


def scatter_(target: Tensor, index: Tensor, x: Tensor) -> None:
    """Stores x [B, G, L, D] at int [B, L] along N of [B, G, N, D]."""
    write = _scatter_op if _is_traced_inference() else _scatter_
    write(target, index, stored(x, target.dtype))


def replace_(target: Tensor, where: Tensor, x: Tensor, *, after: Tensor) -> None:
    """Stores x in place of `target` [B, G, N, D] at bool [B, N].

    `after` is what was computed before, from the old `target` perhaps, and is read later.
    """
    write = _replace_op if _is_traced_inference() else _replace_
    write(target, where, stored(x, target.dtype), after)


def _is_traced_inference() -> bool:
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _readable(sinks: Tensor, ring: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    return torch.cat([sinks.to(new.dtype), gather(ring, slot).to(new.dtype), new], dim=2)


def _scatter_(target: Tensor, index: Tensor, x: Tensor) -> None:
    _bytes(target).scatter_(2, _index(index, target), _bytes(x))


def _replace_(target: Tensor, where: Tensor, x: Tensor, after: Tensor) -> None:
    old = _bytes(target)
    old.copy_(torch.where(rows(where), _bytes(x), old))


# These are ops because of what torch.compile does with plain code. It makes a new tensor of what a
# graph writes in place, and copies all of them back at its end: a second cache. It moves reads of
# the old content behind a write, which then needs a copy; and writes to the end of the graph, and
# what depends on the cache alone to its beginning, where the tensors of all layers are in memory
# together. So `replace_` says that it reads and writes `after`, and `readable` needs `new`.
# They have no backward: with gradients plain code runs. Where our kernels do not run, a piece of a
# prompt calls nine of them a layer, and a call takes 28 microseconds of the host so defined, 78 by
# `torch.library.custom_op`.
_library = torch.library.Library("flasheva", "FRAGMENT")


def _define(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> OpOverload:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flasheva::{name}", fake, lib=_library)
    return getattr(torch.ops.flasheva, name).default


def _nothing(*args: Tensor) -> None:
    """What writes in place gives."""


def _fake_readable(sinks: Tensor, ring: Tensor, slot: Tensor, new: Tensor) -> Tensor:
    B, G, T, D = new.shape
    return new.new_empty(B, G, sinks.shape[2] + slot.shape[1] + T, D)


_scatter_op = _define(
    "scatter_(Tensor(a!) target, Tensor index, Tensor x) -> ()", _scatter_, _nothing
)
_replace_op = _define(
    "replace_(Tensor(a!) target, Tensor where, Tensor x, Tensor(b!) after) -> ()",
    _replace_,
    _nothing,
)
_readable_op = _define(
    "readable(Tensor sinks, Tensor ring, Tensor slot, Tensor new) -> Tensor",
    _readable,
    _fake_readable,
)


def rows(x: Tensor) -> Tensor:
    """[B, L] to [B, 1, L, 1]."""
    return x[:, None, :, None]


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == FLOAT8 else x


def _index(index: Tensor, source: Tensor) -> Tensor:
    return rows(index).expand(-1, source.shape[1], -1, source.shape[3])
