"""Perplexity: known answers of known models, and the command that measures a file."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import zoo
from tests.command_line import assert_mistake, run, save
from tests.tiny import TEXT, VOCAB_SIZE, make_model, make_tokenizer, mixed
from tools.evaluation.compare import compare_models
from tools.evaluation.outcome import scores
from tools.evaluation.outcome_files import read_outcomes
from tools.scoring.perplexity import PerplexityResult, cut_windows, measure_perplexity
from tools.scoring.tokens import score_tokens
from tools.scoring.windows import window_outcomes

VOCABULARY = 50  # of the stubs
LONG_TEXT = 8 * TEXT


class Table:
    """A model whose next token depends on the last one only, by a table of logits [V, V]."""

    device = torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.rows = 0  # the most positions whose logits were asked for at once

    def hidden_states(self, ids: Tensor, /) -> Tensor:
        return F.one_hot(ids, VOCABULARY).to(self.logits.dtype)

    @property
    def lm_head(self) -> Callable[[Tensor], Tensor]:
        def head(hidden: Tensor) -> Tensor:
            self.rows = max(self.rows, len(hidden))
            return hidden @ self.logits

        return head


def random_table() -> Table:
    return Table(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)))


def random_ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    result = measure_perplexity(Table(torch.zeros(VOCABULARY, VOCABULARY)), random_ids(3, 16))
    assert result.all.value == pytest.approx(VOCABULARY)
    assert result.second_half.value == pytest.approx(VOCABULARY)
    assert result.all.standard_error == pytest.approx(0, abs=1e-4)


def test_a_sure_and_right_model_has_perplexity_1() -> None:
    # Each token is followed by the next greater one.
    table = Table(100 * torch.eye(VOCABULARY).roll(1, dims=1))
    ids = torch.arange(32).view(2, 16)
    assert measure_perplexity(table, ids).all.value == pytest.approx(1)


def test_perplexity_is_that_of_the_definition() -> None:
    table, ids = random_table(), random_ids(4, 16)
    losses = torch.empty(4, 15, dtype=torch.float64)
    for row in range(4):
        for n in range(15):
            logits = table.logits[ids[row, n]].double()
            losses[row, n] = -logits.log_softmax(0)[ids[row, n + 1]]
    result = measure_perplexity(table, ids)
    assert result.all.value == pytest.approx(losses.mean().exp().item(), rel=1e-6)
    assert result.all.tokens == 60
    # Predicted from positions 8 to 14.
    second = losses[:, 8:]
    assert result.second_half.value == pytest.approx(second.mean().exp().item(), rel=1e-6)
    assert result.second_half.tokens == second.numel() == 28
    error = losses.mean(1).std().item() / 2  # of the mean of 4 windows
    assert result.all.standard_error == pytest.approx(result.all.value * error, rel=1e-6)


def test_one_window_has_no_standard_error() -> None:
    assert measure_perplexity(random_table(), random_ids(1, 16)).all.standard_error is None


def test_logits_exist_for_a_few_positions_at_a_time() -> None:
    table = random_table()
    measure_perplexity(table, random_ids(2, 2048), batch_size=2)
    assert table.rows == 512


@pytest.mark.parametrize("first", [1, 700, 1199])
def test_scores_are_those_of_the_whole_logits(first: int) -> None:
    model = make_model(mixed("llama", max_position_embeddings=1200))
    ids = torch.randint(VOCAB_SIZE, (2, 1200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(ids)[:, first - 1 : -1]
    expected = logits.log_softmax(-1).gather(2, ids[:, first:, None]).squeeze(2)
    scores = score_tokens(model, ids, first=first)
    torch.testing.assert_close(scores.log_likelihood, expected)
    assert torch.equal(scores.greedy, logits.argmax(-1) == ids[:, first:])


def test_scores_of_low_precision_are_summed_in_float32() -> None:
    scores = score_tokens(Table(torch.zeros(VOCABULARY, VOCABULARY).bfloat16()), random_ids(1, 9))
    assert scores.log_likelihood.dtype == torch.float32
    torch.testing.assert_close(
        scores.log_likelihood, torch.full((1, 8), -math.log(VOCABULARY)), rtol=1e-6, atol=0
    )


def test_windows_and_batches_are_scored_alone() -> None:
    model = make_model(mixed("llama"))
    windows = random_ids(5, 64)
    done: list[int] = []
    together = measure_perplexity(model, windows, batch_size=2, advance=done.append)
    assert done == [2, 2, 1]
    alone = [measure_perplexity(model, window[None]).all.value for window in windows]
    mean = math.exp(sum(math.log(value) for value in alone) / 5)
    assert together.all.value == pytest.approx(mean, rel=1e-5)


def test_a_text_is_cut_into_whole_windows() -> None:
    ids = list(range(23))
    assert cut_windows(ids, 5).tolist() == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]
    assert cut_windows(ids, 5, 2).tolist() == [list(range(i, i + 5)) for i in (0, 5)]


@pytest.mark.parametrize(
    ("window", "count", "message"),
    [
        (24, None, "has 0 windows of 24 tokens"),
        (5, 5, "has 4 windows of 5 tokens, fewer than 5"),
        (3, None, "window must be at least 4"),
        (5, 0, "at least 1"),
    ],
    ids=str,
)
def test_windows_that_the_text_does_not_have_are_refused(
    window: int, count: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cut_windows(list(range(23)), window, count)


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        measure_perplexity(
            Table(torch.full((VOCABULARY, VOCABULARY), torch.nan)), random_ids(1, 8)
        )


def test_the_command_measures_a_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", mixed("llama"))
    (tmp_path / "text.txt").write_text(LONG_TEXT, encoding="utf-8")
    out = tmp_path / "rows.jsonl"
    arguments = ("perplexity", folder, "--text", tmp_path / "text.txt", "--window", 32)
    ids = make_tokenizer().encode(LONG_TEXT, add_bos=False)
    expected = measure_perplexity(zoo.load(folder), cut_windows(ids, 32, 3))
    found = json.loads(run(*arguments, "--windows", 3, "--json", "--out", out).out)
    assert found["perplexity"] == pytest.approx(expected.all.value, rel=1e-6)
    assert found["perplexity_second_half"] == pytest.approx(expected.second_half.value, rel=1e-6)
    assert (found["tokens"], found["windows"]) == (3 * 31, 3)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["metric"] for row in rows] == ["perplexity", "perplexity_second_half"]
    assert [row["value"] for row in rows] == [found[row["metric"]] for row in rows]
    assert all(row["case"]["context"] == 32 for row in rows)
    shown = run(*arguments, "--windows", 3).out
    assert shown.startswith(f"perplexity {expected.all.value:.3f} ± ")


def test_several_texts_are_measured_one_by_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", mixed("llama"))
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, text in zip(paths, (LONG_TEXT, LONG_TEXT[::-1]), strict=True):
        path.write_text(text, encoding="utf-8")
    options = ("perplexity", folder, "--window", 32, "--windows", 2)
    given = [x for path in paths for x in ("--text", path)]
    both = [json.loads(line) for line in run(*options, *given, "--json").out.splitlines()]
    alone = [json.loads(run(*options, "--text", path, "--json").out) for path in paths]
    assert [x | {"seconds": 0} for x in both] == [x | {"seconds": 0} for x in alone]
    assert both[0]["perplexity"] != both[1]["perplexity"]
    shown = run(*options, *given).out
    assert [line for line in shown.splitlines() if line in ("a.txt", "b.txt")] == [
        "a.txt",
        "b.txt",
    ]


def test_the_command_overrides_the_attention(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", mixed("llama"))
    (tmp_path / "text.txt").write_text(LONG_TEXT, encoding="utf-8")
    arguments = ("perplexity", folder, "--text", tmp_path / "text.txt", "--window", 64, "--json")
    ids = make_tokenizer().encode(LONG_TEXT, add_bos=False)
    full = zoo.load(folder, layer_types=["full_attention"] * 3)
    expected = measure_perplexity(full, cut_windows(ids, 64)).all.value
    found = {
        options: json.loads(run(*arguments, *options.split()).out)["perplexity"]
        for options in ("", "--layers 0-2", "--layers none", "--attention window_attention")
    }
    assert found["--layers 0-2"] == pytest.approx(expected, rel=1e-6)
    assert len(set(found.values())) == 4
    wide = json.loads(run(*arguments, "--layers", "none", "--window-size", 64).out)
    assert wide["perplexity"] == pytest.approx(expected, rel=1e-5)  # everything is in the window


def test_windows_of_two_models_are_compared_in_pairs(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", mixed("llama"))
    (tmp_path / "text.txt").write_text(LONG_TEXT, encoding="utf-8")
    samples = tmp_path / "samples.jsonl"
    for options in ("", "--layers none"):
        shown = run(
            "perplexity",
            folder,
            *("--text", tmp_path / "text.txt", "--window", 64, "--samples", samples, "--json"),
            *options.split(),
        )
        last = json.loads(shown.out)
    outcomes = read_outcomes([samples]).models
    assert len(outcomes) == 2
    cells = {x.metric: x for x in scores([*outcomes.values()][1])}
    assert cells["perplexity"].value == pytest.approx(last["perplexity"], rel=1e-9)
    assert cells["perplexity"].error == pytest.approx(last["perplexity_error"], rel=1e-9)
    assert cells["second_half_perplexity"].value == pytest.approx(
        last["perplexity_second_half"], rel=1e-9
    )
    compared = compare_models(outcomes)
    assert [x.metric for x in compared] == ["perplexity", "second_half_perplexity"]
    assert all(x.n == last["windows"] and x.unpaired == (0, 0) for x in compared)
    assert compared[0].difference != 0  # other layers
    assert compared[0].low is not None
    assert compared[0].low <= compared[0].difference


def test_windows_of_other_texts_and_of_other_tokenizers_are_no_pairs(tmp_path: Path) -> None:
    """Or a second text of the same name would be taken for done, with the losses of the first."""
    folder = save(tmp_path / "model", mixed("llama"))
    samples = tmp_path / "samples.jsonl"
    for name, content in (("a", LONG_TEXT), ("b", LONG_TEXT[::-1]), ("a", LONG_TEXT)):
        (tmp_path / name).mkdir(exist_ok=True)
        text = tmp_path / name / "text.txt"
        text.write_text(content, encoding="utf-8")
        options = ("--text", text, "--window", 64, "--windows", 2, "--samples", samples)
        assert run("perplexity", folder, *options).code == 0
    [outcomes] = read_outcomes([samples]).models.values()
    assert len(outcomes) == 2 * 2 * 2  # texts, windows, metrics; the third run has nothing new
    assert len({str(x.cell) for x in outcomes}) == 2
    result = PerplexityResult(losses=torch.ones(1, 7))
    one, other = (
        [x.item for x in window_outcomes(result, ids, {})]
        for ids in (torch.arange(8)[None], torch.arange(1, 9)[None])
    )
    assert not set(one) & set(other)


def test_outcomes_and_rows_do_not_share_a_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(LONG_TEXT, encoding="utf-8")
    both = tmp_path / "both.jsonl"
    options = ("--text", tmp_path / "text.txt", "--samples", both, "--out", both)
    assert_mistake(run("perplexity", tmp_path, *options), "--out and --samples are both")
