"""The passkey test: what its prompts hold, and that it tells a model that copies from others."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from tests.command_line import run, save
from tests.tiny import TEXT, VOCAB_SIZE, make_model, make_tokenizer, mixed
from tools.scoring.passkey import measure_passkey
from tools.scoring.passkey_prompts import FILLER, WORDINGS, PasskeyPrompts, Prompt, Wording

LENGTH = 420
HAY = " ".join(f"{TEXT} {number * 7919} words." for number in range(60))


class Identity:
    """A stub of a model: `hidden_states` are the logits themselves."""

    device = torch.device("cpu")

    @property
    def lm_head(self) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden

    def hidden_states(self, ids: Tensor, /) -> Tensor:
        return torch.stack([self.logits(row.tolist()) for row in ids])

    def logits(self, row: list[int]) -> Tensor:
        raise NotImplementedError


class Copier(Identity):
    """Expects what followed the longest earlier match of the last tokens; sees no future."""

    def logits(self, row: list[int]) -> Tensor:
        expected = [self.follow(row[: n + 1]) for n in range(len(row))]
        return 50.0 * F.one_hot(torch.tensor(expected), VOCAB_SIZE)

    @staticmethod
    def follow(past: list[int]) -> int:
        best, size = 0, -1
        for end in range(1, len(past)):
            match = 0
            while match < end and past[end - 1 - match] == past[-1 - match]:
                match += 1
            if match > size:
                best, size = past[end], match
        return best


class Guesser(Identity):
    """Knows nothing."""

    def logits(self, row: list[int]) -> Tensor:
        return torch.randn(len(row), VOCAB_SIZE, generator=torch.Generator().manual_seed(0))


def draw(
    wording: Wording = WORDINGS["magic"], n: int = 6, *, seed: int = 0, hay: str | None = HAY
) -> list[Prompt]:
    return PasskeyPrompts(make_tokenizer(), hay, LENGTH).draw(wording, n, seed)


@pytest.mark.parametrize("hay", [HAY, None], ids=["text", "filler"])
@pytest.mark.parametrize("wording", WORDINGS.values(), ids=WORDINGS)
def test_a_prompt_holds_the_number_and_asks_for_it(wording: Wording, hay: str | None) -> None:
    tokenizer = make_tokenizer()
    for prompt in draw(wording, hay=hay):
        assert len(prompt.ids) == LENGTH
        text = tokenizer.decode(prompt.ids)
        needle = wording.needle.format(number=prompt.number)
        assert f"\n\n{needle}\n\n" in text
        assert text.endswith(f"\n\n{wording.question} {prompt.number}")
        assert tokenizer.decode(prompt.ids[-prompt.answer_size :]) == f" {prompt.number}"
        assert 10_000 <= int(prompt.number) <= 99_999
        if hay is None:
            before, after = text.split(needle)
            sentences = f"{FILLER} " * 20
            assert before.strip() in sentences
            assert after.removesuffix(f"{wording.question} {prompt.number}").strip() in sentences


def test_there_are_four_wordings_one_of_them_to_the_letter() -> None:
    assert list(WORDINGS)[:2] == ["magic", "passkey"]
    assert len(set(WORDINGS.values())) == 4
    magic = WORDINGS["magic"]
    assert magic.needle.format(number=1) == (
        "The special magic number is 1. Remember it: 1 is the special magic number."
    )
    assert magic.question == (
        "Question: What is the special magic number mentioned in the text above? "
        "Answer: The special magic number is"
    )


def test_every_prompt_has_another_number_depth_and_slice_of_the_hay() -> None:
    tokenizer = make_tokenizer()
    prompts = draw(n=40)
    needles = [WORDINGS["magic"].needle.format(number=prompt.number) for prompt in prompts]
    texts = [tokenizer.decode(prompt.ids) for prompt in prompts]
    depths = [text.index(needle) / len(text) for text, needle in zip(texts, needles, strict=True)]
    assert len({prompt.number for prompt in prompts}) == 40
    assert len({text[:100] for text in texts}) > 30
    assert min(depths) < 0.15
    assert max(depths) > 0.6
    assert 0.25 < sum(depths) / 40 < 0.5  # the question is the last fifth of so short a prompt


def test_a_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    assert draw(n=8)[:3] == draw(n=3)
    assert draw(seed=1) != draw(seed=2)
    numbers = [[prompt.number for prompt in draw(wording)] for wording in WORDINGS.values()]
    assert all(row == numbers[0] for row in numbers)


def test_a_model_that_was_published_with_a_bos_sees_one() -> None:
    tokenizer = make_tokenizer()
    plain = PasskeyPrompts(tokenizer, HAY, LENGTH)
    (prompt,) = plain.draw(WORDINGS["magic"], 1, 0)
    assert prompt.ids[0] != tokenizer.eos_id

    class WithBos(zoo.Tokenizer):
        def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
            ids = tokenizer.encode(text, add_bos=False)
            return ids if add_bos is False else [7, *ids]

    other = make_tokenizer()
    other.__class__ = WithBos
    other.bos_id = 7
    (prompt,) = PasskeyPrompts(other, HAY, LENGTH).draw(WORDINGS["magic"], 1, 0)
    assert prompt.ids[0] == 7
    assert len(prompt.ids) == LENGTH


@pytest.mark.parametrize("wording", WORDINGS.values(), ids=WORDINGS)
def test_a_model_that_copies_finds_every_number(wording: Wording) -> None:
    result = measure_passkey(Copier(), draw(wording, 4), batch_size=3)
    assert (result.n, result.accuracy, result.accuracy_error) == (4, 1.0, 0.0)
    assert result.log_likelihood == pytest.approx(0, abs=1e-6)


def test_a_model_that_guesses_finds_none() -> None:
    result = measure_passkey(Guesser(), draw(n=8))
    assert result.accuracy == 0.0
    assert result.log_likelihood < -10


def test_one_wrong_token_makes_an_answer_wrong() -> None:
    prompts = draw(n=4)
    last = prompts[0].ids[-1]
    wrong = [*prompts[0].ids[:-1], (last + 1) % VOCAB_SIZE]
    prompts[0] = Prompt(wrong, prompts[0].answer_size, prompts[0].number)
    result = measure_passkey(Copier(), prompts)
    assert result.accuracy == 0.75
    assert result.accuracy_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert result.log_likelihood == pytest.approx(-50 / 4, rel=1e-3)


def test_answers_of_different_sizes_are_scored_together() -> None:
    first, second = draw(n=2)
    short = Prompt(second.ids, second.answer_size - 3, second.number)
    model = make_model(mixed("llama", max_position_embeddings=LENGTH))
    together = measure_passkey(model, [first, short], batch_size=2)
    alone = [measure_passkey(model, [prompt]).log_likelihood for prompt in (first, short)]
    assert together.log_likelihood == pytest.approx(sum(alone) / 2, rel=1e-5)
    assert alone[1] > measure_passkey(model, [second]).log_likelihood


def test_teacher_forcing_judges_as_greedy_generation_does() -> None:
    model = make_model(mixed("llama"))
    prompts = []
    for seed in range(4):
        question = torch.randint(1, 300, (60,), generator=torch.Generator().manual_seed(seed))
        (written,) = zoo.generate(model, question.tolist(), max_new_tokens=5)
        prompts.append(Prompt([*question.tolist(), *written.ids], 5, ""))
    assert measure_passkey(model, prompts, batch_size=4).accuracy == 1.0
    other = [Prompt([*p.ids[:-2], (p.ids[-2] + 1) % 300, p.ids[-1]], 5, "") for p in prompts]
    assert measure_passkey(model, other, batch_size=4).accuracy == 0.0


def test_the_command_reports_each_wording(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", mixed("llama", max_position_embeddings=LENGTH))
    (tmp_path / "hay.txt").write_text(HAY, encoding="utf-8")
    arguments = ("passkey", folder, "--length", LENGTH, "--n", 2, "--hay", tmp_path / "hay.txt")
    rows = [
        json.loads(line) for line in run(*arguments, "--wording", "all", "--json").out.splitlines()
    ]
    assert [row["wording"] for row in rows] == list(WORDINGS)
    expected = measure_passkey(zoo.load(folder), draw(WORDINGS["passkey"], 2))
    assert rows[1]["accuracy"] == expected.accuracy
    assert rows[1]["log_likelihood"] == pytest.approx(expected.log_likelihood, rel=1e-5)
    shown = run(*arguments, "--wording", "passkey", "--batch-size", 2)
    assert shown.out.startswith(f"passkey: accuracy {expected.accuracy:.3f} ± ")
    assert "inside its window" not in shown.err
    assert "inside its window" in run(*arguments, "--max-depth", 0.99).err
