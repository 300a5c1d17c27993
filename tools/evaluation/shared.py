"""Shared: what models of one command have in common, such as prompts and their tokens."""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from zoo import Tokenizer

Made = TypeVar("Made")


class Shared:
    """Keeps what one model needed for the next one.

    Args:
        keep: False where there is no next one: nothing is kept.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._made: dict[Hashable, object] = {}
        self._tokenizers: list[Tokenizer] = []

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gave for this key at first; a key says all that it depends on."""
        if not self._keep:
            return make()
        if key not in self._made:
            self._made[key] = make()
        return cast("Made", self._made[key])

    def tokenizer(self, own: "Tokenizer") -> "Tokenizer":
        """An earlier model's tokenizer, if it is the same as this one, else this one."""
        known = next((x for x in self._tokenizers if x.same_as(own)), None)
        if known is None:
            self._tokenizers.append(own)
        return known or own
