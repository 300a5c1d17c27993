"""run_samples: lets a model continue prompts and grades what it writes, batch by batch."""

import math
from collections.abc import Callable, Iterator, Sequence, Set
from typing import NamedTuple, Protocol

import zoo
from tools.evaluation.batches import ONE_ROW, BatchLimits
from tools.evaluation.outcome import Outcome
from tools.evaluation.record import Key, key_of
from tools.evaluation.samples import Sample, grade

ACCURACY, LOG_LIKELIHOOD = "accuracy", "log_likelihood"


class Written(NamedTuple):
    """What a model made of a prompt.

    Attributes:
        text: its most likely continuation.
        log_likelihood: of the expected answer as a whole, in nats, right behind the prompt; None
            where that was not asked for.
    """

    text: str
    log_likelihood: float | None = None


class Writer(Protocol):
    """What continues prompts."""

    def write(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        answers: Sequence[list[int]] | None = None,
    ) -> list[Written]:
        """Continues each prompt by at most so many tokens; scores `answers`, if there are any."""
        ...


class ModelWriter:
    """A model from `zoo.load`, which writes greedily.

    Args:
        model: it has a tokenizer.
        compile: run what reads prompts through torch.compile.
        prefill_tokens: see `zoo.generate`.
    """

    def __init__(
        self, model: zoo.CausalLM, *, compile: bool = False, prefill_tokens: int | None = None
    ) -> None:
        self._model, self._compile, self._prefill_tokens = model, compile, prefill_tokens

    def write(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        answers: Sequence[list[int]] | None = None,
    ) -> list[Written]:
        rows = zoo.generate(
            self._model,
            list(prompts),
            max_new_tokens=max_new_tokens,
            compile="prefill" if self._compile else False,
            prefill_tokens=self._prefill_tokens,
            answers=answers,
        )
        return [Written(row.text, row.answer_log_likelihood) for row in rows]


def run_samples(
    writer: Writer,
    samples: Sequence[Sample],
    *,
    limits: BatchLimits = ONE_ROW,
    log_likelihood: bool = True,
    done: Set[Key] = frozenset(),
    advance: Callable[[int], None] = lambda items: None,
) -> Iterator[Outcome]:
    """Grades samples; outcomes come batch by batch, so that a stopped run can go on.

    Args:
        writer: continues the prompts.
        samples: in any order.
        limits: of what is computed at once.
        log_likelihood: also give that of the expected answer.
        done: samples with these outcomes are left out, see `key_of`.
        advance: called with the number of samples that are settled.

    Yields:
        Of each sample its accuracy, 0 to 1, and perhaps a log-likelihood in nats.

    Raises:
        ValueError: a log-likelihood is not finite.
    """
    metrics = [ACCURACY, LOG_LIKELIHOOD] if log_likelihood else [ACCURACY]
    # How many tokens a row may write must not depend on what is beside it.
    alike: dict[int, list[Sample]] = {}
    for sample in samples:
        if all(key_of(_outcome(sample, metric, 0.0)) in done for metric in metrics):
            advance(1)
        else:
            alike.setdefault(sample.max_new_tokens, []).append(sample)
    for limit, group in alike.items():
        for batch in limits.batches(group, lambda sample: len(sample.prompt_ids)):
            yield from _run_batch(writer, batch, limit, log_likelihood)
            advance(len(batch))


def _run_batch(
    writer: Writer, batch: Sequence[Sample], limit: int, log_likelihood: bool
) -> Iterator[Outcome]:
    answers = [sample.answer_ids for sample in batch] if log_likelihood else None
    written = writer.write([sample.prompt_ids for sample in batch], limit, answers)
    values = [math.nan if row.log_likelihood is None else row.log_likelihood for row in written]
    if log_likelihood and not all(math.isfinite(value) for value in values):
        raise ValueError(
            "the model's logits are not finite numbers; try another dtype, such as float32"
        )
    for sample, row, value in zip(batch, written, values, strict=True):
        yield _outcome(sample, ACCURACY, grade(row.text, sample.answers, sample.match))
        if log_likelihood:
            yield _outcome(sample, LOG_LIKELIHOOD, value)


def _outcome(sample: Sample, metric: str, value: float) -> Outcome:
    return Outcome(
        task=sample.task, cell=sample.cell, item=sample.item, metric=metric, value=value
    )
