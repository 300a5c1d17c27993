"""read_outcomes: what `zoo evaluate --samples` has kept of each item, model by model."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.evaluation.outcome import Outcome
from tools.evaluation.record import Key, key_of
from tools.evaluation.sample_lines import read_sample_lines

log = logging.getLogger("zoo")


class Outcomes(NamedTuple):
    """What files hold.

    Attributes:
        models: the outcomes of each model, in the order in which they first come.
        full: the models of which every layer has full attention.
    """

    models: dict[str, list[Outcome]]
    full: frozenset[str]


def read_outcomes(paths: Sequence[Path]) -> Outcomes:
    """The outcomes of all models in these files.

    A model's name with several cases (other weights, layers, dtype or device) stands for several
    models, called "name (case)". Of two lines on the same item the last counts. Lines that a kill
    has cut short are left out, with a warning.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is not an outcome, or there are none.
    """
    models: dict[tuple[str, str], dict[Key, Outcome]] = {}
    full: set[tuple[str, str]] = set()
    for path in paths:
        lines = list(read_sample_lines(path))
        cut = lines.count(None)
        if cut == len(lines):
            raise ValueError(f"{path} holds no outcomes of `zoo evaluate --samples`")
        if cut:
            log.warning("%s: %d lines are cut short and were left out", path, cut)
        for line in lines:
            if line is not None:
                model = (line.model, line.case)
                models.setdefault(model, {})[key_of(line.outcome)] = line.outcome
                if line.full:
                    full.add(model)
    names = [name for name, _ in models]
    shown = {
        (name, case): name if names.count(name) == 1 else f"{name} ({case[:8]})"
        for name, case in models
    }
    return Outcomes(
        {shown[model]: list(outcomes.values()) for model, outcomes in models.items()},
        frozenset(shown[model] for model in full),
    )
