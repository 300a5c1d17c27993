"""AliveBytes: counts the bytes that PyTorch's operators allocate, and how many are alive at once.

It sees tensors on the meta device as well as real ones; what kernels allocate for themselves it
does not see.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# PyTorch's allocator for CUDA asks the driver for large tensors one by one.
_LARGE, _LARGE_UNIT, _UNIT = 10 * 2**20, 2 * 2**20, 512


def rounded(nbytes: int) -> int:
    """What a tensor of so many bytes takes from the memory of a GPU."""
    unit = _LARGE_UNIT if nbytes >= _LARGE else _UNIT
    return -(-nbytes // unit) * unit


class AliveBytes(TorchDispatchMode):
    """A context in which new tensors are counted. Use it under `torch.no_grad`.

    (Under `torch.inference_mode` operators made of others are not seen as their parts.)

    Attributes:
        now: bytes of the tensors made here that are alive.
        peak: the most that `now` has been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        known = set(map(id, _storages((args, kwargs))))  # of which results may be views
        new = {id(found): found for found in _storages(result) if id(found) not in known}
        for storage in new.values():
            self._count(storage)
        if getattr(func, "overloadpacket", None) is torch.ops.aten.sort:
            # On a GPU: keys and indices, each read from one buffer and written to another.
            scratch = 2 * sum(rounded(storage.nbytes()) for storage in new.values())
            self.peak = max(self.peak, self.now + scratch)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        nbytes = rounded(storage.nbytes())
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, nbytes)

    def _forget(self, nbytes: int) -> None:
        self.now -= nbytes


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]
