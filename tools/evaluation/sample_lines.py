"""Lines of `zoo evaluate --samples`: one outcome of one model each.

A line is {"model", "case", "full", "task", "cell", "item", "metric", "value", "weight"}: "model"
is the name that was typed, "case" a digest of the model with its weights, attention, dtype and
device, so that outcomes of another one are never taken for its own, and "full" says whether every
layer has full attention.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tools.evaluation.outcome import Outcome
from tools.text_files import read_blocks

_BEGIN = b'{"model": '


@dataclass(frozen=True)
class Line:
    """An outcome, and of which model it is."""

    model: str
    case: str
    full: bool
    outcome: Outcome

    def encode(self) -> bytes:
        """The line, with its end."""
        x = self.outcome
        row = {"model": self.model, "case": self.case, "full": self.full}
        row |= {"task": x.task, "cell": dict(x.cell), "item": x.item, "metric": x.metric}
        row |= {"value": x.value, "weight": x.weight}
        return json.dumps(row, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def read_sample_lines(path: Path) -> Iterator[Line | None]:
    """The lines of a file; None for one that a kill has cut short.

    Args:
        path: .xz, .gz and .zst files are decompressed.

    Raises:
        OSError: the file cannot be read.
        ValueError: a damaged file, or a line that is no outcome.
    """
    for number, line in enumerate(b"".join(read_blocks(path)).split(b"\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # Behind the beginning of a line a later run has begun a new one.
            if line.startswith(_BEGIN) or _BEGIN.startswith(line):
                yield None
                continue
            raise ValueError(f"{source}: not an outcome of `zoo evaluate --samples`") from None
        yield _parse(row, source)


def _parse(row: object, source: str) -> Line:
    try:
        fields = cast("Mapping[str, object]", row)
        outcome = Outcome(
            task=str(fields["task"]),
            cell=dict(cast("Mapping[str, object]", fields["cell"])),
            item=str(fields["item"]),
            metric=str(fields["metric"]),
            value=float(cast("float", fields["value"])),
            weight=float(cast("float", fields["weight"])),
        )
        line = Line(str(fields["model"]), str(fields["case"]), fields.get("full") is True, outcome)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{source}: not an outcome of `zoo evaluate --samples`") from None
    if not (math.isfinite(outcome.value) and 0 < outcome.weight < math.inf):
        raise ValueError(
            f"{source}: a value must be finite and a weight above 0, not {outcome.value} and "
            f"{outcome.weight}"
        )
    return line
