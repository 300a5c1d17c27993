"""What the commands of `zoo bench` share: choices, devices, versions, metrics and their rows."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from tools.entry import command_line
from tools.results import Bench, append_result

if TYPE_CHECKING:
    import torch

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Metric:
    """One number of a measurement; `spread` is half the interquartile range, or None."""

    value: float
    unit: str
    spread: float | None = None


def words(names: object) -> str:
    """The choices of a Literal, for a help text."""
    return ", ".join(get_args(names))


def chosen(option: str, given: Sequence[str] | None, names: tuple[Name, ...]) -> tuple[Name, ...]:
    """Those of `names` that were given, or all; Typer has no lists of choices."""
    for name in given or ():
        if name not in names:
            raise ValueError(f"{option} must be one of {', '.join(names)}, not {name!r}")
    return tuple(name for name in names if given is None or name in given)


def device_of(name: str) -> "torch.device":
    """The device, which becomes the current one.

    Raises:
        ValueError: neither a CPU nor a GPU that this torch sees.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"it must be cuda or cpu, not {name!r}")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"this torch sees no GPU {name!r}; --device cpu runs small shapes on a CPU"
            )
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def versions(*packages: str) -> str:
    """Of installed packages, for people."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def values(found: Mapping[str, Metric]) -> dict[str, object]:
    """Numbers alone, for JSON."""
    return {name: metric.value for name, metric in found.items()}


def append_metrics(
    out: Path | None,
    bench: Bench,
    case: Mapping[str, object],
    impl: str,
    found: Mapping[str, Metric],
    device: "torch.device",
) -> None:
    """A row for every metric to the file `out`, if there is one; see `append_result`."""
    if out is None:
        return
    for name, metric in found.items():
        append_result(
            out,
            bench=bench,
            case=case,
            impl=impl,
            metric=name,
            value=metric.value,
            unit=metric.unit,
            spread=metric.spread,
            device=device,
            command=command_line(),
        )
