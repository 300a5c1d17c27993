"""Searcher: finds the exact layers of a model by any of the rules that search."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from recipes.placement import (
    SEARCHED,
    Found,
    LayerSet,
    Scores,
    drop_one,
    greedy,
    most_missed,
    ratio_of_drops,
    restore_one,
    top,
)
from tools.placement.branches import Branches
from tools.placement.candidates import Candidates
from tools.placement.gap import GapScorer
from tools.placement.gates import GateStep, by_gate, learn_gates
from tools.placement.objectives import Divergence, Objective, Perplexity, Retrieval
from tools.placement.scoring import Advance, CommonsenseScorer, Scored, Scorer, SweepScorer
from tools.placement.settings import (
    COMMONSENSE_TASKS,
    RECALL_TASKS,
    SearchSettings,
    check_length,
)

# Rows of a block when nobody says: those of a batch under so many placements.
_PLACEMENTS_AT_ONCE = 8

Progress = Callable[[str, int | None], AbstractContextManager[Advance]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a search has found.

    Attributes:
        found: the placement.
        none, placed, all: what no exact layer, these, and all of them are worth.
    """

    found: Found
    none: Scored
    placed: Scored
    all: Scored


class Searcher:
    """The searches of one model.

    Args:
        branches: the model.
        model_name: for messages.
        settings: what is read.
        candidates: remembers scores.
        progress: makes a bar of a title and a length, see `tools.display.progress`.

    Raises:
        ValueError: the model has no tokenizer.
    """

    def __init__(
        self,
        branches: Branches,
        model_name: str,
        settings: SearchSettings,
        candidates: Candidates,
        progress: Progress,
    ) -> None:
        if branches.model.tokenizer is None:
            raise ValueError(f"a search needs a tokenizer, which {model_name} does not have")
        longest = branches.model.config.max_position_embeddings
        for what, tokens in (("context", max(settings.contexts)), ("window", settings.window)):
            if tokens > longest:
                raise ValueError(f"a {what} of {tokens} exceeds that of {model_name}, {longest}")
        self._branches, self._model_name, self._settings = branches, model_name, settings
        self._tokenizer = branches.model.tokenizer
        self._candidates, self._progress = candidates, progress
        self._scorers: dict[str, Scorer] = {}

    def find(self, rule: str, count: int) -> Result:
        """The `count` exact layers that a rule finds, and what they are worth.

        Raises:
            ValueError: there is no such rule, or there are not so many layers.
        """
        if rule not in SEARCHED:
            raise ValueError(f"there is no rule {rule!r} that searches; {', '.join(SEARCHED)}")
        layers = self._branches.layers
        most = len(layers)
        if not 1 <= count <= most:
            raise ValueError(f"the budget must be 1 to {most}, the layers there are, not {count}")
        way, _, objective = rule.partition("_")
        objective = objective or "recall"
        if way == "greedy":
            total = sum(most - size for size in range(count))
            with self._counting(rule, objective, total) as scores:
                found = greedy(scores, layers, count, exchanges=self._settings.exchanges)[-1]
        elif way == "restore":
            with self._counting(rule, objective, most) as scores:
                found = top(restore_one(scores, layers), count)
        elif way == "drop":
            with self._counting(rule, objective, most) as scores:
                found = top(most_missed(scores, layers), count)
        elif way == "gates":
            found = top(by_gate(layers, self._gates(rule, objective, count).gates), count)
        else:
            self._scorer("commonsense")  # first: what it lacks shows before the recall is scored
            with self._counting("halo, recall", "recall", most) as scores:
                recall = drop_one(scores, layers)
            with self._counting("halo, common sense", "commonsense", most) as scores:
                sense = drop_one(scores, layers)
            found = top(ratio_of_drops(recall, sense), count)
        none, placed, all_ = self.scored(objective, [(), found.layers, layers])
        return Result(found=found, none=none, placed=placed, all=all_)

    def scored(self, objective: str, placements: Sequence[LayerSet]) -> list[Scored]:
        """Scores placements.

        Args:
            objective: "retrieval", "perplexity", "both", "kl", "recall" or "commonsense".
            placements: exact layers.
        """
        return self._candidates.score(self._scorer(objective), placements, lambda steps: None)

    def sharing(self) -> tuple[int, int]:
        """Blocks that were run, and that one forward pass for each placement would have run."""
        sweeps = [x for x in self._scorers.values() if isinstance(x, SweepScorer)]
        return sum(x.blocks for x in sweeps), sum(x.blocks_alone for x in sweeps)

    @contextmanager
    def _counting(self, title: str, objective: str, placements: int) -> Iterator[Scores]:
        """Scores of so many placements, with a bar."""
        scorer = self._scorer(objective)
        with self._progress(title, scorer.steps(placements)) as advance:

            def scores(sets: Sequence[LayerSet]) -> list[float]:
                return [x.score for x in self._candidates.score(scorer, sets, advance)]

            yield scores

    def _gates(self, rule: str, objective: str, budget: int) -> GateStep:
        settings = self._settings
        name = f"{rule}, budget {budget}, {settings.steps} steps, batch {settings.batch_size}"
        last = self._candidates.last_step(name)
        with self._progress(rule, settings.steps) as advance:
            advance(0 if last is None else last.step)
            for step in learn_gates(
                self._branches,
                self._objective(objective),
                budget=budget,
                steps=settings.steps,
                batch_size=settings.batch_size,
                seed=settings.seed,
                done=last,
            ):
                self._candidates.add_step(name, step)
                advance(1)
        found = self._candidates.last_step(name)
        assert found is not None
        return found

    def _scorer(self, name: str) -> Scorer:
        if name not in self._scorers:
            self._scorers[name] = self._make_scorer(name)
        return self._scorers[name]

    def _make_scorer(self, name: str) -> Scorer:
        settings = self._settings
        if name == "both":
            parts = [self._scorer("retrieval"), self._scorer("perplexity")]
            return GapScorer(name, parts, self._candidates, self._branches.layers)
        if name == "commonsense":
            if settings.data is None:
                raise ValueError(
                    "the rule halo reads files of common sense; name their folder with --data"
                )
            return CommonsenseScorer(
                self._branches,
                self._model_name,
                COMMONSENSE_TASKS,
                data=settings.data,
                far=settings.far,
                limit=settings.limit,
                batch_size=settings.batch_size,
                seed=settings.seed,
            )
        return SweepScorer(
            self._branches,
            self._objective(name),
            batch_size=settings.batch_size,
            rows=settings.rows or settings.batch_size * _PLACEMENTS_AT_ONCE,
            share=settings.share,
        )

    def _objective(self, name: str) -> Objective:
        settings, tokenizer = self._settings, self._tokenizer
        eva = self._branches.model.config.eva
        check_length(eva, name, settings.contexts, settings.window)
        if name in ("retrieval", "recall"):
            tasks = settings.tasks if name == "retrieval" else RECALL_TASKS
            return Retrieval(settings.samples(tokenizer, tasks), name=name)
        windows = settings.cut_text(tokenizer)
        return Divergence(windows) if name == "kl" else Perplexity(windows)
