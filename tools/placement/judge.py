"""Judge: what a placement is worth on data that no search has read, and what it costs.

The tasks are those of `zoo evaluate`, with the judge half of wordings and fillers. Everything is
kept as rows of results, and the outcomes of items as samples, so that a killed run goes on.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from recipes.ablation import JudgeTable
from recipes.placement import LayerSet
from tools.evaluation.batches import BatchLimits
from tools.evaluation.jobs import jobs, recall_samples
from tools.evaluation.outcome import Outcome, Score, score
from tools.evaluation.recall import RECALL
from tools.evaluation.recall.fillers import Filler, text_filler
from tools.evaluation.record import Record, case_digest
from tools.evaluation.report import run_job
from tools.evaluation.shared import Shared
from tools.evaluation.suite import Settings
from tools.measurement import implementation, model_case
from tools.model_options import RuntimeOptions
from tools.placement.branches import Branches
from tools.placement.forced import score_together
from tools.placement.result_rows import ResultRows
from tools.placement.searcher import Progress
from tools.results import device_name
from tools.scoring.perplexity import cut_windows, measure_perplexity
from tools.text_files import contents, read_text
from zoo import CausalLM

# Of the tasks that hide things in prose only, each text gives prompts of its own.
_WITHOUT_PROSE = ("passkey",)
LAST = "cache_bytes"  # what is recorded of a point when all else is


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
                limits=BatchLimits(rows=table.batch_size),
                far=table.far,
                log_likelihood=False,
                judge_text=text,
            )
            for text in texts or [None]
        ]
        self._shared = [Shared() for _ in self._settings]
        of_tasks = {
            "texts": [text and text.name for text in texts],
            "data": None if table.data is None else contents(table.data),
        }
        for name in ("tasks", "contexts", "n", "seed", "limit", "far", "teacher_forcing"):
            of_tasks[name] = getattr(table, name)
        self._judged_by = case_digest(of_tasks)
        self._text = table.perplexity_text and text_filler(table.perplexity_text).name
        of_rest = {"windows": table.windows, "window": table.window, "text": self._text}
        speed = None if table.speed is None else vars(table.speed)
        self._all = case_digest(of_tasks | of_rest | {"speed": speed})

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
            case, cost = self._cases(model, point)
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

    def is_done(self, branches: Branches, layers: LayerSet, point: Mapping[str, object]) -> bool:
        """Whether everything about a placement is recorded."""
        with branches.placed(layers) as model:
            return self._rows.has(self._cases(model, point)[1], LAST)

    def _cases(
        self, model: CausalLM, point: Mapping[str, object]
    ) -> tuple[dict[str, object], dict[str, object]]:
        """What all rows of a point say, and what that of its cache says."""
        case = model_case(self._name, model) | dict(point) | {"judge_seed": self._table.seed}
        case |= self._way()
        return case, case | {"context": max(self._table.contexts), "batch": 1, "all": self._all}

    def prepare(self, branches: Branches, placements: Sequence[LayerSet]) -> None:
        """Scores the recall tasks of all placements together, where the table asks for that."""
        tasks = [task for task in self._table.tasks if task in RECALL]
        if not self._table.teacher_forcing or not tasks:
            return
        with ExitStack() as stack:
            records = []
            for layers in dict.fromkeys(placements):
                with branches.placed(layers) as model:
                    records.append((layers, stack.enter_context(self._record(model))))
            for settings, shared, task in self._parts(tasks):
                samples = recall_samples(task, branches.model, self._name, settings, shared)
                title = f"{task}, {len(records)} placements"
                with self._progress(title, len(records) * len(samples)) as advance:
                    score_together(branches, samples, records, settings.limits.rows, advance)

    def _record(self, model: CausalLM) -> Record:
        """The outcomes of a placed model; the rule says nothing about what it answers."""
        impl = implementation(model, self._runtime.impl, max(self._table.contexts))
        own = model_case(self._name, model) | {"impl": impl, "seed": self._table.seed}
        own |= {"device": device_name(model.device)} | self._way()
        return Record(self._samples / f"{case_digest(own)}.jsonl", self._name, own)

    def _way(self) -> dict[str, object]:
        """What rows and samples say of how answers are scored: other settings are not mixed."""
        way: dict[str, object] = {"judged_by": self._judged_by}
        return way | {"teacher_forcing": True} if self._table.teacher_forcing else way

    def _parts(self, tasks: Sequence[str]) -> Iterator[tuple[Settings, Shared, str]]:
        both = zip(self._settings, self._shared, strict=True)
        for number, (settings, shared) in enumerate(both):
            for task in tasks:
                if not number or (task in RECALL and task not in _WITHOUT_PROSE):
                    yield settings, shared, task

    def _tasks(
        self, model: CausalLM, case: Mapping[str, object], impl: str, title: str
    ) -> list[Outcome]:
        table = self._table
        with self._record(model) as record:
            for settings, shared, task in self._parts(table.tasks):
                for job in jobs(task, model, self._name, settings, shared):
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
        name = {"text": self._text, "window": table.window}
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
        """Timed once for each mix of layers: where they are changes nothing about the work."""
        speed = self._table.speed
        if speed is None:
            return
        from tools.benchmarks.decode import Job, measure_ours

        metric, unit = "decode_tokens_per_second", "tokens/s"
        sizes = {"batch": speed.batch_size, "prompt": speed.prompt, "new": speed.new}
        of_mix = model_case(self._name, model) | sizes | {"impl": impl}
        of_mix["layers"] = dict(sorted(Counter(model.config.layer_types).items()))
        value = self._rows.value(of_mix, metric)
        if value is None:
            job = Job(
                batch_size=speed.batch_size, prompt=speed.prompt, new=speed.new, compile=False
            )
            value = speed.batch_size / measure_ours(model, job).step
            self._rows.add(of_mix, metric, value, impl=impl, unit=unit)
        self._rows.add(dict(case) | sizes, metric, value, impl=impl, unit=unit)


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
