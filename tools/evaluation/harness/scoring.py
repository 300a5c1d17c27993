"""score_continuations: log-likelihoods of texts that follow given contexts, in ragged batches.

What many requests share is computed once: a row that several of them read (choices that differ in
their last token only), and a long context that several continuations follow, which is read into a
cache from which each continuation is taken back before the next comes.

Dims: B rows, T tokens, E hidden, N scored tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tools.evaluation.batches import BatchLimits
from zoo import CausalLM
from zoo.prefill import prefill

# Below so many tokens, reading a context again costs less than the further calls of the model.
SHARED_CONTEXT = 256
# Positions whose logits exist at a time, as in tools/scoring/tokens.py.
_POSITIONS = 512
# Lengths are rounded up: GPU kernels are compiled for multiples of 16 and for others.
_ROUND = 16

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """What is scored: the probability of `tokens` behind `context`; neither may be empty."""

    context: Tokens
    tokens: Tokens

    def row(self, max_length: int) -> Tokens:
        """What the model reads: all but the last token, cut from the left to its context."""
        return (self.context + self.tokens)[-(max_length + 1) :][:-1]


class Score(NamedTuple):
    """Of one continuation.

    Attributes:
        log_likelihood: of all its tokens, in nats.
        greedy: whether each of them is the most likely one.
    """

    log_likelihood: float
    greedy: bool


class _Place(NamedTuple):
    """Where the tokens of a `request` are predicted: in a `row` of a batch, from `first` on."""

    request: int
    row: int
    first: int


@torch.inference_mode()
def score_continuations(
    model: CausalLM,
    requests: Sequence[Continuation],
    *,
    max_length: int,
    limits: BatchLimits,
    shared_context: int = SHARED_CONTEXT,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[Score]:
    """Scores each request as if it were alone.

    Args:
        model: from `zoo.load`.
        requests: in any order; longer ones are computed first, so that memory runs out at once.
        max_length: tokens that the model reads at most; longer requests lose what is leftmost.
        limits: of what is computed at once.
        shared_context: contexts of at least so many tokens are read once for all continuations.
        advance: called with the number of requests that were just scored.

    Raises:
        ValueError: an empty context or continuation, a continuation longer than `max_length`, or
            logits that are not finite.
    """
    for request in requests:
        if not request.context or not request.tokens:
            raise ValueError("a request needs at least one token of context and continuation")
        if len(request.tokens) > max_length:
            raise ValueError(
                f"a continuation of {len(request.tokens)} tokens exceeds the context of "
                f"{max_length}"
            )
    by_context: dict[Tokens, list[int]] = {}
    for index, request in enumerate(requests):
        by_context.setdefault(request.context, []).append(index)
    alone: list[int] = []
    shared: list[list[int]] = []
    for context, group in by_context.items():
        longest = max(len(requests[index].tokens) for index in group)
        fits = len(context) + longest <= max_length + 1
        if fits and len(context) >= shared_context and len(_pieces(requests, group)) > 1:
            shared.append(group)
        else:
            alone += group
    scores: dict[int, Score] = {}
    for batch in (
        _rows(model, requests, alone, max_length, limits),
        _onto_shared_contexts(model, requests, shared, limits),
    ):
        for found in batch:
            scores |= found
            advance(len(found))
    return [scores[index] for index in range(len(requests))]


def _rows(
    model: CausalLM,
    requests: Sequence[Continuation],
    chosen: list[int],
    max_length: int,
    limits: BatchLimits,
) -> Iterator[dict[int, Score]]:
    """Whole rows, each in one call."""
    by_row: dict[Tokens, list[int]] = {}
    for index in chosen:
        by_row.setdefault(requests[index].row(max_length), []).append(index)
    for rows in _batches(list(by_row), limits):
        width = min(-(-len(rows[0]) // _ROUND) * _ROUND, max_length)
        ids, _ = _padded(rows, width, model.device)
        places = [
            _Place(index, number, len(row) - len(requests[index].tokens))
            for number, row in enumerate(rows)
            for index in by_row[row]
        ]
        yield _score(model, model.hidden_states(ids), requests, places)


def _onto_shared_contexts(
    model: CausalLM, requests: Sequence[Continuation], groups: list[list[int]], limits: BatchLimits
) -> Iterator[dict[int, Score]]:
    """Contexts into a cache, less their last token, which predicts; then piece after piece."""
    by_context = {requests[group[0]].context: group for group in groups}
    for contexts in _batches(list(by_context), limits):
        pieces = [_pieces(requests, by_context[context]) for context in contexts]
        widest = max(len(piece) for row in pieces for piece in row)
        width = -(-widest // _ROUND) * _ROUND
        heads = [context[:-1] for context in contexts]
        ids, lengths = _padded(heads, len(heads[0]), model.device)
        cache = model.new_cache(len(heads), len(heads[0]) + width, max_rollback=widest)
        prefill(model, ids, lengths, cache, tokens=limits.prefill_tokens)
        for turn in range(max(map(len, pieces))):
            rows = [list(row)[turn] if turn < len(row) else () for row in pieces]
            ids, lengths = _padded(rows, width, model.device)
            hidden = model.hidden_states(ids, cache, lengths=lengths)
            cache.rollback(lengths)
            places = [
                _Place(index, number, 0)
                for number, row in enumerate(rows)
                if row
                for index in pieces[number][row]
            ]
            yield _score(model, hidden, requests, places)


def _pieces(requests: Sequence[Continuation], group: list[int]) -> dict[Tokens, list[int]]:
    """What is read behind a shared context less its last token, and the requests it answers."""
    pieces: dict[Tokens, list[int]] = {}
    for index in group:
        request = requests[index]
        piece = (request.context[-1], *request.tokens[:-1])
        pieces.setdefault(piece, []).append(index)
    return pieces


def _batches(rows: list[Tokens], limits: BatchLimits) -> Iterator[list[Tokens]]:
    """Longest first; equal ones in an order that does not depend on how they came."""
    return limits.batches(sorted(rows), len)


def _padded(rows: Sequence[Tokens], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows from the left, padded to `width`: int64 [B, width], and their lengths [B].

    What a causal model makes of a row does not depend on what stands behind it.
    """
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), lengths.to(device)


def _score(
    model: CausalLM, hidden: Tensor, requests: Sequence[Continuation], places: list[_Place]
) -> dict[int, Score]:
    """From the hidden states [B, T, E] of a batch to the scores of its requests."""
    sizes = [len(requests[place.request].tokens) for place in places]
    spans = zip(places, sizes, strict=True)
    where = [(p.row, p.first + step) for p, size in spans for step in range(size)]
    row, position = torch.tensor(where, device=hidden.device).unbind(1)
    wanted = [token for place in places for token in requests[place.request].tokens]
    targets = torch.tensor(wanted, device=hidden.device)
    log_likelihoods, greedy = [], []
    states = hidden[row, position]  # [N, E]
    for part, target in zip(states.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        logits = model.lm_head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_likelihoods.append(logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1))
        greedy.append(logits.argmax(1) == target)
    values = torch.cat(log_likelihoods).cpu().double()
    if not values.isfinite().all():
        raise ValueError(
            "the model's logits are not finite numbers; try another dtype, such as float32"
        )
    parts = zip(places, values.split(sizes), torch.cat(greedy).cpu().split(sizes), strict=True)
    return {
        place.request: Score(value.sum().item(), bool(hits.all())) for place, value, hits in parts
    }
