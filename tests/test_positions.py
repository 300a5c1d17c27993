"""Loss by position and of repeated n-grams: known answers, and sums that are the perplexity."""

import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tiny import TEXT, VOCAB_SIZE, make_model, make_tokenizer, mixed
from tools.evaluation.outcome import Outcome, score, scores
from tools.evaluation.positions import (
    LOSS_BY_POSITION,
    REPEATED_NGRAMS,
    position_bins,
    position_outcomes,
    repeat_distances,
    window_outcomes,
)
from tools.scoring.perplexity import cut_windows, measure_perplexity

VOCABULARY = 200
LONG_TEXT = 12 * TEXT


class Copier:
    """Expects, surely, what followed the last token where it last stood at most `reach` ago.

    It knows nothing where there is no such place: every token is as likely as any other.
    """

    device = torch.device("cpu")

    def __init__(self, reach: int) -> None:
        self.reach = reach

    @property
    def lm_head(self) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden

    def hidden_states(self, ids: Tensor, /) -> Tensor:
        return torch.stack([self.logits(row) for row in ids.tolist()])

    def logits(self, row: list[int]) -> Tensor:
        logits = torch.zeros(len(row), VOCABULARY)
        for n, token in enumerate(row):
            earlier = [m for m in range(max(n - self.reach, 0), n) if row[m] == token]
            if earlier:
                logits[n] = 40.0 * F.one_hot(torch.tensor(row[earlier[-1] + 1]), VOCABULARY)
        return logits


def by_cell(outcomes: list[Outcome], task: str) -> dict[tuple[object, ...], Outcome]:
    return {tuple(x.cell.values()): x for x in outcomes if x.task == task}


def test_a_model_that_copies_knows_repeated_ngrams_and_nothing_else() -> None:
    # 40 different tokens; then the first 20 of them again, so that all but one end a bigram that
    # stood 40 tokens before; then 10 of these again, 10 tokens before.
    row = [*range(40), *range(20), *range(10, 20), *range(100, 130)]
    rows, near = torch.tensor([row]), 16
    cells = {
        reach: by_cell(
            list(window_outcomes(Copier(reach), rows, batch_size=1, near=near)), REPEATED_NGRAMS
        )
        for reach in (1000, 15, 0)
    }
    know_nothing = math.log(VOCABULARY)
    for reach, found in cells.items():
        assert {key: x.weight for key, x in found.items()} == {
            ("repeated", "1-16"): 9,
            ("repeated", "17-"): 19,
            ("other",): len(row) - 1 - 28,
        }
        for key, outcome in found.items():
            loss = outcome.value / outcome.weight
            reached = reach >= {"1-16": 10, "17-": 40}.get(str(key[-1]), 10_000)
            if key == ("other",):
                assert loss >= know_nothing - 1e-6
            else:
                assert loss == pytest.approx(0 if reached else know_nothing, abs=1e-5)


def test_distances_of_repetitions_are_those_of_the_definition() -> None:
    row = [1, 2, 1, 2, 2, 2, 1, 2]
    assert repeat_distances(row) == [0, 0, 0, 2, 0, 1, 4, 4]
    assert repeat_distances(row, 1) == [0, 0, 2, 2, 1, 1, 4, 2]
    assert repeat_distances(row, 3) == [0, 0, 0, 0, 0, 0, 0, 4]
    random = torch.randint(6, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    for end, found in enumerate(repeat_distances(random, 2)):
        earlier = [m for m in range(1, end) if random[m - 1 : m + 1] == random[end - 1 : end + 1]]
        assert found == (end - earlier[-1] if earlier and end else 0)


@pytest.mark.parametrize("window", [4, 32, 64, 65, 128, 1000, 2048])
def test_bins_hold_every_position_once(window: int) -> None:
    bins = position_bins(window)
    assert [place for places in bins for place in places] == list(range(1, window))
    assert all(places.stop & (places.stop - 1) == 0 for places in bins[:-1])
    assert len(bins) == max(1, math.ceil(math.log2(window / 64)) + 1)


def test_a_loss_lands_in_the_bin_of_its_position() -> None:
    # Sure and right about the tokens 64 to 127, which follow the next smaller one; ignorant of
    # the others, which repeat nothing.
    row = [150 - n if n < 64 else n - 64 for n in range(128)]
    logits = torch.zeros(VOCABULARY, VOCABULARY)
    logits[range(63), range(1, 64)] = 60.0
    logits[row[63], row[64]] = 60.0

    class Table(Copier):
        def logits(self, row: list[int]) -> Tensor:
            return logits[row]

    outcomes = list(window_outcomes(Table(0), torch.tensor([row]), batch_size=1))
    found = by_cell(outcomes, LOSS_BY_POSITION)
    assert found.keys() == {("1-63",), ("64-127",)}
    assert score([found["1-63",]]).value == pytest.approx(VOCABULARY)
    assert score([found["64-127",]]).value == pytest.approx(1)


def test_positions_and_ngrams_add_up_to_the_perplexity() -> None:
    model = make_model(mixed("llama"))
    model.tokenizer = make_tokenizer()
    ids = model.tokenizer.encode(LONG_TEXT, add_bos=False)
    wanted = measure_perplexity(model, cut_windows(ids, 150, 4)).all
    steps: list[int] = []
    outcomes = list(
        position_outcomes(
            model, LONG_TEXT, window=150, windows=4, batch_size=3, advance=steps.append, near=8
        )
    )
    assert steps == [3, 1]
    whole: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        whole[outcome.task].append(outcome)
    assert whole.keys() == {LOSS_BY_POSITION, REPEATED_NGRAMS}
    for parts in whole.values():
        assert sum(part.weight for part in parts) == wanted.tokens == 4 * 149
        mean = sum(part.value for part in parts) / wanted.tokens
        assert math.exp(mean) == pytest.approx(wanted.value, rel=1e-6)
    found = scores(outcomes)
    assert [x.cell for x in found if x.task == LOSS_BY_POSITION] == [
        {"position": position} for position in ("1-63", "64-127", "128-149")
    ]
    assert all(x.n == 4 for x in found)
    keys = {(x.task, str(x.cell), x.item) for x in outcomes}
    assert len(keys) == len(outcomes)  # every item once


def test_batches_change_nothing_and_other_tokens_are_other_items() -> None:
    rows = torch.randint(VOCABULARY, (5, 40), generator=torch.Generator().manual_seed(0))
    one, many = (list(window_outcomes(Copier(9), rows, batch_size=size)) for size in (1, 4))
    assert one == many
    others = list(window_outcomes(Copier(9), (rows + 1) % VOCABULARY, batch_size=4))
    assert not {x.item for x in one} & {x.item for x in others}
    # What a model makes of them does not change an item.
    assert {x.item for x in one} == {
        x.item for x in window_outcomes(Copier(2), rows, batch_size=4)
    }


def test_mistakes_are_refused() -> None:
    model, rows = Copier(9), torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        list(window_outcomes(model, rows, batch_size=0))
    with pytest.raises(ValueError, match="near must be at least 1"):
        list(window_outcomes(model, rows, batch_size=1, near=0))
    bare = make_model(mixed("llama"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        list(position_outcomes(bare, TEXT, window=16, windows=1, batch_size=1))
    bare.tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="has 0 windows"):
        list(position_outcomes(bare, TEXT, window=100, windows=900, batch_size=1))
    with torch.no_grad():
        bare.lm_head.weight[VOCAB_SIZE - 1, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        list(position_outcomes(bare, TEXT, window=16, windows=1, batch_size=1))
