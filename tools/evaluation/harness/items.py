"""TaskRun: the items of one of the harness's tasks, from prompts to outcomes.

Requests, filters and results are made by the task's own functions, as the harness's `evaluate`
calls them; its metrics become values and weights whose ratio is the harness's score.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task

from tools.evaluation.harness.data import TASKS
from tools.evaluation.harness.far import UnrelatedText
from tools.evaluation.harness.model import Encoded, ZooLM
from tools.evaluation.harness.tasks import quiet
from tools.evaluation.outcome import Outcome
from tools.evaluation.shared import Shared

log = logging.getLogger("zoo")

# From what a task says of one item to a value and a weight, by how the harness sums items up.
_AS_RATIO: dict[object, Callable[..., tuple[float, float]]] = {
    metrics.mean: lambda value: (float(value), 1.0),
    metrics.perplexity: lambda value: (-value, 1.0),
    metrics.weighted_perplexity: lambda pair: (-pair[0], pair[1]),
    metrics.bits_per_byte: lambda pair: (-pair[0] / math.log(2), pair[1]),
}


@dataclass(frozen=True)
class _Prompt:
    """What is asked of every model: an item's requests, in the harness's order."""

    name: str
    doc: dict[str, object]
    instances: list[Instance]
    passage: str | None


class _Tokens(NamedTuple):
    """Of an item whose requests are log-likelihoods: each of them, and the size of its passage."""

    encoded: list[Encoded]
    passage: int


@dataclass(frozen=True)
class _Item:
    """The same for one model; `tokens` for a `ZooLM`."""

    prompt: _Prompt
    instances: list[Instance]
    tokens: _Tokens | None


class TaskRun:
    """One task on one model.

    Args:
        lm: the model, as the harness wants it.
        model_name, name: of the model and of the task.
        task: from `load_tasks`.
        far: tokens of text before every prompt, at least.
        passages: that text; None where `far` is 0.
        suffix: of the items' names, which says of what data they are.
        done: (task, item, metric) that are not computed again.
        shared: what an earlier model has left.
    """

    def __init__(
        self,
        lm: TemplateLM,
        model_name: str,
        name: str,
        task: Task,
        *,
        far: int,
        passages: UnrelatedText | None,
        suffix: str,
        done: Set[tuple[str, str, str]],
        shared: Shared,
    ) -> None:
        self._lm, self._model_name = lm, model_name
        self._name, self._task, self._suffix = name, task, suffix
        self._far, self._passages, self._done = far, passages, done
        self._shared = shared
        ways = task.aggregation()
        self._ways = {metric: _AS_RATIO[how] for metric, how in ways.items() if how in _AS_RATIO}
        left_out = sorted(set(ways) - set(self._ways))
        if not self._ways:
            raise ValueError(
                f"no metric of {name} is a mean over items ({', '.join(left_out)}); run the "
                "harness itself: python -m tools.evaluation.harness --model zoo"
            )
        if left_out:
            log.warning("%s: without %s, no mean over items", name, ", ".join(left_out))

    def outcomes(
        self, limit: int | None, at_once: int, advance: Callable[[int], None]
    ) -> Iterator[Outcome]:
        """Scores the items in order, `at_once` of them together."""
        waiting: list[tuple[int, dict[str, object]]] = []
        docs = self._shared.once(("docs", self._name, limit), lambda: self._docs(limit))
        for number, doc in docs:
            name = f"{number}{self._suffix}"
            if all((self._name, name, metric) in self._done for metric in self._metrics()):
                advance(1)
                continue
            waiting.append((number, doc))
            if len(waiting) == at_once:
                yield from self._scored(self._items(waiting))
                advance(len(waiting))
                waiting = []
        if waiting:
            yield from self._scored(self._items(waiting))
            advance(len(waiting))

    def _docs(self, limit: int | None) -> list[tuple[int, dict[str, object]]]:
        with quiet():  # the task prepares its data set once more
            return list(self._task.doc_iterator(limit=limit))

    def _metrics(self) -> list[str]:
        filters = [ensemble.name for ensemble in self._task._filters]
        return [self._metric(metric, name) for name in filters for metric in self._ways]

    def _metric(self, metric: str, filter_name: str) -> str:
        """A task that reads its answers in several ways has each metric for each of them."""
        return metric if len(self._task._filters) == 1 else f"{metric},{filter_name}"

    def _items(self, docs: Sequence[tuple[int, dict[str, object]]]) -> list[_Item]:
        prompts = [self._prompt(number, doc) for number, doc in docs]
        tokens: list[_Tokens | None] = [None] * len(prompts)
        if isinstance(self._lm, ZooLM):
            numbers = tuple(number for number, _ in docs)
            key = ("tokens", self._name, self._far, self._lm.tokenizer, numbers)
            lm = self._lm
            tokens = self._shared.once(key, lambda: self._encoded(lm, prompts))
        # Instances hold what a model answers.
        fresh = [
            [replace(instance, resps=[], filtered_resps={}) for instance in prompt.instances]
            for prompt in prompts
        ]
        items = [_Item(*parts) for parts in zip(prompts, fresh, tokens, strict=True)]
        for item in items:
            self._check_size(item)
        return items

    def _prompt(self, number: int, doc: dict[str, object]) -> _Prompt:
        """What the harness's `build_all_requests` makes of one item; and the text before it."""
        key = ("requests", self._name, number)
        instances = self._shared.once(key, lambda: self._requests(number, doc))
        name = f"{number}{self._suffix}"
        passages = self._passages
        if passages is None:
            return _Prompt(name, doc, instances, None)
        local = TASKS.get(self._name)
        if local is not None and local.answers is not None:
            answers = local.answers(doc)
        else:
            answers = _answers(self._task, doc, instances)
        passage = self._shared.once(
            ("passage", self._name, self._far, number),
            lambda: passages.passage(f"{self._name} {number}", answers),
        )
        behind = []
        for instance in instances:
            prompt, *rest = instance.arguments
            behind.append(replace(instance, arguments=(f"{passage}\n\n{prompt}", *rest)))
        return _Prompt(name, doc, behind, passage)

    def _requests(self, number: int, doc: dict[str, object]) -> list[Instance]:
        task = self._task
        context = task.fewshot_context(
            doc, num_fewshot=task.config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(doc)
        )
        made = task.construct_requests(
            doc=doc, ctx=context, metadata=(self._name, number, task.config.repeats)
        )
        return made if isinstance(made, list) else [made]

    def _encoded(self, lm: ZooLM, prompts: Sequence[_Prompt]) -> list[_Tokens | None]:
        """The tokens of each item whose requests are log-likelihoods."""
        chosen = [
            prompt
            for prompt in prompts
            if all(instance.request_type == "loglikelihood" for instance in prompt.instances)
        ]
        encoded = iter(lm.encode_pairs([x.args for prompt in chosen for x in prompt.instances]))
        passages = map(len, lm.encode_all([prompt.passage or "" for prompt in chosen]))
        found = {
            prompt.name: _Tokens([next(encoded) for _ in prompt.instances], size)
            for prompt, size in zip(chosen, passages, strict=True)
        }
        return [found.get(prompt.name) for prompt in prompts]

    def _check_size(self, item: _Item) -> None:
        passage = item.prompt.passage
        if passage is None:
            return
        if item.tokens is not None:
            there = item.tokens.passage
            size = max(len(context) + len(rest) for _, context, rest in item.tokens.encoded)
        else:
            there = len(self._lm.tok_encode(passage))
            texts = ["".join(x for x in y.args if isinstance(x, str)) for y in item.instances]
            size = len(self._lm.tok_encode(max(texts, key=len)))
        if there < self._far:
            raise ValueError(
                f"{self._model_name} reads {self._far} words as {there} tokens only; ask for "
                "more (far)"
            )
        if size > self._lm.max_length:
            raise ValueError(
                f"an item of {self._name} behind {self._far} words has {size} tokens, more than "
                f"{self._model_name}'s context of {self._lm.max_length}; ask for less (far)"
            )

    def _scored(self, items: list[_Item]) -> Iterator[Outcome]:
        instances = [instance for item in items for instance in item.instances]
        encoded: list[Encoded] = []
        of_encoded: list[Instance] = []
        by_type: dict[str, list[Instance]] = {}
        for item in items:
            for number, instance in enumerate(item.instances):
                times = [instance] * instance.repeats
                if item.tokens is None:
                    by_type.setdefault(instance.request_type, []).extend(times)
                else:
                    encoded += [item.tokens.encoded[number]] * instance.repeats
                    of_encoded += times
        if encoded:
            found = self._lm._loglikelihood_tokens(encoded, disable_tqdm=True)
            for request, answer in zip(of_encoded, found, strict=True):
                request.resps.append(answer)
        for kind, requests in by_type.items():
            answers = getattr(self._lm, kind)(requests, disable_tqdm=True)
            for request, answer in zip(requests, answers, strict=True):
                request.resps.append(answer)
        for ensemble in self._task._filters:
            ensemble.apply(instances)
            for item in items:
                ordered = sorted(item.instances, key=lambda instance: instance.idx)
                results = self._task.process_results(
                    item.prompt.doc,
                    [instance.filtered_resps[ensemble.name] for instance in ordered],
                )
                for metric, way in self._ways.items():
                    shown = self._metric(metric, ensemble.name)
                    if (
                        metric not in results
                        or (self._name, item.prompt.name, shown) in self._done
                    ):
                        continue
                    value, weight = way(results[metric])
                    yield Outcome(
                        task=self._name,
                        cell={"far": self._far},
                        item=item.prompt.name,
                        metric=shown,
                        value=value,
                        weight=weight,
                    )


def _answers(task: Task, doc: dict[str, object], instances: list[Instance]) -> list[str]:
    """Every choice, right or wrong; where a text is generated, what it should be."""
    choices = [x.args[1] for x in instances if x.request_type == "loglikelihood"]
    if choices:
        return choices
    target = task.doc_to_target(doc)
    return [str(text) for text in target] if isinstance(target, list) else [str(target)]
