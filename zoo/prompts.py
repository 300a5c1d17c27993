"""prompt_list, check_tokens: what callers may give as prompts, as lists and token ids."""

from collections.abc import Iterable, Mapping, Set
from typing import cast

from torch import Tensor

from zoo.arguments import as_int, shown


def prompt_list(prompts: object) -> list[object]:
    """The prompts, of which a text or a list of single tokens is one.

    Raises:
        ValueError: what was given is no list and no text.
    """
    listed = plain(prompts)
    if isinstance(listed, str):
        return [listed]
    if not isinstance(listed, list):
        raise ValueError(
            f"prompts must be a text, a list of token ids or a list of these, not {shown(prompts)}"
        )
    listed = [plain(item) for item in listed]
    single = listed and not any(isinstance(item, str | list) for item in listed)
    return [listed] if single else listed


def plain(value: object) -> object:
    """Arrays, ranges, iterators and such as lists; anything else as it is."""
    if isinstance(value, Tensor) or hasattr(value, "tolist"):  # also NumPy's, without importing it
        return value.tolist()
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        return value
    return list(value)


def check_tokens(values: list[object], where: str, vocab_size: int) -> list[int]:
    """The token ids among `values`, as plain integers.

    Args:
        values: any objects.
        where: which prompt it is, in errors: behind "prompt".
        vocab_size: of the model.

    Raises:
        ValueError: one of them is no token id.
    """
    # A look at each of millions of tokens takes seconds; this takes a tenth of that.
    if values and set(map(type, values)) == {int}:
        ids = cast("list[int]", values)
        if min(ids) >= 0 and max(ids) < vocab_size:
            return ids
    return [_token(value, where, vocab_size) for value in values]


def _token(value: object, where: str, vocab_size: int) -> int:
    token = as_int(value)
    if token is None:
        raise ValueError(
            f"prompt{where} has {shown(value)} where a token id, an integer, should be"
        )
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"prompt{where} has token {token}, outside the vocabulary of {vocab_size}"
        )
    return token
