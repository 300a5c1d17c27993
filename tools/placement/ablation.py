"""run_ablation: every point of a sweep, searched and judged, but those that are done."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from flasheva import EvaConfig
from recipes import layer_types, sliding_layers
from recipes.ablation import Ablation
from recipes.placement import SEARCHED, LayerSet, Placement, Rule, exact_layers
from tools.evaluation.recall.fillers import text_filler
from tools.evaluation.suite import check_contexts, check_tasks, choose_tasks
from tools.measurement import implementation, model_case
from tools.model_options import RuntimeOptions, SourceOptions
from tools.placement.branches import Branches
from tools.placement.candidates import Candidates
from tools.placement.judge import Judge
from tools.placement.result_rows import ResultRows
from tools.placement.searcher import Progress, Searcher
from tools.placement.settings import SearchSettings, check_length
from tools.placement.target import branches_of, search_case
from zoo.config import ModelConfig
from zoo.description import describe

log = logging.getLogger("zoo")

NONE, ALL = "none", "all"


@dataclass(frozen=True)
class Point:
    """One placement of a sweep: a rule with a number of exact layers, and a seed if it has one."""

    rule: str
    count: int
    seed: int | None = None

    def case(self) -> dict[str, object]:
        """What its rows say of it."""
        named = {"rule": self.rule, "count": self.count}
        return named if self.seed is None else named | {"seed": self.seed}


def points(ablation: Ablation) -> Iterator[Point]:
    """The points of one pair of sizes: without an exact layer first, then rule by rule."""
    yield Point(NONE, 0)
    for rule in ablation.rules:
        seeds: Sequence[int | None] = [None]
        if rule == "random":
            seeds = ablation.seeds
        elif rule in SEARCHED:
            seeds = ablation.search.seeds
        for seed in seeds:
            for count in sorted(set(ablation.counts)):
                yield Point(rule, count, seed)


def check_ablation(ablation: Ablation) -> ModelConfig:
    """Refuses what would fail only after hours; the config of the published model.

    Raises:
        ValueError: an unknown model or task, a missing file, a count or a context out of range.
    """
    config = describe(ablation.model)
    most = config.num_hidden_layers - len(sliding_layers(config.layer_types))
    if max(ablation.counts) > most:
        raise ValueError(
            f"a count of {max(ablation.counts)} exceeds the {most} layers of {ablation.model}"
        )
    judge, search = ablation.judge, ablation.search
    for window, chunk in ablation.sizes:
        eva = _eva(ablation, window, chunk)
        for objective in dict.fromkeys(_objectives(ablation.rules)):
            options = ("search.contexts of", "search.window of")
            check_length(eva, objective, search.contexts, search.window, options=options)
    files = [*judge.texts, *search.texts, search.text, judge.perplexity_text]
    for path in files:
        if path is not None and not path.is_file():
            raise ValueError(f"there is no file {path}")
    searched, judged = (
        {text_filler(path).name.rpartition("-")[2]: path for path in paths if path is not None}
        for paths in ((*search.texts, search.text), (*judge.texts, judge.perplexity_text))
    )
    for checksum in searched.keys() & judged.keys():
        raise ValueError(
            f"{judged[checksum].name} is searched with and judged with; give [judge] another text"
        )
    longest, speed = config.max_position_embeddings, judge.speed
    if judge.perplexity_text is not None and judge.window > longest:
        raise ValueError(f"judge.window must be at most {longest}, not {judge.window}")
    if speed is not None and speed.prompt + speed.new > longest:
        raise ValueError(
            f"judge.speed: prompt and new must be at most {longest} together, not "
            f"{speed.prompt} + {speed.new}"
        )
    choose_tasks(judge.tasks)
    if "halo" in ablation.rules and search.data is None:
        raise ValueError("the rule halo reads files of common sense; give [search] their data")
    return config


def run_ablation(
    ablation: Ablation,
    source: SourceOptions,
    runtime: RuntimeOptions,
    *,
    work: Path,
    out: Path,
    progress: Progress,
) -> list[str]:
    """Measures every point that `out` lacks.

    Args:
        ablation: what is swept.
        source, runtime: how the model is loaded.
        work: a folder for scored candidates and samples; made if need be.
        out: the rows of results.
        progress: makes bars.

    Returns:
        What no layers could be found for, and why, a line for each: one rule that does not fit the
        texts or lacks a file does not cost the others their hours.

    Raises:
        ValueError: see `check_ablation`.
    """
    config = check_ablation(ablation)
    refused: list[str] = []
    types = layer_types(
        (), config.num_hidden_layers, ablation.attention, sliding_layers(config.layer_types)
    )
    work.mkdir(parents=True, exist_ok=True)
    for number, (window, chunk) in enumerate(ablation.sizes):
        eva = _eva(ablation, window, chunk)
        branches = branches_of(ablation.model, source, runtime, eva, types)
        rows = ResultRows(out, branches.model.device)
        judge = Judge(ablation.model, ablation.judge, runtime, work, rows, progress)
        for settings in judge.settings:
            check_tasks(ablation.judge.tasks, settings)
            check_contexts(ablation.model, branches.model.config, settings)
        with _Sweep(ablation, branches, runtime, work, progress) as sweep:
            placed = []
            for point in points(ablation):
                with _noting(refused, f"{point.rule} {point.count} at {window}/{chunk}"):
                    placed.append((point, sweep.layers(point)))
            if number == 0:
                placed.insert(0, (Point(ALL, len(branches.layers)), branches.layers))
            left = [x for x in placed if not judge.is_done(branches, x[1], x[0].case())]
            judge.prepare(branches, [layers for _, layers in left])
            for point, layers in left:
                judge.judge(branches, layers, point.case())
            if number == 0:
                sweep.importance(rows, refused)
        del branches, judge, sweep
    return refused


@contextmanager
def _noting(refused: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        refused.append(f"{what}: {error}")
        log.warning("%s", refused[-1])


class _Sweep(ExitStack):
    """The placements of one pair of sizes; prompts are drawn once for each seed."""

    def __init__(
        self,
        ablation: Ablation,
        branches: Branches,
        runtime: RuntimeOptions,
        work: Path,
        progress: Progress,
    ) -> None:
        super().__init__()
        self._ablation, self._branches, self._runtime = ablation, branches, runtime
        self._path, self._progress = work / "candidates.jsonl", progress
        self._settings = search_settings(ablation)
        self._searchers: dict[int, Searcher] = {}

    def layers(self, point: Point) -> LayerSet:
        """The exact layers of a point."""
        if point.rule == NONE:
            return ()
        if point.rule in get_args(Rule):
            rule = Placement(rule=cast("Rule", point.rule), count=point.count, seed=point.seed)
            return exact_layers(rule, self._branches.depth, self._branches.sliding)
        assert point.seed is not None
        return self._searcher(point.seed).find(point.rule, point.count).found.layers

    def importance(self, rows: ResultRows, refused: list[str]) -> None:
        """What each layer by itself adds to the score that each searched rule goes by."""
        model, ablation = self._branches.model, self._ablation
        names = dict.fromkeys(
            rule.partition("_")[2]
            for rule in ablation.rules
            if rule.startswith(("greedy_", "restore_"))
        )
        if not names:
            return
        seed = ablation.search.seeds[0]
        impl = implementation(model, self._runtime.impl, max(ablation.search.contexts))
        own = model_case(ablation.model, model) | {"search": self._settings.case()}
        for name in names:
            sets: list[LayerSet] = [(), *((layer,) for layer in self._branches.layers)]
            with _noting(refused, f"importance for {name}"):
                none, *each = self._searcher(seed).scored(name, sets)
                for scored in each:
                    case = own | {"objective": name, "layer": scored.layers[0], "n": scored.n}
                    value = scored.score - none.score
                    unit = "" if name == "both" else "nats"
                    rows.add(case, "importance", value, impl=impl, unit=unit)

    def _searcher(self, seed: int) -> Searcher:
        if seed not in self._searchers:
            name = self._ablation.model
            settings = dataclasses.replace(self._settings, seed=seed)
            case = search_case(name, self._branches, self._runtime, settings)
            kept = self.enter_context(Candidates(self._path, name, case))
            self._searchers[seed] = Searcher(self._branches, name, settings, kept, self._progress)
        return self._searchers[seed]


def search_settings(ablation: Ablation) -> SearchSettings:
    """What the searches of a sweep read, with the first of their seeds."""
    table = ablation.search
    own = {field.name for field in dataclasses.fields(SearchSettings)}
    same = {name: value for name, value in vars(table).items() if name in own}
    same |= {
        "texts": tuple(text_filler(path) for path in table.texts),
        "text": None if table.text is None else text_filler(table.text),
        "seed": table.seeds[0],
    }
    return SearchSettings(**same)


def _objectives(rules: Sequence[str]) -> Iterator[str]:
    """What these rules score placements by, as `Searcher.scored` calls it."""
    for rule in rules:
        if rule in SEARCHED:
            objective = rule.partition("_")[2] or "recall"
            yield from ("retrieval", "perplexity") if objective == "both" else (objective,)


def _eva(ablation: Ablation, window: int, chunk: int) -> EvaConfig:
    fields = {"window_size": window, "chunk_size": chunk}
    return EvaConfig.from_dict({**ablation.eva, **fields})
