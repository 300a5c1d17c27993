"""ModelCache: the caches of all layers, and the one tensor of row lengths that they share."""

from collections.abc import Iterable
from typing import Protocol, Self

import torch
from torch import Tensor

from flasheva import EvaCache
from flasheva.storage import scatter_, storage_dtype


class KVCache:
    """A static cache of every key and value, for full attention.

    Args:
        batch_size, num_key_value_heads, head_dim: B, G, D.
        max_seq_len: tokens that a row can hold.
        dtype, device: of the keys and values that come.
        cache_dtype: what they are stored in: torch.float8_e4m3fn, or None: `dtype`.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_key_value_heads: int,
        head_dim: int,
        max_seq_len: int,
        dtype: torch.dtype,
        cache_dtype: str | torch.dtype | None = None,
        device: torch.device | str,
    ) -> None:
        self.dtype = dtype
        # At least one slot more than tokens, for the writes of padding; nobody sees it. A round
        # number keeps rows aligned for vector loads.
        slots = (max_seq_len // 16 + 1) * 16
        shape = (batch_size, num_key_value_heads, slots, head_dim)
        kept = storage_dtype(cache_dtype, dtype, device)
        self.k = torch.zeros(shape, dtype=kept, device=device)
        self.v = torch.zeros(shape, dtype=kept, device=device)
        # Scratch of the decode kernel, zeros between steps.
        self.arrived = torch.zeros(
            batch_size * num_key_value_heads, dtype=torch.int32, device=device
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All state, for counting bytes and for resetting."""
        return (self.k, self.v)

    def write(self, k: Tensor, v: Tensor, length: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new tokens [B, G, T, D] behind the `length` [B] cached ones; `count` are real.

        Returns:
            All keys and values [B, G, slots, D] for reading, the new ones exactly as they came.
        """
        new = torch.arange(k.shape[2], device=k.device)
        unread = self.k.shape[2] - 1
        slot = torch.where(new < count[:, None], length[:, None] + new, unread)
        scatter_(self.k, slot, k)
        scatter_(self.v, slot, v)
        if self.k.dtype == self.dtype:
            return self.k, self.v
        keys, values = self.k.to(self.dtype), self.v.to(self.dtype)
        scatter_(keys, slot, k)
        scatter_(values, slot, v)
        return keys, values


LayerCache = EvaCache | KVCache


class _HasCache(Protocol):
    def new_cache(
        self,
        *,
        batch_size: int,
        max_seq_len: int,
        max_rollback: int,
        dtype: torch.dtype,
        cache_dtype: str | torch.dtype | None,
        device: torch.device,
    ) -> LayerCache: ...


class ModelCache:
    """Everything that a model remembers of a batch of growing rows; made by `model.new_cache`.

    Attributes:
        layers: one cache per layer.
        length: int64 [B], tokens of each row so far, on the model's device.
        max_seq_len: tokens that a row can hold.
        max_rollback: tokens that `rollback` can take back.
    """

    def __init__(
        self, layers: list[LayerCache], length: Tensor, *, max_seq_len: int, max_rollback: int
    ) -> None:
        self.layers = layers
        self.length = length
        self.max_seq_len = max_seq_len
        self.max_rollback = max_rollback
        # How far each row can still go back: what was taken back is not there twice.
        self._can_go_back = torch.zeros_like(length)

    @classmethod
    def build(
        cls,
        attentions: Iterable[_HasCache],
        *,
        batch_size: int,
        max_seq_len: int,
        max_rollback: int,
        dtype: torch.dtype,
        cache_dtype: str | torch.dtype | None,
        device: torch.device,
    ) -> Self:
        """Allocates what each layer's attention asks for.

        Raises:
            ValueError: a size that is not positive, a negative `max_rollback`, or a `cache_dtype`
                that cannot be had.
        """
        for name, value in (("batch_size", batch_size), ("max_seq_len", max_seq_len)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if max_rollback < 0:
            raise ValueError(f"max_rollback must be at least 0, not {max_rollback}")
        layers = [
            attention.new_cache(
                batch_size=batch_size,
                max_seq_len=max_seq_len,
                max_rollback=max_rollback,
                dtype=dtype,
                cache_dtype=cache_dtype,
                device=device,
            )
            for attention in attentions
        ]
        length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(layers, length, max_seq_len=max_seq_len, max_rollback=max_rollback)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' state."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())

    @property
    def kind(self) -> tuple[torch.dtype, bool]:
        """What compiled code is made for besides sizes: what is stored, and can it go back."""
        return self.layers[0].tensors()[0].dtype, self.max_rollback > 0

    def assert_room(self, count: Tensor) -> None:
        """Fails, without a host sync on a GPU, when a row would outgrow `max_seq_len`."""
        fits = (self.length + count <= self.max_seq_len).all()
        # A constant message: torch.compile cannot trace one with a size that may vary.
        torch._assert_async(fits, "a row would outgrow the cache's max_seq_len")

    def advance(self, count: Tensor) -> None:
        """Counts new tokens, int [B], once every layer has stored them."""
        self.length += count
        self._can_go_back.add_(count).clamp_(max=self.max_rollback)

    def reset(self) -> Self:
        """Empties every row, in place."""
        for layer in self.layers:
            for tensor in layer.tensors():
                tensor.zero_()
        self.length.zero_()
        self._can_go_back.zero_()
        return self

    def rollback(self, count: int | Tensor) -> None:
        """Takes back the last `count` tokens of each row (an int, or int [B]), exactly.

        What follows gives the numbers that it would have given without the tokens taken back.

        Raises:
            ValueError: more than `max_rollback`, or more than was written since the last rollback
                (running sums cannot be unwound, so only the last K + 1 are kept).
        """
        taken = torch.as_tensor(count, device=self.length.device)
        if taken.is_floating_point() or taken.shape not in ((), self.length.shape):
            raise ValueError(
                f"rollback takes an int or integers [{len(self.length)}], "
                f"not {taken.dtype} {list(taken.shape)}"
            )
        taken = taken.expand_as(self.length)
        if bool((taken < 0).any()):
            raise ValueError(f"rollback takes a count >= 0, not {int(taken.min())}")
        if bool((taken > self.max_rollback).any()):
            raise ValueError(
                f"cannot roll back {int(taken.max())} tokens: the cache was allocated with "
                f"max_rollback={self.max_rollback}"
            )
        if bool((taken > self._can_go_back).any()):
            raise ValueError(
                f"cannot roll back {int(taken.max())} tokens: a row can go back by "
                f"{int(self._can_go_back.min())} only"
            )
        self.length -= taken
        self._can_go_back -= taken
