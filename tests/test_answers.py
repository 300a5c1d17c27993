"""Answers scored behind prompts that are read once: numbers of whole rows, and the same text."""

import math
import random

import pytest
import torch

import zoo
from tests.tiny import SHORT_WINDOW, hf_config, make_model, mixed
from tools.scoring.tokens import score_tokens

KINDS = {
    "full": hf_config("llama"),
    "mixed": mixed("llama"),
    "phi": mixed("phi"),
    "eva": hf_config("llama", layer_types=["eva_attention"] * 3, eva=SHORT_WINDOW.to_dict()),
}


def draw(seed: int, sizes: list[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    source = random.Random(seed)
    rows = [[source.randrange(500) for _ in range(sum(size))] for size in sizes]
    parted = [(row[:size], row[size:]) for row, (size, _) in zip(rows, sizes, strict=True)]
    return [prompt for prompt, _ in parted], [answer for _, answer in parted]


@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods_are_those_of_whole_rows(kind):
    model = make_model(KINDS[kind], dtype=torch.float64)
    prompts, answers = draw(0, [(70, 5), (41, 1), (90, 37), (3, 18)])
    found = zoo.generate(model, prompts, max_new_tokens=3, answers=answers)
    for prompt, answer, row in zip(prompts, answers, found, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        expected = score_tokens(model, ids, first=len(prompt)).log_likelihood.sum().item()
        assert row.answer_log_likelihood == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_same_with_and_without_answers(kind):
    _compare_texts(make_model(KINDS[kind], dtype=torch.float64), compile=False)


@pytest.mark.slow
def test_a_compiled_text_with_answers_is_that_of_eager_mode_without():
    # One layer: Inductor takes a minute of CPU time for a layer of the reference.
    one = hf_config(
        "llama", layer_types=["eva_attention"], num_hidden_layers=1, eva=SHORT_WINDOW.to_dict()
    )
    _compare_texts(make_model(one, dtype=torch.float64), compile=True)


def _compare_texts(model: zoo.CausalLM, *, compile: bool) -> None:
    prompts, answers = draw(1, [(70, 5), (41, 1), (90, 37), (3, 18)])
    plain = zoo.generate(model, prompts, max_new_tokens=20)
    scored = zoo.generate(model, prompts, max_new_tokens=20, answers=answers, compile=compile)
    assert [row.ids for row in plain] == [row.ids for row in scored]
    assert all(row.answer_log_likelihood is None for row in plain)


@pytest.mark.parametrize("tokens", [1, 64, 100_000])
def test_the_size_of_pieces_changes_nothing(tokens):
    model = make_model(KINDS["mixed"], dtype=torch.float64)
    prompts, answers = draw(2, [(120, 4), (77, 4)])
    plain, other = (
        zoo.generate(model, prompts, max_new_tokens=9, answers=answers, prefill_tokens=size)
        for size in (None, tokens)
    )
    for a, b in zip(plain, other, strict=True):
        assert a.ids == b.ids
        assert a.answer_log_likelihood == pytest.approx(b.answer_log_likelihood, rel=1e-10)


def test_an_answer_may_fill_the_context():
    model = make_model(KINDS["full"])
    prompts, answers = draw(3, [(250, 6)])
    (row,) = zoo.generate(model, prompts, max_new_tokens=20, answers=answers)
    assert len(row.ids) == 6
    assert math.isfinite(row.answer_log_likelihood)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([[1]], "1 answers for 2 prompts"),
        ([[1], []], "answer of prompt 1 is empty"),
        ([[1], [512]], "prompt 1's answer has token 512"),
        ([[1], [1] * 250], "prompt 1 and its answer have 260 tokens"),
    ],
)
def test_answers_that_do_not_fit_are_refused(answers, message):
    model = make_model(KINDS["full"])
    with pytest.raises(ValueError, match=message):
        zoo.generate(model, [[1] * 10] * 2, max_new_tokens=1, answers=answers)
