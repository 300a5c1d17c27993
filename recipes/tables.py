"""Table: typed access to a table of a TOML file, with errors that name a key in full."""

import difflib
from typing import TypeVar, cast

_T = TypeVar("_T")


class Table:
    """One table of a file.

    Args:
        values: what tomllib gave.
        path: the table's name, "" for the file itself.
        known: the keys that there may be.

    Raises:
        ValueError: an unknown key; so do all methods for a missing key or a wrong type.
    """

    def __init__(self, values: dict[str, object], path: str, known: tuple[str, ...]) -> None:
        self._values = values
        self._path = path
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                where = f" in [{path}]" if path else ""
                raise ValueError(f"unknown key {key!r}{where}; {hint}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(
        self, key: str, kind: type[_T] | tuple[type[_T], ...], what: str, default: _T | None = None
    ) -> _T:
        """The value of `key`; without a default, the key is required."""
        path = self.path(key)
        if key not in self._values:
            if default is None:
                raise ValueError(f"missing key {path!r}, {what}")
            return default
        value = self._values[key]
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ValueError(f"{path} must be {what}, not {value!r}")
        return value

    def ints(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """An array of integers."""
        return cast("tuple[int, ...]", self._array(key, int, "an array of integers", default))

    def strings(self, key: str, default: tuple[str, ...] | None = ()) -> tuple[str, ...]:
        """An array of strings."""
        return cast("tuple[str, ...]", self._array(key, str, "an array of strings", default))

    def numbers(self, key: str, default: tuple[float, ...] | None = None) -> tuple[float, ...]:
        """An array of numbers."""
        values = self._array(key, (int, float), "an array of numbers", default)
        return tuple(float(value) for value in cast("tuple[float, ...]", values))

    def _array(
        self,
        key: str,
        kind: type | tuple[type, ...],
        what: str,
        default: tuple[object, ...] | None,
    ) -> tuple[object, ...]:
        values = self.get(key, list, what, None if default is None else list(default))
        if not all(isinstance(x, kind) and not isinstance(x, bool) for x in values):
            raise ValueError(f"{self.path(key)} must be {what}, not {values!r}")
        return tuple(values)

    def path(self, key: str) -> str:
        """The key, with the name of its table."""
        return f"{self._path}.{key}" if self._path else key
