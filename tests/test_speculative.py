"""Speculative decoding writes what the large model would write alone, whoever drafts."""

import collections

import pytest
import torch

import zoo
from tests.tiny import VOCAB_SIZE, make_model, mixed
from zoo.prefill import prefill
from zoo.sampling import Sampling, probabilities
from zoo.speculative import NONE, SpeculativeDecoder

PROMPTS = [[(7 * i + n) % VOCAB_SIZE for i in range(n)] for n in (1, 40, 3, 17)]


@pytest.fixture(scope="module")
def model() -> zoo.CausalLM:
    return make_model(mixed("llama"), dtype=torch.float64)


@pytest.fixture(scope="module")
def stranger() -> zoo.CausalLM:
    return make_model(mixed("gpt_neox"), seed=3, dtype=torch.float64)


def texts(model: zoo.CausalLM, **options) -> list[list[int]]:
    return [row.ids for row in zoo.generate(model, PROMPTS, max_new_tokens=40, **options)]


@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_greedy_text_is_that_of_the_model_alone(model, stranger, tokens):
    alone = texts(model)
    assert texts(model, draft=stranger, draft_tokens=tokens) == alone
    assert texts(model, draft=model, draft_tokens=tokens) == alone
    penalty = Sampling(repetition_penalty=1.3)
    penalised = texts(model, sampling=penalty)
    assert penalised != alone
    assert texts(model, sampling=penalty, draft=stranger, draft_tokens=tokens) == penalised


def test_a_draft_model_may_know_fewer_tokens(model):
    half = make_model(mixed("phi", vocab_size=VOCAB_SIZE // 2), dtype=torch.float64)
    alone = texts(model)
    assert max(max(ids) for ids in alone) >= VOCAB_SIZE // 2
    assert texts(model, draft=half) == alone


def test_both_models_read_prompts_in_pieces_of_the_size_asked_for(model, stranger, monkeypatch):
    asked = []

    def count(*args, tokens=None, **options):
        asked.append(tokens)
        return prefill(*args, tokens=tokens, **options)

    monkeypatch.setattr("zoo.generation.prefill", count)
    texts(model, draft=stranger, prefill_tokens=256)
    assert asked == [256, 256]


@torch.no_grad()
def test_a_draft_by_the_model_itself_is_always_kept(model):
    ids = torch.tensor([PROMPTS[1]])
    length = torch.tensor([40])
    caches = [model.new_cache(1, 99, max_rollback=4) for _ in range(2)]
    logits, _ = (prefill(model, ids, length, cache) for cache in caches)
    decoder = SpeculativeDecoder(
        *(model, caches[0], model, caches[1]),
        drafted=4,
        sampling=Sampling(temperature=0.8, top_k=20, seed=0),
        seen=torch.zeros(1, VOCAB_SIZE, dtype=torch.bool),
    )
    decoder.start(logits)
    rounds = [decoder.take() for _ in range(6)][1:]
    assert NONE not in torch.tensor(rounds)
    assert (decoder.rounds, decoder.accepted) == (5, 20)


@torch.no_grad()
def test_sampled_text_has_the_distribution_of_the_model_alone(model, stranger):
    """All texts of three tokens, of which 4,000 are drawn."""
    sampling, prompt, n = Sampling(temperature=1.0, top_k=3, seed=0), [5, 6], 4000

    def following(ids: tuple[int, ...]) -> torch.Tensor:
        logits = model(torch.tensor([[*prompt, *ids]]))[:, -1]
        return probabilities(logits, torch.zeros_like(logits, dtype=torch.bool), sampling)[0]

    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        exact = {
            (*ids, token): p * float(after[token])
            for ids, p in exact.items()
            for after in [following(ids)]
            for token in after.nonzero()[:, 0].tolist()
        }
    options = {"sampling": sampling, "draft": stranger, "draft_tokens": 2}
    rows = zoo.generate(model, [prompt] * n, max_new_tokens=3, **options)
    found = collections.Counter(tuple(row.ids) for row in rows)
    assert set(found) <= set(exact)
    statistic = sum((found[x] - n * p) ** 2 / (n * p) for x, p in exact.items())  # chi-squared
    freedom = len(exact) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


def test_draft_tokens_without_a_draft_are_refused(model):
    for run in (zoo.generate, zoo.stream):
        with pytest.raises(ValueError, match=r"^draft_tokens 4 needs a draft model; give draft"):
            run(model, PROMPTS[0], draft_tokens=4)


def test_four_tokens_are_drafted_where_no_number_is_given(model, stranger, monkeypatch):
    drafted = []

    class Watched(SpeculativeDecoder):
        def __init__(self, *args, **options):
            drafted.append(options["drafted"])
            super().__init__(*args, **options)

    monkeypatch.setattr("zoo.generation.SpeculativeDecoder", Watched)
    for options in ({}, {"draft_tokens": 2}):
        zoo.generate(model, PROMPTS[0], max_new_tokens=2, draft=stranger, **options)
    assert drafted == [4, 2]


def test_what_does_not_fit_is_said_in_one_line(model, stranger):
    cases = {
        "draft_tokens must be an int of at least 1, not 0": {"draft": stranger, "draft_tokens": 0},
        r"draft_tokens must be an int of at least 1, not 2\.0": {
            "draft": stranger,
            "draft_tokens": 2.0,
        },
        "compile does not go with a draft model": {"draft": stranger, "compile": True},
        "context of 64 is too short for 80 tokens": {
            "draft": make_model(mixed("llama", max_position_embeddings=64))
        },
        f"has {VOCAB_SIZE + 8} tokens, more than the model's {VOCAB_SIZE}": {
            "draft": make_model(mixed("llama", vocab_size=VOCAB_SIZE + 8))
        },
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            texts(model, **options)
