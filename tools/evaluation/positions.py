"""position_outcomes: the loss by position, and of n-grams that the context has had before.

Windows of a text are scored alone, as `zoo perplexity` does. Their losses are then split in two
ways, each a task of its own; in both every scored token is in one cell.

"loss_by_position": by how many tokens stand before the scored one: {"position": "512-1023"}. A
model that makes use of far context has a loss that goes on falling.

"repeated_ngrams": {"tokens": "repeated"} are those that end an n-gram (a bigram) which stood
earlier in the window, {"tokens": "other"} the rest: recall inside perplexity, as Zoology splits it
(arXiv 2312.04927, section 3). Repeated ones are split by how far back the n-gram last ended:
{"distance": "1-256"} is inside an exact window of 256 at whatever offset, {"distance": "257-"} is
beyond it, where a model has summaries or full attention (or sinks: the first few tokens of a
window). Zoology leaves out bigrams that are frequent in the training data, which nobody has here:
"of the" counts as a repetition too, so compare models with each other and not with the paper.

Dims: N windows, W tokens of a window.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tools.evaluation.outcome import Outcome
from tools.scoring.perplexity import cut_windows
from tools.scoring.tokens import Scorable, score_tokens

if TYPE_CHECKING:
    from zoo import Tokenizer

LOSS_BY_POSITION = "loss_by_position"
REPEATED_NGRAMS = "repeated_ngrams"

_FIRST_BIN = 64  # the bins below it would hold a few tokens each


class Model(Scorable, Protocol):
    """A model with a tokenizer: every `zoo.CausalLM` that was loaded with one."""

    @property
    def tokenizer(self) -> "Tokenizer | None": ...


def position_outcomes(
    model: Model,
    text: str,
    *,
    window: int,
    windows: int | None,
    batch_size: int,
    advance: Callable[[int], None] = lambda steps: None,
    near: int = 256,
) -> Iterator[Outcome]:
    """Scores a text; see the module.

    Args:
        model: from `zoo.load`; its context must have room for `window`.
        text: tokenised as one string, without a bos.
        window: W.
        windows: only the first so many; None: all.
        batch_size: windows that are computed at once.
        advance: called with the number of windows that were just scored.
        near: the greatest distance of a repetition that an exact window spans; the same for all
            models that are to be compared.

    Yields:
        For each window, its cells of both tasks: metric "perplexity", the value the summed
        negative log-likelihood and the weight the tokens. An item is a window's number and a
        checksum of its tokens, so that other tokens never pair up with them.

    Raises:
        ValueError: no tokenizer, fewer windows than asked for, numbers out of range, or losses
            that are not finite.
    """
    rows = text_windows(model, text, window=window, windows=windows)
    yield from window_outcomes(model, rows, batch_size=batch_size, advance=advance, near=near)


def text_windows(model: Model, text: str, *, window: int, windows: int | None) -> Tensor:
    """The windows of a text for `window_outcomes`, int [N, W].

    Raises:
        ValueError: no tokenizer, or fewer windows than asked for.
    """
    if model.tokenizer is None:
        raise ValueError("the loss by position needs a tokenizer, which the model does not have")
    return cut_windows(model.tokenizer.encode(text, add_bos=False), window, windows)


def window_outcomes(
    model: Scorable,
    rows: Tensor,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda steps: None,
    near: int = 256,
) -> Iterator[Outcome]:
    """The same of windows int [N, W], from `cut_windows`."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if near < 1:
        raise ValueError(f"near must be at least 1 token, not {near}")
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        losses = -score_tokens(model, batch).log_likelihood.cpu().double()
        if not losses.isfinite().all():
            raise ValueError(
                "the model's logits are not finite numbers; try another dtype, such as float32"
            )
        for index, (row, loss) in enumerate(zip(batch.tolist(), losses, strict=True), start):
            yield from _of_window(_item(index, row), row, loss, near)
        advance(len(batch))


def repeat_distances(row: Sequence[int], ngram: int = 2) -> list[int]:
    """How far before each token the n-gram that it ends has ended last; 0: never before."""
    last: dict[tuple[int, ...], int] = {}
    distances = []
    for end in range(len(row)):
        gram = tuple(row[max(end - ngram + 1, 0) : end + 1])
        distances.append(end - last[gram] if len(gram) == ngram and gram in last else 0)
        last[gram] = end
    return distances


def position_bins(window: int) -> list[range]:
    """Numbers of tokens before a scored one, 1 to W - 1, by powers of two from 64 on."""
    bins, first, end = [], 1, _FIRST_BIN
    while first < window:
        bins.append(range(first, min(end, window)))
        first, end = end, 2 * end
    return bins


def _of_window(item: str, row: Sequence[int], loss: Tensor, near: int) -> Iterator[Outcome]:
    """The outcomes of one window; `loss` [W - 1] is of its tokens 1 to W - 1."""
    for places in position_bins(len(row)):
        cell = {"position": f"{places.start}-{places.stop - 1}"}
        yield _outcome(LOSS_BY_POSITION, cell, item, loss[places.start - 1 : places.stop - 1])
    distance = torch.tensor(repeat_distances(row)[1:])
    for name, chosen in (
        ({"tokens": "repeated", "distance": f"1-{near}"}, (distance > 0) & (distance <= near)),
        ({"tokens": "repeated", "distance": f"{near + 1}-"}, distance > near),
        ({"tokens": "other"}, distance == 0),
    ):
        if chosen.any():
            yield _outcome(REPEATED_NGRAMS, name, item, loss[chosen])


def _outcome(task: str, cell: dict[str, str], item: str, losses: Tensor) -> Outcome:
    return Outcome(
        task=task,
        cell=cell,
        item=item,
        metric="perplexity",
        value=losses.sum().item(),
        weight=float(losses.numel()),
    )


def _item(index: int, row: Sequence[int]) -> str:
    return f"{index}-{zlib.crc32(repr(list(row)).encode()):08x}"
