"""score_together: recall tasks under many placements at once, under teacher forcing.

An answer is right when each of its tokens is the most likely one behind the true tokens before it,
as in `zoo passkey`. What a model writes may differ: it may go on with another digit, or say
something first. In return placements share work, and nothing is generated.
"""

from collections.abc import Sequence

from recipes.placement import LayerSet
from tools.evaluation.outcome import Outcome
from tools.evaluation.record import Record, key_of
from tools.evaluation.samples import Sample
from tools.placement.branches import Branches
from tools.placement.objectives import Retrieval
from tools.placement.scoring import Advance, SweepScorer

# Rows of a block: those of a batch under so many placements.
_PLACEMENTS_AT_ONCE = 4


def score_together(
    branches: Branches,
    samples: Sequence[Sample],
    records: Sequence[tuple[LayerSet, Record]],
    batch_size: int,
    advance: Advance,
) -> None:
    """Adds to each record the accuracies that it lacks.

    Args:
        branches: the model.
        samples: of a recall task.
        records: placements and where their outcomes are kept.
        batch_size: prompts that are read together, under every placement.
        advance: called with the number of outcomes that are settled.
    """
    objective = Retrieval(samples)
    rows = batch_size * _PLACEMENTS_AT_ONCE
    scorer = SweepScorer(branches, objective, batch_size=batch_size, rows=rows)
    first = 0
    for batch in objective.batches(batch_size):
        part = objective.samples[first : first + len(batch.ids)]
        first += len(part)
        keys = {key_of(_outcome(sample, 0.0)) for sample in part}
        lacking = [pair for pair in records if not keys <= pair[1].done]
        advance(len(part) * (len(records) - len(lacking)))
        if not lacking:
            continue
        placements = [layers for layers, _ in lacking]
        for index, values in scorer.batch(batch, placements, lambda steps: None):
            for sample, value in zip(part, values, strict=True):
                lacking[index][1].add(_outcome(sample, value["accuracy"]))
            advance(len(part))


def _outcome(sample: Sample, value: float) -> Outcome:
    return Outcome(
        task=sample.task, cell=sample.cell, item=sample.item, metric="accuracy", value=value
    )
