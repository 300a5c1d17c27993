"""report: scores by parts of a cell; `print_scores`: models beside each other, with voids."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.display import print_table
from tools.evaluation.jobs import Advance, Job
from tools.evaluation.outcome import Outcome, Score, is_perplexity, score
from tools.evaluation.record import Key, Record, cell_text, key_of
from tools.evaluation.void import is_void


@dataclass(frozen=True, kw_only=True)
class Column:
    """A model's scores, by task, cell and metric.

    Attributes:
        name: of the model.
        full: whether every layer has full attention.
        scores: see `score_key`.
    """

    name: str
    full: bool
    scores: Mapping[Key, Score]


def score_key(found: Score) -> Key:
    """What tells a model's scores apart."""
    return (found.task, cell_text(found.cell), "", found.metric)


def run_job(job: Job, record: Record, advance: Advance) -> list[Score]:
    """Runs what the record lacks of a job; its scores."""
    keys = {key_of(outcome) for outcome in record if job.covers(outcome)}
    for outcome in job.run(record.done, advance):
        record.add(outcome)
        keys.add(key_of(outcome))
    # In an order of their own: a run that went on adds up numbers as one that was not stopped.
    outcomes = sorted((x for x in record if key_of(x) in keys), key=_natural)
    return report(outcomes, job.reports)


def _natural(outcome: Outcome) -> list[list[str | int]]:
    """Orders as people do, "64-127" before "128-255"."""
    return [
        [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]
        for text in key_of(outcome)
    ]


def report(outcomes: Sequence[Outcome], parts: Sequence[Sequence[str]]) -> list[Score]:
    """The scores by each of these parts of the cell, or by the whole cell if there are none."""
    found: dict[Key, list[Outcome]] = {}
    chosen: Sequence[Sequence[str] | None] = parts or [None]
    for names in chosen:
        fresh: dict[Key, list[Outcome]] = {}
        for outcome in outcomes:
            whole = outcome.cell
            cell = {x: whole[x] for x in (whole if names is None else names) if x in whole}
            key = (outcome.task, cell_text(cell), "", outcome.metric)
            reduced = Outcome(
                task=outcome.task,
                cell=cell,
                item=outcome.item,
                metric=outcome.metric,
                value=outcome.value,
                weight=outcome.weight,
            )
            fresh.setdefault(key, []).append(reduced)
        for key, group in fresh.items():
            found.setdefault(key, group)
    return [score(group) for group in found.values()]


def print_scores(columns: Sequence[Column]) -> None:
    """One row for each task, cell and metric, one column for each model."""
    judge = next((column for column in columns if column.full), None)
    keys = dict.fromkeys(key for column in columns for key in column.scores)
    rows = []
    for key in keys:
        task, cell, _, metric = key
        void = judge is not None and is_void(judge.scores.get(key))
        shown = [
            "void" if void and not column.full else _shown(column.scores.get(key))
            for column in columns
        ]
        where = ", ".join(f"{name} {value}" for name, value in json.loads(cell).items())
        n = max(column.scores[key].n for column in columns if key in column.scores)
        rows.append([task, where, metric, str(n), *shown])
    print_table(["task", "cell", "metric", "n", *(column.name for column in columns)], rows)


def _shown(found: Score | None) -> str:
    if found is None:
        return ""
    digits = 2 if is_perplexity(found.metric) else 3
    error = "" if found.error is None else f" ± {found.error:.{digits}f}"
    return f"{found.value:.{digits}f}{error}"


def rows_there(path: Path) -> set[str]:
    """The rows of a results file, as `row_text` gives them; damaged lines are passed over."""
    if not path.exists():
        return set()
    rows = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            rows.add(
                row_text(row["case"], row["impl"], row["metric"], row["value"], row["device"])
            )
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def row_text(case: Mapping[str, object], impl: str, metric: str, value: float, device: str) -> str:
    """What tells rows of a results file apart that measure the same."""
    return json.dumps([dict(case), impl, metric, value, device], sort_keys=True)
