"""Objectives: what makes a placement good, as a number for each row; higher is better.

Retrieval: the log-likelihood of answers that stand far back. Perplexity and KL: of running text,
the loss and the divergence from the model with every layer exact.

Dims: B rows, T tokens, E hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tools.evaluation.samples import Sample

# Positions whose logits exist at a time, as in tools/scoring/tokens.py.
_POSITIONS = 512

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Rows of one length.

    Attributes:
        ids: int64 [B, T].
        first: index of the first token that is scored.
        wanted: bool [B, T - first], which of these tokens are.
        cells: of each row, what its score is reported by.
    """

    ids: Tensor
    first: int
    wanted: Tensor
    cells: Sequence[str]


class Objective(Protocol):
    """A score of final hidden states.

    Attributes:
        name: in records.
        needs_all: whether it compares with the model whose layers are all exact.
    """

    name: str
    needs_all: bool

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """What is read, at most so many rows at a time."""
        ...

    def values(
        self, head: Head, batch: Batch, hidden: Tensor, exact: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Of each row [B]: "score", and what else is to be recorded.

        `hidden` and, where it is needed, `exact` are what `head` takes, [B, T, E].
        """
        ...


class Retrieval:
    """The mean log-likelihood of answers, in nats an answer; and how many are right.

    An answer is right when each of its tokens is the most likely one, as in `zoo passkey`.

    Args:
        samples: from tools/evaluation; their prompt and answer are read as one row.
        name: in records.

    Attributes:
        samples: in the order in which batches have them.
    """

    needs_all = False

    def __init__(self, samples: Sequence[Sample], name: str = "retrieval") -> None:
        self.name = name
        if not samples:
            raise ValueError("a search for retrieval needs prompts, and there are none")
        # By length, so that no row is padded far; equal ones stay in the order of their cells.
        self.samples = sorted(samples, key=_size)

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self.samples), batch_size):
            part = self.samples[start : start + batch_size]
            width = max(map(_size, part))
            first = min(len(sample.prompt_ids) for sample in part)
            ids = torch.zeros(len(part), width, dtype=torch.int64)
            wanted = torch.zeros(len(part), width, dtype=torch.bool)
            for row, sample in enumerate(part):
                ids[row, : _size(sample)] = torch.tensor([*sample.prompt_ids, *sample.answer_ids])
                wanted[row, len(sample.prompt_ids) : _size(sample)] = True
            yield Batch(ids, first, wanted[:, first:], [_cell(sample) for sample in part])

    def values(
        self, head: Head, batch: Batch, hidden: Tensor, exact: Tensor | None
    ) -> Mapping[str, Tensor]:
        wanted = batch.wanted.to(hidden.device)
        targets = batch.ids.to(hidden.device)[:, batch.first :]
        # Of rows of several lengths, few of the positions are answers.
        logits = _logits(head, hidden[:, batch.first - 1 : -1][wanted])
        target = targets[wanted]
        chosen = logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)
        likelihood = chosen.new_zeros(wanted.shape).masked_scatter(wanted, chosen).sum(1)
        right = torch.ones_like(wanted).masked_scatter(wanted, logits.argmax(1) == target).all(1)
        return {"score": likelihood, "accuracy": right.to(likelihood.dtype)}


class Perplexity:
    """Minus the mean loss of every token but the first, in nats a token.

    Args:
        windows: int64 [N, W], from `cut_windows`; each is scored alone.
    """

    name = "perplexity"
    needs_all = False

    def __init__(self, windows: Tensor) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for ids in self._windows.split(batch_size):
            wanted = torch.ones_like(ids[:, 1:], dtype=torch.bool)
            yield Batch(ids, 1, wanted, [f"{ids.shape[1]}"] * len(ids))

    def values(
        self, head: Head, batch: Batch, hidden: Tensor, exact: Tensor | None
    ) -> Mapping[str, Tensor]:
        targets = batch.ids.to(hidden.device)[:, 1:]
        found = [
            (logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1))
            for logits, target in zip(
                _pieces(head, hidden[:, :-1]), targets.flatten().split(_POSITIONS), strict=True
            )
        ]
        return {"score": torch.cat(found).view_as(targets).mean(1)}


class Divergence(Perplexity):
    """Minus the mean over tokens of KL(all exact || this placement), in nats a token."""

    name = "kl"
    needs_all = True

    def values(
        self, head: Head, batch: Batch, hidden: Tensor, exact: Tensor | None
    ) -> Mapping[str, Tensor]:
        assert exact is not None
        found = []
        for ours, theirs in zip(
            _pieces(head, hidden[:, :-1]), _pieces(head, exact[:, :-1]), strict=True
        ):
            ours, theirs = ours.log_softmax(1), theirs.log_softmax(1)
            found.append((theirs.exp() * (theirs - ours)).sum(1))
        return {"score": -torch.cat(found).view(len(hidden), -1).mean(1)}


def _pieces(head: Head, hidden: Tensor) -> Iterator[Tensor]:
    return (_logits(head, part) for part in hidden.flatten(0, 1).split(_POSITIONS))


def _logits(head: Head, states: Tensor) -> Tensor:
    logits = head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _size(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.answer_ids)


def _cell(sample: Sample) -> str:
    """Such as "needle, context 2048, filler tales, wording magic": without the depth."""
    parts = [f"{name} {value}" for name, value in sample.cell.items() if name != "depth"]
    return ", ".join([sample.task, *sorted(parts)])
