"""What is computed at once, and what models of one command share."""

import math
import random

import pytest

from tests.tiny import make_tokenizer
from tools.evaluation.batches import BatchLimits
from tools.evaluation.outcome import Outcome, score
from tools.evaluation.shared import Shared
from tools.evaluation.suite import Settings, parse_n


@pytest.mark.parametrize(
    "limits",
    [BatchLimits(), BatchLimits(rows=7), BatchLimits(rows=64, tokens=500), BatchLimits(tokens=1)],
    ids=["one", "rows", "tokens", "few"],
)
def test_batches_hold_everything_once_within_the_limits(limits: BatchLimits) -> None:
    source = random.Random(0)
    items = [(source.randrange(1, 200), i) for i in range(150)]
    found = list(limits.batches(items, lambda item: item[0]))
    assert sorted(item for batch in found for item in batch) == sorted(items)
    lengths = [size for batch in found for size, _ in batch]
    assert lengths == sorted(lengths, reverse=True)
    for batch in found:
        assert 1 <= len(batch) <= limits.rows
        if limits.tokens is not None and len(batch) > 1:
            assert len(batch) * batch[0][0] <= limits.tokens


def test_batches_of_one_length_are_equally_large() -> None:
    found = BatchLimits(rows=512, tokens=2**19).batches([1024] * 1200, lambda size: size)
    assert [len(batch) for batch in found] == [400, 400, 400]
    assert BatchLimits(rows=512, tokens=2**19).most_rows(8192) == 64


@pytest.mark.parametrize("what", ["batch_size", "batch_tokens", "prefill_tokens"])
def test_limits_are_positive(what: str) -> None:
    fields = {"batch_size": "rows", "batch_tokens": "tokens"}
    with pytest.raises(ValueError, match=f"{what} must be at least 1, not 0"):
        BatchLimits(**{fields.get(what, what): 0})


def test_what_is_shared_is_made_once() -> None:
    made: list[int] = []
    shared = Shared()
    first, second = make_tokenizer(), make_tokenizer()
    assert shared.tokenizer(first) is first
    assert shared.tokenizer(second) is first
    for key in ("a", "a", "b"):
        shared.once(key, lambda: made.append(1))
    assert len(made) == 2
    alone = Shared(keep=False)
    for _ in range(2):
        alone.once("a", lambda: made.append(1))
    assert len(made) == 4


def test_a_task_may_have_its_own_number_of_prompts() -> None:
    common, own = parse_n(["50", "kv=7"])
    settings = Settings(n=common or 0, own_n=own, limit=20)
    assert [settings.prompts_of(task) for task in ("kv", "mqar")] == [7, 20]
    assert parse_n([]) == (None, {})
    for value in ("x", "-1", "=3", "kv=", "kv=x"):
        with pytest.raises(ValueError, match="must be a number or TASK=NUMBER"):
            parse_n([value])
    with pytest.raises(ValueError, match="'piqa' does not have"):
        parse_n(["piqa=3"])


def test_a_perplexity_may_be_infinite() -> None:
    outcomes = [
        Outcome(task="lambada_openai", item=str(i), metric="perplexity", value=value)
        for i, value in enumerate((900.0, 700.0))
    ]
    found = score(outcomes)
    assert (found.value, found.error) == (math.inf, None)
    assert math.isfinite(score(outcomes[1:]).value)
