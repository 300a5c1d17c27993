"""compile_apart: torch.compile with a count of graphs of its own."""

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import ParamSpec, TypeVar, cast

import torch

Backend = str | Callable[[torch.fx.GraphModule, list[torch.Tensor]], Callable[..., object]]
Given = ParamSpec("Given")
Result = TypeVar("Result")


def compile_apart(
    function: Callable[Given, Result],
    *,
    dynamic: bool | None = None,
    backend: Backend | None = None,
) -> Callable[Given, Result]:
    """`torch.compile(function, fullgraph=True, ...)`, of a copy of the function.

    torch.compile refuses after 8 graphs of one code object, whatever made them: what is compiled
    for several models or kinds would use them up together.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(), function.__globals__, argdefs=function.__defaults__
    )
    # Not named where nobody asked for one: tests give torch.compile another default.
    chosen = torch.compile if backend is None else partial(torch.compile, backend=backend)
    run = chosen(own, fullgraph=True, dynamic=dynamic)
    return cast("Callable[Given, Result]", run)
