"""summaries: rows of a sweep as one line for each placement; which of them nothing dominates."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from tools.evaluation.recall import RECALL
from tools.evaluation.record import cell_text
from tools.text_files import read_lines

log = logging.getLogger("zoo")

# What full attention finds nearly always; where it does not, a hybrid cannot be judged by it.
JUDGED_FROM = 0.95
_NORMAL = 1.96
# Tasks that are reported by context only.
_WHOLE = {
    name
    for name, task in RECALL.items()
    if not any({"wording", "size"} & set(parts) for parts in task.reports)
}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number, and half its 95 % interval where there is one."""

    value: float
    half: float | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A placement.

    Attributes:
        model, rule, count, seed: which; rules "none" and "all" are for comparison.
        layers: the exact ones, as `--layers` reads them.
        window, chunk: sizes of the other layers; None where all are exact.
        perplexity: lower is better.
        retrieval: the part of all recall items that is right.
        of_full: the mean, over the cells in which full attention is right in at least 95 %, of
            what part of that is left; and the number of these cells.
        cache_bytes: of one row.
        tokens_per_second: of decoding.
        best: whether no other placement of the model is as good in everything and better in
            something.
    """

    model: str
    rule: str
    count: int
    seed: int | None
    layers: str
    window: int | None
    chunk: int | None
    perplexity: Value | None = None
    retrieval: Value | None = None
    of_full: float | None = None
    cells: int = 0
    cache_bytes: int | None = None
    tokens_per_second: float | None = None
    best: bool = False

    @property
    def name(self) -> str:
        """The rule, with its seed if that tells placements apart."""
        return self.rule if self.seed in (None, 0) else f"{self.rule} {self.seed}"


_Row = Mapping[str, object]
_Case = Mapping[str, object]


def placement_rows(path: Path, model: str) -> list[_Row]:
    """The rows of a model's placements in a file of results; a row that a kill has cut is none.

    Args:
        path: .xz, .gz and .zst files are decompressed.
        model: its name.

    Raises:
        ValueError: a damaged file, or one without such rows.
    """
    found, left_out = [], 0
    for line in read_lines(path).splitlines():
        try:
            row = json.loads(line)
            if row["bench"] == "placement" and row["case"]["model"] == model:
                _check(row)
                found.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            left_out += bool(line.strip())
    if left_out:
        log.warning("%s: lines that are no rows, cut short perhaps, left out: %d", path, left_out)
    if not found:
        raise ValueError(
            f"{path} has no row of a placement of {model}; zoo ablate without --report-only "
            "makes them"
        )
    return found


def _check(row: _Row) -> None:
    """Raises KeyError or ValueError unless the fields that are read are there."""
    case = cast("_Case", row["case"])
    if not isinstance(row["value"], int | float):
        raise ValueError("no number")
    for field in ("metric", "spread", "device"):
        row[field]
    if "rule" in case:
        for field in ("count", "layers"):
            case[field]


def summaries(rows: Iterable[_Row]) -> list[Summary]:
    """One for each placement, in the order in which they first come.

    Raises:
        ValueError: there is no row of a placement.
    """
    groups: dict[tuple[object, ...], list[_Row]] = {}
    for row in rows:
        if "rule" in cast("_Case", row["case"]):
            groups.setdefault(_key(row), []).append(row)
    if not groups:
        raise ValueError("there is no row of a placement; zoo ablate makes them")
    # Placements are compared where the same judged them, on the same device.
    alike = {key: (key[0], *key[-2:]) for key in groups}
    full = {alike[key]: _cells(group) for key, group in groups.items() if key[1] == "all"}
    found = {key: _summary(group, full.get(alike[key], {})) for key, group in groups.items()}
    return [
        replace(
            x,
            best=not any(
                _dominates(y, x) for other, y in found.items() if alike[other] == alike[key]
            ),
        )
        for key, x in found.items()
    ]


def _key(row: _Row) -> tuple[object, ...]:
    case = cast("_Case", row["case"])
    eva = cast("_Case", case.get("eva", {}))
    sizes = (eva.get("window_size"), eva.get("chunk_size"))
    point = (case["model"], case["rule"], case["count"], case.get("seed"), *sizes)
    return (*point, str(case["layers"]), str(case.get("judged_by")), row["device"])


def _summary(rows: Sequence[_Row], full: Mapping[str, float]) -> Summary:
    case = cast("_Case", rows[0]["case"])
    eva = cast("_Case", case.get("eva", {}))
    layers = cast("Mapping[str, str]", case["layers"])
    values = {str(row["metric"]): row for row in rows}  # of two of the same, the last

    def value(metric: str) -> Value | None:
        if metric not in values:
            return None
        spread = cast("float | None", values[metric]["spread"])
        half = None if spread is None else _NORMAL * spread
        return Value(value=cast("float", values[metric]["value"]), half=half)

    def number(metric: str) -> float | None:
        found = value(metric)
        return None if found is None else found.value

    own = _cells(rows)
    judged = [
        own[cell] / right for cell, right in full.items() if right >= JUDGED_FROM and cell in own
    ]
    bytes_ = number("cache_bytes")
    return Summary(
        model=str(case["model"]),
        rule=str(case["rule"]),
        count=cast("int", case["count"]),
        seed=cast("int | None", case.get("seed")),
        layers=layers.get("full_attention", "none"),
        window=cast("int | None", eva.get("window_size")),
        chunk=cast("int | None", eva.get("chunk_size")),
        perplexity=value("perplexity"),
        retrieval=value("retrieval"),
        of_full=sum(judged) / len(judged) if judged else None,
        cells=len(judged),
        cache_bytes=None if bytes_ is None else int(bytes_),
        tokens_per_second=number("decode_tokens_per_second"),
    )


def _cells(rows: Iterable[_Row]) -> dict[str, float]:
    """Accuracies by task, context, filler, and wording or size; or by context alone."""
    found: dict[str, float] = {}
    for row in rows:
        case = cast("_Case", row["case"])
        if row["metric"] != "accuracy" or "task" not in case:
            continue
        cell = cast("_Case", case["cell"])
        by = "context" if case["task"] in _WHOLE else ("wording" if "wording" in cell else "size")
        if by not in cell or "depth" in cell:
            continue
        where = [case["task"], cell_text(cell), case.get("fillers")]
        found[str(where)] = cast("float", row["value"])
    return found


def _dominates(a: Summary, b: Summary) -> bool:
    """Whether `a` is as good as `b` in everything that both have, and better in something."""
    if a is b or a.model != b.model:
        return False
    pairs = [
        (-_or_nan(a.perplexity), -_or_nan(b.perplexity)),
        (_or_nan(a.retrieval), _or_nan(b.retrieval)),
        (_minus(a.cache_bytes), _minus(b.cache_bytes)),
        (_plain(a.tokens_per_second), _plain(b.tokens_per_second)),
    ]
    known = [(x, y) for x, y in pairs if not math.isnan(x) and not math.isnan(y)]
    return all(x >= y for x, y in known) and any(x > y for x, y in known)


def _or_nan(value: Value | None) -> float:
    return math.nan if value is None else value.value


def _plain(value: float | None) -> float:
    return math.nan if value is None else value


def _minus(value: float | None) -> float:
    return math.nan if value is None else -value
