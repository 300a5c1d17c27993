"""TaskRun: the items of one of the harness's tasks, from prompts to outcomes.

Requests, filters and results are made by the task's own functions, as the harness's `evaluate`
calls them; its metrics become values and weights whose ratio is the harness's score.
"""

import logging
import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task

from tools.evaluation.harness.data import TASKS
from tools.evaluation.harness.far import UnrelatedText
from tools.evaluation.harness.tasks import quiet
from tools.evaluation.outcome import Outcome

log = logging.getLogger("zoo")

# From what a task says of one item to a value and a weight, by how the harness sums items up.
_AS_RATIO: dict[object, Callable[..., tuple[float, float]]] = {
    metrics.mean: lambda value: (float(value), 1.0),
    metrics.perplexity: lambda value: (-value, 1.0),
    metrics.weighted_perplexity: lambda pair: (-pair[0], pair[1]),
    metrics.bits_per_byte: lambda pair: (-pair[0] / math.log(2), pair[1]),
}


@dataclass(frozen=True)
class _Item:
    name: str
    doc: dict[str, object]
    instances: list[Instance]


class TaskRun:
    """One task on one model.

    Args:
        lm: the model, as the harness wants it.
        model_name, name: of the model and of the task.
        task: from `load_tasks`.
        far: tokens of text before every prompt, at least.
        passages: that text; None where `far` is 0.
        done: (task, item, metric) that are not computed again.
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
        done: Set[tuple[str, str, str]],
    ) -> None:
        self._lm, self._model_name = lm, model_name
        self._name, self._task = name, task
        self._far, self._passages, self._done = far, passages, done
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
        waiting: list[_Item] = []
        with quiet():  # the task prepares its data set once more
            docs = self._task.doc_iterator(limit=limit)
        for number, doc in docs:
            name = str(number)
            if all((self._name, name, metric) in self._done for metric in self._metrics()):
                advance(1)
                continue
            waiting.append(_Item(name, doc, self._requests(number, doc)))
            if len(waiting) == at_once:
                yield from self._scored(waiting)
                advance(len(waiting))
                waiting = []
        if waiting:
            yield from self._scored(waiting)
            advance(len(waiting))

    def _metrics(self) -> list[str]:
        filters = [ensemble.name for ensemble in self._task._filters]
        return [self._metric(metric, name) for name in filters for metric in self._ways]

    def _metric(self, metric: str, filter_name: str) -> str:
        """A task that reads its answers in several ways has each metric for each of them."""
        return metric if len(self._task._filters) == 1 else f"{metric},{filter_name}"

    def _requests(self, number: int, doc: dict[str, object]) -> list[Instance]:
        """What the harness's `build_all_requests` makes of one item; and the text before it."""
        task = self._task
        context = task.fewshot_context(
            doc, num_fewshot=task.config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(doc)
        )
        made = task.construct_requests(
            doc=doc, ctx=context, metadata=(self._name, number, task.config.repeats)
        )
        instances = made if isinstance(made, list) else [made]
        if self._passages is not None:
            local = TASKS.get(self._name)
            if local is not None and local.answers is not None:
                answers = local.answers(doc)
            else:
                answers = _answers(task, doc, instances)
            passage = self._passages.passage(f"{self._name} {number}", answers)
            self._check_size(passage, instances)
            for instance in instances:
                prompt, *rest = instance.arguments
                instance.arguments = (f"{passage}\n\n{prompt}", *rest)
        return instances

    def _check_size(self, passage: str, instances: list[Instance]) -> None:
        there = len(self._lm.tok_encode(passage))
        if there < self._far:
            raise ValueError(
                f"{self._model_name} reads {self._far} words as {there} tokens only; ask for "
                "more (far)"
            )
        texts = ["".join(part for part in x.args if isinstance(part, str)) for x in instances]
        size = there + len(self._lm.tok_encode(max(texts, key=len)))
        if size > self._lm.max_length:
            raise ValueError(
                f"an item of {self._name} behind {self._far} words has {size} tokens, more than "
                f"{self._model_name}'s context of {self._lm.max_length}; ask for less (far)"
            )

    def _scored(self, items: list[_Item]) -> Iterator[Outcome]:
        instances = [instance for item in items for instance in item.instances]
        by_type: dict[str, list[Instance]] = {}
        for instance in instances:
            by_type.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
        for kind, requests in by_type.items():
            answers = getattr(self._lm, kind)(requests, disable_tqdm=True)
            for request, answer in zip(requests, answers, strict=True):
                request.resps.append(answer)
        for ensemble in self._task._filters:
            ensemble.apply(instances)
            for item in items:
                ordered = sorted(item.instances, key=lambda instance: instance.idx)
                found = self._task.process_results(
                    item.doc, [instance.filtered_resps[ensemble.name] for instance in ordered]
                )
                for metric, way in self._ways.items():
                    shown = self._metric(metric, ensemble.name)
                    if metric not in found or (self._name, item.name, shown) in self._done:
                        continue
                    value, weight = way(found[metric])
                    yield Outcome(
                        task=self._name,
                        cell={"far": self._far},
                        item=item.name,
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
