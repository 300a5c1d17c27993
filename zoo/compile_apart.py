"""compile_apart: torch.compile with a count of graphs of its own."""

from collections.abc import Callable
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
    backend: Backend = "inductor",
) -> Callable[Given, Result]:
    """`torch.compile(function, fullgraph=True, ...)`, of a copy of the function.

    torch.compile refuses after 8 graphs of one code object, whatever made them: what is compiled
    for several models or kinds would use them up together.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(), function.__globals__, argdefs=function.__defaults__
    )
    run = torch.compile(own, fullgraph=True, dynamic=dynamic, backend=backend)
    return cast("Callable[Given, Result]", run)
