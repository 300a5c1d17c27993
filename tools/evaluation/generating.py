"""run_samples: lets a model continue prompts and grades what it writes, batch by batch."""

import math
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import groupby
from typing import Protocol

import torch

import zoo
from tools.evaluation.outcome import Outcome
from tools.evaluation.record import Key, key_of
from tools.evaluation.samples import Sample, grade
from tools.scoring.tokens import score_tokens

ACCURACY, LOG_LIKELIHOOD = "accuracy", "log_likelihood"


class Writer(Protocol):
    """What continues prompts."""

    def write(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        """The most likely continuation of each prompt, at most so many tokens of it."""
        ...

    def log_likelihoods(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]]
    ) -> list[float]:
        """Of each answer as a whole, in nats, right behind its prompt."""
        ...


class ModelWriter:
    """A model from `zoo.load`, which writes greedily.

    Args:
        model: it has a tokenizer.
        compile: run through torch.compile.
    """

    def __init__(self, model: zoo.CausalLM, *, compile: bool = False) -> None:
        self._model, self._compile = model, compile

    def write(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        written = zoo.generate(
            self._model, list(prompts), max_new_tokens=max_new_tokens, compile=self._compile
        )
        return [row.text for row in written]

    def log_likelihoods(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]]
    ) -> list[float]:
        rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
        # What stands behind a row changes nothing in it.
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        first = min(len(prompt) for prompt in prompts)
        every = score_tokens(self._model, ids, first=first).log_likelihood.cpu().double()
        return [
            every[i, len(prompt) - first : len(rows[i]) - first].sum().item()
            for i, prompt in enumerate(prompts)
        ]


def run_samples(
    writer: Writer,
    samples: Sequence[Sample],
    *,
    batch_size: int = 1,
    log_likelihood: bool = True,
    done: Set[Key] = frozenset(),
    advance: Callable[[int], None] = lambda items: None,
) -> Iterator[Outcome]:
    """Grades samples; outcomes come batch by batch, so that a stopped run can go on.

    Args:
        writer: continues the prompts.
        samples: in the order in which they are scored, neighbours in batches.
        batch_size: prompts that are continued at once.
        log_likelihood: also give that of the expected answer.
        done: samples with these outcomes are left out, see `key_of`.
        advance: called with the number of samples that are settled.

    Yields:
        Of each sample its accuracy, 0 to 1, and perhaps a log-likelihood in nats.

    Raises:
        ValueError: `batch_size` is not positive, or a log-likelihood is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    metrics = [ACCURACY, LOG_LIKELIHOOD] if log_likelihood else [ACCURACY]
    left = []
    for sample in samples:
        blank = [_outcome(sample, metric, 0.0) for metric in metrics]
        if not all(key_of(outcome) in done for outcome in blank):
            left.append(sample)
    advance(len(samples) - len(left))
    # How many tokens a row may write must not depend on what is beside it.
    for limit, group in groupby(left, key=lambda sample: sample.max_new_tokens):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            yield from _run_batch(writer, batch, limit, log_likelihood)
            advance(len(batch))


def _run_batch(
    writer: Writer, batch: Sequence[Sample], limit: int, log_likelihood: bool
) -> Iterator[Outcome]:
    prompts = [sample.prompt_ids for sample in batch]
    texts = writer.write(prompts, limit)
    values = [math.nan] * len(batch)
    if log_likelihood:
        values = writer.log_likelihoods(prompts, [sample.answer_ids for sample in batch])
        if not all(math.isfinite(value) for value in values):
            raise ValueError(
                "the model's logits are not finite numbers; try another dtype, such as float32"
            )
    for sample, text, value in zip(batch, texts, values, strict=True):
        yield _outcome(sample, ACCURACY, grade(text, sample.answers, sample.match))
        if log_likelihood:
            yield _outcome(sample, LOG_LIKELIHOOD, value)


def _outcome(sample: Sample, metric: str, value: float) -> Outcome:
    return Outcome(
        task=sample.task, cell=sample.cell, item=sample.item, metric=metric, value=value
    )
