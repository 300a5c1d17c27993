"""read_outcomes: what `zoo evaluate --samples` has kept of each item, model by model."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from tools.evaluation.outcome import Outcome
from tools.evaluation.record import Key, key_of

log = logging.getLogger("zoo")


def read_outcomes(paths: Sequence[Path]) -> dict[str, list[Outcome]]:
    """The outcomes of each model in these files, in the order in which they first come.

    A model's name with several cases (other weights, layers, dtype or device) stands for several
    models, called "name (case)". Of two lines on the same item the last counts. Lines that a kill
    has cut short are left out, with a warning.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is not an outcome, or there are none.
    """
    models: dict[tuple[str, str], dict[Key, Outcome]] = {}
    for path in paths:
        cut = 0
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                cut += 1
                continue
            model, outcome = _parse(row, f"{path}, line {number}")
            models.setdefault(model, {})[key_of(outcome)] = outcome
        if cut == len(lines):
            raise ValueError(f"{path} holds no outcomes of `zoo evaluate --samples`")
        if cut:
            log.warning("%s: %d lines are cut short and were left out", path, cut)
    names = [name for name, _ in models]
    return {
        name if names.count(name) == 1 else f"{name} ({case[:8]})": list(outcomes.values())
        for (name, case), outcomes in models.items()
    }


def _parse(row: object, source: str) -> tuple[tuple[str, str], Outcome]:
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
        model = (str(fields["model"]), str(fields["case"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{source}: not an outcome of `zoo evaluate --samples`") from None
    if not (math.isfinite(outcome.value) and 0 < outcome.weight < math.inf):
        raise ValueError(
            f"{source}: a value must be finite and a weight above 0, not {outcome.value} and "
            f"{outcome.weight}"
        )
    return model, outcome
