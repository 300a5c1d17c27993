"""`zoo compare`: known differences, intervals that hold what they say, files, plots."""

import dataclasses
import importlib.util
import json
import lzma
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import assert_mistake, run
from tools.evaluation.compare import (
    Comparison,
    Floats,
    bootstrap_differences,
    compare_models,
)
from tools.evaluation.outcome import Outcome
from tools.evaluation.outcome_files import read_outcomes
from tools.evaluation.plots import loss_points, needle_points

PNG = b"\x89PNG\r\n\x1a\n"


def outcomes(
    values: Sequence[float],
    *,
    task: str = "needle",
    metric: str = "accuracy",
    weights: Sequence[float] | None = None,
    **cell: object,
) -> list[Outcome]:
    weights = weights or [1.0] * len(values)
    return [
        Outcome(task=task, cell=cell, item=f"item {i}", metric=metric, value=v, weight=w)
        for i, (v, w) in enumerate(zip(values, weights, strict=True))
    ]


def only(found: list[Comparison]) -> Comparison:
    (row,) = found
    return row


def coin_flips(n: int, p: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [float(draw.random() < p) for _ in range(n)]


def test_equal_outcomes_differ_by_nothing_and_that_is_noise() -> None:
    losses = [random.Random(i).uniform(10, 200) for i in range(50)]
    for metric, values in (("accuracy", coin_flips(50, 0.4, 0)), ("perplexity", losses)):
        weights = [float(20 + i) for i in range(50)]
        given = outcomes(values, metric=metric, weights=weights)
        row = only(compare_models({"a": given, "b": list(given)}))
        assert (row.difference, row.low, row.high) == (0, 0, 0)
        assert row.noise
        assert (row.n, row.unpaired) == (50, (0, 0))


@pytest.mark.parametrize("shift", [0.01, -0.25])
def test_a_constant_shift_is_found_however_much_items_differ(shift: float) -> None:
    values = [random.Random(i).uniform(0, 100) for i in range(40)]
    moved = [value + shift for value in values]
    given = {name: outcomes(x, metric="score") for name, x in (("a", values), ("b", moved))}
    row = only(compare_models(given))
    assert row.difference == pytest.approx(shift)
    assert row.low == pytest.approx(shift)
    assert row.high == pytest.approx(shift)
    assert not row.noise
    # The other way round it is the same with the other sign.
    turned = only(compare_models({"b": given["b"], "a": given["a"]}))
    assert turned.difference == pytest.approx(-shift)
    assert not turned.noise


def test_pairs_tell_more_than_two_means() -> None:
    # The same items are right but for 12 of 200, all of which the second model gets wrong: a
    # paired interval leaves 0 out, while the means alone differ by 1.2 of their errors.
    base = coin_flips(200, 0.5, 1)
    right = [i for i, value in enumerate(base) if value]
    other = [0.0 if i in right[:12] else value for i, value in enumerate(base)]
    paired = compare_models({"a": outcomes(base), "b": outcomes(other)})
    assert only(paired).difference == pytest.approx(-0.06)
    assert not only(paired).noise
    random.Random(0).shuffle(other)
    assert only(compare_models({"a": outcomes(base), "b": outcomes(other)})).noise


def test_intervals_of_accuracies_have_the_standard_error_of_paired_differences() -> None:
    base, other = coin_flips(500, 0.6, 2), coin_flips(500, 0.5, 3)
    row = only(compare_models({"a": outcomes(base), "b": outcomes(other)}))
    differences = np.array(other) - np.array(base)
    error = differences.std() / math.sqrt(500)
    assert row.low == pytest.approx(differences.mean() - 1.96 * error, abs=0.1 * error)
    assert row.high == pytest.approx(differences.mean() + 1.96 * error, abs=0.1 * error)


def drawn_pairs(generator: np.random.Generator, n: int, perplexity: bool) -> Iterator[Floats]:
    """Items of two models whose outcomes go together: right or wrong, or losses of 1-20 tokens."""
    shared, own = generator.random(n), generator.standard_normal(n)
    if perplexity:
        weight = generator.integers(1, 21, n).astype(float)
        values = (2 + shared + own / 9, 2.1 + shared)
    else:
        weight = np.ones(n)
        values = ((shared < 0.7).astype(float), (shared + own / 5 < 0.6).astype(float))
    for value in values:
        yield np.stack([value * weight, weight], 1)


@pytest.mark.parametrize("perplexity", [False, True], ids=["accuracy", "perplexity"])
def test_19_of_20_intervals_hold_the_true_difference(perplexity: bool) -> None:
    generator = np.random.default_rng(0)

    def score(pairs: Floats) -> float:
        ratio = pairs[:, 0].sum() / pairs[:, 1].sum()
        return math.exp(ratio) if perplexity else ratio

    base, other = drawn_pairs(generator, 4_000_000, perplexity)
    truth = score(other) - score(base)
    draws, held = 1000, 0
    for _ in range(draws):
        base, other = drawn_pairs(generator, 200, perplexity)
        found = bootstrap_differences(base, other, perplexity=perplexity, resamples=1000, seed=0)
        low, high = np.quantile(found, [0.025, 0.975])
        held += int(low <= truth <= high)
    assert 0.92 <= held / draws <= 0.98  # 0.95 by four standard errors


def test_a_perplexity_is_exp_of_a_ratio_of_sums_in_every_resample() -> None:
    values, weights = [10.0, 40.0, 5.0], [5.0, 10.0, 3.0]
    others = [12.0, 30.0, 6.0]
    row = only(
        compare_models(
            {
                "a": outcomes(values, metric="word_perplexity", weights=weights),
                "b": outcomes(others, metric="word_perplexity", weights=weights),
            }
        )
    )
    assert row.base_score == pytest.approx(math.exp(55 / 18))
    assert row.difference == pytest.approx(math.exp(48 / 18) - math.exp(55 / 18))
    # Three items have ten different resamples; no other difference may come up.
    possible = set()
    for i in range(4):
        for j in range(4 - i):
            times = (i, j, 3 - i - j)
            sums = [
                sum(t * x for t, x in zip(times, column, strict=True))
                for column in (values, others, weights)
            ]
            possible.add(round(math.exp(sums[1] / sums[2]) - math.exp(sums[0] / sums[2]), 6))
    base, other = (np.array([x, weights]).T for x in (values, others))
    found = bootstrap_differences(base, other, perplexity=True, resamples=2000, seed=0)
    assert set(np.round(found, 6)) == possible


def test_a_seed_gives_the_same_interval_whatever_else_is_compared() -> None:
    draw = random.Random(0)
    base, other = (outcomes([draw.random() for _ in range(60)], metric="f1") for _ in range(2))
    alone = only(compare_models({"a": base, "b": other}, seed=3))
    more = compare_models(
        {
            "a": outcomes(coin_flips(60, 0.3, 8), task="other") + base,
            "b": outcomes(coin_flips(60, 0.6, 9), task="other") + other,
        },
        seed=3,
    )
    assert alone in more
    again = only(compare_models({"a": base, "b": other}, seed=4))
    assert again.difference == alone.difference
    assert (again.low, again.high) != (alone.low, alone.high)
    # Another seed makes a small difference.
    assert again.low == pytest.approx(alone.low, abs=0.01)


def test_only_items_of_both_are_compared_and_the_others_are_counted() -> None:
    base, other = outcomes([1, 1, 0, 0]), outcomes([0, 1, 1, 1, 1, 1])
    row = only(compare_models({"a": base[1:], "b": other}))
    assert (row.n, row.unpaired) == (3, (0, 3))
    assert row.base_score == pytest.approx(1 / 3)
    assert row.score == 1
    with pytest.raises(ValueError, match="no item of a is also one of b"):
        compare_models({"a": base[:1], "b": other[1:]})


def test_cells_are_rows_and_by_pools_them() -> None:
    def cells(*values: float) -> list[Outcome]:
        return [
            Outcome(
                task="needle",
                cell={"context": context, "depth": depth},
                item=f"item {i}",
                metric="accuracy",
                value=values[context // 1024 - 1],
            )
            for context in (1024, 2048)
            for depth in (0.1, 0.9)
            for i in range(5)
        ]

    models = {"a": cells(1, 1), "b": cells(1, 0), "c": cells(0, 0)}
    rows = compare_models(models)
    assert [(r.cell["context"], r.cell["depth"], r.model) for r in rows] == [
        (context, depth, model)
        for context in (1024, 2048)
        for depth in (0.1, 0.9)
        for model in ("b", "c")
    ]
    pooled = compare_models(models, by=["context"])
    assert [(r.cell, r.model, r.n, r.difference) for r in pooled] == [
        ({"context": 1024}, "b", 10, 0),
        ({"context": 1024}, "c", 10, -1),
        ({"context": 2048}, "b", 10, -1),
        ({"context": 2048}, "c", 10, -1),
    ]
    assert [(r.cell, r.n) for r in compare_models(models, by=[])] == [({}, 20), ({}, 20)]
    with pytest.raises(ValueError, match=r"no part of a cell 'length'.*there: context, depth"):
        compare_models(models, by=["length"])


def test_one_pair_has_no_interval() -> None:
    row = only(compare_models({"a": outcomes([1]), "b": outcomes([0])}))
    assert (row.low, row.high, row.noise, row.few) == (None, None, True, True)


def write(
    path: Path,
    model: str,
    given: Sequence[Outcome],
    case: str = "0123456789abcdef",
    *,
    full: bool = False,
) -> Path:
    """Lines as `zoo evaluate --samples` writes them."""
    with path.open("a", encoding="utf-8") as file:
        for x in given:
            row = {"model": model, "case": case, "full": full, **dataclasses.asdict(x)}
            file.write(json.dumps(row) + "\n")
    return path


def test_a_cell_that_full_attention_cannot_do_is_void(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "hybrid", grid(0.2, 1))
    write(path, "full", grid(0.3, 0), full=True)
    done = run("compare", path, "--by", "context")
    rows = [line.split() for line in done.out.splitlines() if line.startswith("needle")]
    assert [row[-1] for row in rows] == ["void", "void"]
    assert "of 1 differences are more than noise" in done.out  # the loss by position
    assert "2 more are void" in done.out
    done = run("compare", path, "--by", "context", "--json")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [row["void"] for row in found] == [row["task"] == "needle" for row in found]
    # Another model of full attention is not judged by the first one.
    write(path, "larger", grid(0.9, 2), full=True)
    both = ("--model", "full", "--model", "larger", "--by", "context", "--metric", "accuracy")
    rows = [line.split() for line in run("compare", path, *both).out.splitlines()]
    assert [row[-1] for row in rows if row and row[0] == "needle"] == ["higher", "higher"]


def grid(p: float, seed: int) -> list[Outcome]:
    """Needles and losses of a model."""
    found = [
        Outcome(
            task="needle",
            cell={"context": context, "depth": depth, "wording": "magic"},
            item=f"item {i}",
            metric="accuracy",
            value=float(random.Random(f"{seed} {context} {depth} {i}").random() < p),
        )
        for context in (1024, 2048)
        for depth in (0.125, 0.5)
        for i in range(40)
    ]
    for position, loss in (("1-63", 4.0), ("64-127", 3.5 - p)):
        values = [100 * loss + i for i in range(4)]
        found += outcomes(
            values,
            task="loss_by_position",
            metric="perplexity",
            weights=[100.0] * 4,
            position=position,
        )
    return found


def test_the_command_prints_what_is_noise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "full", grid(0.9, 0))
    write(path, "hybrid", grid(0.9, 1))
    other = write(tmp_path / "b.jsonl", "eva", grid(0.1, 2))
    done = run("compare", path, other, "--metric", "accuracy", "--by", "context")
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    rows = [line for line in lines if line and line[0] == "needle"]
    assert [(row[2], row[6], row[-1]) for row in rows] == [
        ("1024", "hybrid", "noise"),
        ("1024", "eva", "lower"),
        ("2048", "hybrid", "noise"),
        ("2048", "eva", "lower"),
    ]
    assert "base: full" in done.out
    assert "2 of 4 differences are more than noise" in done.out
    assert done.err == ""
    # Other models, as JSON: the loss by position has windows, few of them.
    done = run("compare", path, other, "--model", "eva", "--model", "full", "--json")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert {(row["base"], row["model"]) for row in found} == {("eva", "full")}
    assert {row["task"]: row["few"] for row in found} == {
        "needle": False,
        "loss_by_position": True,
    }
    assert "few items (as few as 4)" in done.err
    wanted = compare_models({"eva": grid(0.1, 2), "full": grid(0.9, 0)})
    assert [row["low"] for row in found] == [row.low for row in wanted]


def test_the_command_says_what_has_no_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "full", grid(0.9, 0))
    write(path, "eva", grid(0.9, 1)[3:])
    done = run("compare", path, "--metric", "accuracy")
    assert done.code == 0
    assert done.err == (
        "warning: needle: 3 outcomes of full and 0 of eva have no pair and are left out\n"
    )


def test_files_are_read_line_by_line(tmp_path: Path) -> None:
    first = outcomes([0, 1, 1])
    path = write(tmp_path / "a.jsonl", "full", first)
    with path.open("a") as file:
        file.write('{"model": "full", "case": "01\n')  # cut by a kill
    write(path, "full", outcomes([1]))  # item 0 anew: the last counts
    write(path, "full", first, case="f" * 16)
    found = read_outcomes([path]).models
    assert list(found) == ["full (01234567)", "full (ffffffff)"]
    assert [x.value for x in found["full (01234567)"]] == [1, 1, 1]
    assert found["full (ffffffff)"] == first
    packed = tmp_path / "a.jsonl.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    assert read_outcomes([packed]).models == found


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"model": "a"}', "line 2: not an outcome"),
        ("[1, 2]", "line 2: not an outcome"),
        ('{"value": 1, "weight": 0}', "a weight above 0"),
        ('{"value": NaN, "weight": 1}', "a value must be finite"),
    ],
    ids=["fields", "kind", "weight", "nan"],
)
def test_other_lines_are_refused(tmp_path: Path, line: str, what: str) -> None:
    path = write(tmp_path / "a.jsonl", "full", outcomes([1]))
    if "value" in line:
        row = json.loads(path.read_text()) | json.loads(line)
        line = json.dumps(row)
    path.write_text(path.read_text() + line + "\n")
    assert_mistake(run("compare", path), what)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "full", grid(0.9, 0))
    assert_mistake(run("compare", path), "needs two models; here: full")
    assert_mistake(run("compare", tmp_path / "b.jsonl"), "No such file")
    (tmp_path / "c.jsonl").write_bytes(b"\x89PNG\nno outcome\n")
    assert_mistake(run("compare", tmp_path / "c.jsonl"), "line 1: not an outcome")
    (tmp_path / "c.jsonl").write_bytes(b"")
    assert_mistake(run("compare", tmp_path / "c.jsonl"), "holds no outcomes")
    write(path, "eva", grid(0.9, 1))
    assert_mistake(run("compare", path, "--model", "mamba"), "there: full, eva")
    assert_mistake(run("compare", path, "--metric", "f1"), "there: accuracy, perplexity")
    assert_mistake(run("compare", path, "--by", "size"), "no part of a cell 'size'")
    assert_mistake(run("compare", path, "--by", ","), "none pools a task")
    assert_mistake(run("compare", path, "--model", "eva"), "give --model for another one: full")
    assert_mistake(run("compare", path, "--resamples", 9), "at least 100")
    assert_mistake(run("compare", path, "--seed", -1), "seed must be at least 0, not -1")
    assert_mistake(run("compare", path, "--plot", path), "not to the file")


def test_what_is_drawn_are_scores_and_losses() -> None:
    models = {"full": grid(1.0, 0), "eva": grid(0.0, 0)}
    needles = needle_points(models)
    assert [(x.model, x.context, x.depth, x.value, x.n) for x in needles] == [
        (model, context, depth, value, 40)
        for model, value in (("full", 1), ("eva", 0))
        for context in (1024, 2048)
        for depth in (0.125, 0.5)
    ]
    losses = loss_points(models)
    assert [(x.model, x.first, x.last, x.n) for x in losses] == [
        (model, *place, 4) for model in ("full", "eva") for place in ((1, 63), (64, 127))
    ]
    assert [x.loss for x in losses] == pytest.approx([4.015, 2.515, 4.015, 3.515])
    # Means of four windows that are 0.01 apart.
    assert [x.error for x in losses] == pytest.approx([0.01 * math.sqrt(5 / 3) / 2] * 4)


def test_the_command_draws_plots_with_their_numbers_beside(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "a.jsonl", "full", grid(0.9, 0))
    done = run("compare", path, "--plot", tmp_path / "one")  # of one model, too
    assert done.code == 0
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        f"{name}.{kind}"
        for name in ("needle-accuracy", "loss_by_position")
        for kind in ("png", "jsonl")
    }
    write(path, "eva", grid(0.1, 1))
    done = run("compare", path, "--plot", tmp_path / "two" / "plots")
    assert done.code == 0
    for name, lines in (("needle-accuracy", 8), ("loss_by_position", 4)):
        file = tmp_path / "two" / "plots" / f"{name}.png"
        assert f"{file}\n" in done.out
        assert file.read_bytes().startswith(PNG)
        numbers = file.with_suffix(".jsonl").read_text().splitlines()
        assert len(numbers) == lines
        assert {json.loads(line)["model"] for line in numbers} == {"full", "eva"}


def test_without_matplotlib_there_is_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = write(tmp_path / "a.jsonl", "full", grid(0.9, 0))
    assert_mistake(
        run("compare", path, "--plot", tmp_path / "p"), "pip install 'flasheva-zoo[plot]'"
    )
    assert not (tmp_path / "p").exists()


def test_what_has_no_grid_and_no_positions_is_not_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "a.jsonl", "full", outcomes([1, 0]))
    assert_mistake(run("compare", path, "--plot", tmp_path / "p"), "nothing to plot")
    assert not (tmp_path / "p").exists()
