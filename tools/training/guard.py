"""Guard: a run stops where a loss or gradient is no number, or far larger than it was."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

_REMEMBERED, _ENOUGH = 64, 16


class Diverged(ValueError):
    """A step that must not be taken: its message says why, in one line."""


class Guard:
    """Looks at every step before its weights change.

    Args:
        factor: how many times the median of the last 64 norms a norm may be, once there are 16;
            0: any finite one.
        norms: those of the steps before, the oldest one first.
    """

    def __init__(self, factor: float, norms: Iterable[float] = ()) -> None:
        self.factor = factor
        self.norms = deque(norms, maxlen=_REMEMBERED)

    def check(self, loss: float, norm: float) -> None:
        """Remembers a norm.

        Raises:
            Diverged: the loss or the norm is not finite, or the norm too large.
        """
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss}")
        if not math.isfinite(norm):
            raise Diverged(f"the norm of the gradient is {norm}, with a loss of {loss:.4g}")
        if self.factor and len(self.norms) >= _ENOUGH:
            usual = statistics.median(self.norms)
            if norm > self.factor * usual:
                raise Diverged(
                    f"the norm of the gradient is {norm:.3g}, more than {self.factor:g} times the "
                    f"usual {usual:.3g}"
                )
        self.norms.append(norm)
