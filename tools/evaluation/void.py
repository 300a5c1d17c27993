"""is_void: a cell of a recall task where full attention itself scores below a half.

There nothing can be said of a model that has less of it.
"""

from collections.abc import Sequence, Set

from tools.evaluation.outcome import Outcome, Score, score
from tools.evaluation.recall import RECALL
from tools.evaluation.record import cell_text

VOID_BELOW = 0.5


def is_void(full: Score | None) -> bool:
    """Whether full attention's score leaves nothing to judge by."""
    if full is None or full.task not in RECALL or full.metric != "accuracy":
        return False
    return full.value < VOID_BELOW


def void_cells(full: Sequence[Outcome], by: Sequence[str] | None) -> Set[tuple[str, str]]:
    """Task and `cell_text` of what is void, by these parts of a cell; None: by all of them.

    Args:
        full: outcomes of a model with full attention.
        by: as in `compare_models`.
    """
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in full:
        if outcome.metric == "accuracy":
            names = outcome.cell if by is None else by
            cell = {name: outcome.cell[name] for name in names if name in outcome.cell}
            groups.setdefault((outcome.task, cell_text(cell)), []).append(outcome)
    return {key for key, group in groups.items() if is_void(score(group))}
