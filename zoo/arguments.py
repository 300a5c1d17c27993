"""as_int, as_float, int_at_least, shown: what callers give as numbers, checked, and in errors."""

import operator
import reprlib


def as_int(value: object) -> int | None:
    """A plain int of an integer, NumPy's too; None for anything else, floats and bools too."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # floating-point and boolean arrays have an __index__ that raises it
        return None


def as_float(value: object) -> float | None:
    """A plain float of a number, NumPy's too; None for anything else, strings and bools too."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def int_at_least(least: int, name: str, value: object) -> int:
    """The argument `name` as a plain int.

    Raises:
        ValueError: it is no integer, or below `least`.
    """
    found = as_int(value)
    if found is None or found < least:
        given = shown(value) if found is None else found
        raise ValueError(f"{name} must be an int of at least {least}, not {given}")
    return found


def shown(value: object) -> str:
    """In one line, for errors."""
    return " ".join(reprlib.repr(value).split())  # an array's has several lines
