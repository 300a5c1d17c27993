"""append_result: one measurement, with all that it depends on, as a line of a JSON lines file."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Bench = Literal[
    "kernels", "tiles", "stability", "decode", "batch", "evaluate", "placement", "conversion"
]

_BEGIN = b'{"bench": '  # of every row
_CHECKOUT = Path(__file__).parents[1]


def append_result(
    path: Path,
    *,
    bench: Bench,
    case: Mapping[str, object],
    impl: str,
    metric: str,
    value: float,
    unit: str,
    spread: float | None,
    device: "torch.device",
    command: str,
) -> None:
    """Appends one measurement to `path`.

    The row goes out in one write, so that runs in parallel do not mix their rows; behind a row
    that a kill has cut short, it begins a new line.

    Args:
        path: made if need be; see `check_appendable`.
        bench: which kind of measurement.
        case: what was measured: model, task, lengths, seed and so on.
        impl: the implementation measured.
        metric, value, unit: such as "perplexity", 19.2, "".
        spread: the standard error of `value`, or None where there is none.
        device: where it ran.
        command: what measured it, as one would type it.
    """
    row = {
        "bench": bench,
        "case": dict(case),
        "impl": impl,
        "metric": metric,
        "value": value,
        "unit": unit,
        "spread": spread,
        "device": device_name(device),
        "torch": importlib.metadata.version("torch"),
        "triton": _version("triton"),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }
    # NaN and infinity are no JSON: better no row than one that nobody can read.
    line = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def check_appendable(path: Path | None) -> None:
    """Raises OSError or ValueError unless `append_result` could write; creates nothing."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"cannot append to {path}, which is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"cannot create {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: permission denied")


def check_results(path: Path | None) -> None:
    """As `check_appendable`, and a file that is there must hold results.

    Raises:
        OSError: the file cannot be read.
        ValueError: it cannot be written, or begins with something else, such as the configuration
            of a model, which rows behind it would spoil.
    """
    check_appendable(path)
    if path is None or not path.is_file():
        return
    with path.open("rb") as file:
        begin = file.readline(len(_BEGIN)).rstrip(b"\n")
    # A kill may have cut the first row short; a brace alone begins any JSON.
    if begin == b"{" or not _BEGIN.startswith(begin):
        raise ValueError(f"{path} holds no rows of results to add to; name a new file")


def check_outputs(out: Path | None, samples: Path | None) -> None:
    """As `check_results` of a command's rows and `check_appendable` of its outcomes.

    Raises:
        OSError, ValueError: as these, and if both are one file.
    """
    if out is not None and samples is not None and out.resolve() == samples.resolve():
        raise ValueError(f"--out and --samples are both {out}; name two files")
    check_results(out)
    check_appendable(samples)


def device_name(device: "torch.device") -> str:
    """What the hardware calls itself, such as "NVIDIA H100 80GB HBM3" or a processor's name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []  # not Linux
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({os.cpu_count()} threads)"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # what runs is what was loaded, and asking takes longer than writing a row
def _commit() -> str | None:
    """The commit of the checkout that this file is in; None for an installed package.

    "-dirty" behind it says that tracked files differ, results aside.
    """
    if not (_CHECKOUT / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(_CHECKOUT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!docs/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit
