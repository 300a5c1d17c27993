"""Branches: a model in which layers can have their exact attention or the other one.

Layers that slide in the published model stay so.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from flasheva import Impl
from layers import FullAttention, WindowAttention
from recipes import sliding_layers
from zoo import CausalLM

FULL = "full_attention"


class Branches:
    """Both kinds of attention of each layer, of which the model has one at a time.

    Exact attention has no parameters, so that the second kind of a layer costs nothing.

    Args:
        model: from `zoo.load`, without an exact layer.
        impl: how it was loaded, see `zoo.load`.

    Raises:
        ValueError: a layer has exact attention already.
    """

    def __init__(self, model: CausalLM, impl: Impl = "auto") -> None:
        if FULL in model.config.layer_types:
            raise ValueError("a search begins with a model that has no exact layer")
        config = model.config
        self.model = model
        self.depth = config.num_hidden_layers
        self._types: Sequence[str] = config.layer_types
        self.sliding = sliding_layers(self._types)
        self._other: list[nn.Module] = [block.attention.attend for block in model.layers]  # type: ignore[union-attr, misc]
        self._exact: list[nn.Module] = [
            FullAttention(config.num_key_value_heads, config.head_dim, impl).train(model.training)
            for _ in range(self.depth)
        ]

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that can be either."""
        return tuple(layer for layer in range(self.depth) if layer not in self.sliding)

    def exact(self, layer: int) -> FullAttention:
        """The exact attention of a layer."""
        found = self._exact[layer]
        assert isinstance(found, FullAttention)
        return found

    def other(self, layer: int) -> WindowAttention:
        """The other attention of a layer."""
        found = self._other[layer]
        assert isinstance(found, WindowAttention)
        return found

    def choose(self, layer: int, *, exact: bool) -> None:
        """Sets the attention of one layer."""
        self.put(layer, (self._exact if exact else self._other)[layer])

    def put(self, layer: int, attend: nn.Module) -> None:
        """Sets any module as the attention of one layer."""
        self.model.layers[layer].attention.attend = attend  # type: ignore[union-attr]

    @contextmanager
    def placed(self, exact: Collection[int]) -> Iterator[CausalLM]:
        """The model with these layers exact, as `zoo.load` gives it for these layer types."""
        before = self.model.config
        types = tuple(FULL if i in exact else kind for i, kind in enumerate(self._types))
        try:
            for layer in range(self.depth):
                self.choose(layer, exact=layer in exact)
            self.model.config = dataclasses.replace(before, layer_types=types)  # type: ignore[type-var]
            yield self.model
        finally:
            self.model.config = before
            for layer in range(self.depth):
                self.choose(layer, exact=False)
