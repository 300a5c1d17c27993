"""Judge: what a placement is worth on data that no search has read, and what it costs.

The tasks are those of `zoo evaluate`, with the judge half of wordings and fillers. Everything is
kept as rows of results, and the outcomes of items as samples, so that a killed run goes on.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from recipes.ablation import JudgeTable
from recipes.placement import LayerSet
from tools.entry import command_line
from tools.evaluation.jobs import jobs
from tools.evaluation.outcome import Outcome, Score, score
from tools.evaluation.recall import RECALL
from tools.evaluation.recall.fillers import Filler
from tools.evaluation.record import Record, case_digest
from tools.evaluation.report import run_job
from tools.evaluation.suite import Settings
from tools.measurement import implementation, model_case
from tools.model_options import RuntimeOptions
from tools.placement.branches import Branches
from tools.placement.searcher import Progress
from tools.placement.target import text_filler
from tools.results import append_result, device_name
from tools.scoring.perplexity import cut_windows, measure_perplexity
from tools.text_files import read_text
from zoo import CausalLM

# Of the tasks that hide things in prose only, each text gives prompts of its own.
_WITHOUT_PROSE = ("passkey",)
LAST = "cache_bytes"  # what is recorded of a point when all else is


class ResultRows:
    """A file of results, without the same measurement twice.

    Args:
        path: the file.
        device: where everything is measured.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path, self._device = path, device
        self._there: set[str] = set()
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._there.add(_key(row["case"], row["metric"], row["device"]))
                except (ValueError, KeyError, TypeError):
                    continue  # cut by a kill

    def has(self, case: Mapping[str, object], metric: str) -> bool:
        """Whether this was measured, here or in an earlier run on such a device."""
        return _key(case, metric, device_name(self._device)) in self._there

    def add(
        self,
        case: Mapping[str, object],
        metric: str,
        value: float,
        *,
        impl: str,
        unit: str = "",
        spread: float | None = None,
    ) -> None:
        """Adds a row, unless it is there."""
        if self.has(case, metric):
            return
        append_result(
            self._path,
            bench="placement",
            case=case,
            impl=impl,
            metric=metric,
            value=value,
            unit=unit,
            spread=spread,
            device=self._device,
            command=command_line(),
        )
        self._there.add(_key(case, metric, device_name(self._device)))


class Judge:
    """Judges placements of one model.

    Args:
        name: of the model.
        table: what it is judged by.
        runtime: how it was loaded.
        work: folder of the samples, one file for each set of layers; made if need be.
        rows: where results go.
        progress: makes bars.
    """

    def __init__(
        self,
        name: str,
        table: JudgeTable,
        runtime: RuntimeOptions,
        work: Path,
        rows: ResultRows,
        progress: Progress,
    ) -> None:
        self._name, self._table, self._runtime = name, table, runtime
        self._samples, self._rows, self._progress = work / "samples", rows, progress
        self._samples.mkdir(parents=True, exist_ok=True)
        texts: list[Filler | None] = [text_filler(path) for path in table.texts]
        self._settings = [
            Settings(
                data=table.data,
                contexts=table.contexts,
                n=table.n,
                limit=table.limit,
                seed=table.seed,
                split="judge",
                batch_size=table.batch_size,
                far=table.far,
                log_likelihood=False,
                judge_text=text,
            )
            for text in texts or [None]
        ]

    @property
    def settings(self) -> Sequence[Settings]:
        """What tasks are scored with, one for each text."""
        return self._settings

    def judge(self, branches: Branches, layers: LayerSet, point: Mapping[str, object]) -> None:
        """Measures a placement and adds its rows.

        Args:
            branches: the model.
            layers: the exact ones.
            point: what tells it apart in rows: rule, count and seed.
        """
        with branches.placed(layers) as model:
            longest = max(self._table.contexts)
            impl = implementation(model, self._runtime.impl, longest)
            case = model_case(self._name, model) | dict(point) | {"judge_seed": self._table.seed}
            cost = case | {"context": longest, "batch": 1}
            if self._rows.has(cost, LAST):
                return
            outcomes = self._tasks(model, case, impl, f"{point['rule']} {point['count']}")
            pooled = retrieval_score(outcomes)
            if pooled is not None:
                named = {"tasks": list(self._table.tasks), "contexts": list(self._table.contexts)}
                self._rows.add(
                    case | named | {"n": pooled.n},
                    "retrieval",
                    pooled.value,
                    impl=impl,
                    spread=pooled.error,
                )
            self._perplexity(model, case, impl)
            self._speed(model, case, impl)
            bytes_ = model.new_cache(1, longest).nbytes
            self._rows.add(cost, LAST, bytes_, impl=impl, unit="B")

    def _tasks(
        self, model: CausalLM, case: Mapping[str, object], impl: str, title: str
    ) -> list[Outcome]:
        table = self._table
        own = model_case(self._name, model)  # the rule says nothing about what a model answers
        own |= {"impl": impl, "device": device_name(model.device), "seed": table.seed}
        path = self._samples / f"{case_digest(own)}.jsonl"
        with Record(path, self._name, own) as record:
            for number, settings in enumerate(self._settings):
                for task in table.tasks:
                    if number and (task in _WITHOUT_PROSE or task not in RECALL):
                        continue
                    for job in jobs(task, model, self._name, settings):
                        with self._progress(f"{title}: {job.title}", job.total) as advance:
                            found = run_job(job, record, advance)
                        for x in found:
                            row = dict(case) | {"task": x.task, "cell": dict(x.cell)}
                            row |= dict(job.case) | {"n": x.n, "batch": table.batch_size}
                            row |= {} if table.limit is None else {"limit": table.limit}
                            self._rows.add(row, x.metric, x.value, impl=impl, spread=x.error)
            return list(record)

    def _perplexity(self, model: CausalLM, case: Mapping[str, object], impl: str) -> None:
        table = self._table
        if table.perplexity_text is None:
            return
        assert model.tokenizer is not None
        name = {"text": table.perplexity_text.name, "window": table.window}
        own = dict(case) | name | {"windows": table.windows}
        if self._rows.has(own, "perplexity"):
            return
        ids = model.tokenizer.encode(read_text(table.perplexity_text), add_bos=False)
        windows = cut_windows(ids, table.window, table.windows)
        with self._progress("perplexity", table.windows) as advance:
            found = measure_perplexity(
                model, windows, batch_size=min(table.batch_size, 8), advance=advance
            )
        for metric, x in (
            ("perplexity_second_half", found.second_half),
            ("perplexity", found.all),
        ):
            self._rows.add(own, metric, x.value, impl=impl, spread=x.standard_error)

    def _speed(self, model: CausalLM, case: Mapping[str, object], impl: str) -> None:
        speed = self._table.speed
        if speed is None:
            return
        from tools.benchmarks.decode import Job, measure_ours

        sizes = {"batch": speed.batch_size, "prompt": speed.prompt, "new": speed.new}
        own = dict(case) | sizes
        if self._rows.has(own, "decode_tokens_per_second"):
            return
        job = Job(batch_size=speed.batch_size, prompt=speed.prompt, new=speed.new, compile=False)
        step = measure_ours(model, job).step
        value = speed.batch_size / step
        self._rows.add(own, "decode_tokens_per_second", value, impl=impl, unit="tokens/s")


def retrieval_score(outcomes: Sequence[Outcome]) -> Score | None:
    """The accuracy over all items of recall tasks, each item counting once; None: there are none.

    The standard error is that of a mean of items; items of one prompt text are not independent of
    each other, but nearly so.
    """
    right = [
        Outcome(task="retrieval", item=x.item, metric="accuracy", value=x.value)
        for x in outcomes
        if x.task in RECALL and x.metric == "accuracy"
    ]
    if not right:
        return None
    found = score(right)
    assert math.isfinite(found.value)
    return found


def _key(case: Mapping[str, object], metric: str, device: str) -> str:
    plain = cast("dict[str, object]", json.loads(json.dumps(dict(case))))
    return json.dumps([plain, metric, device], sort_keys=True)
