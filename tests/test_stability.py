"""`zoo bench stability`: runs that can be compared, a verdict that can fail, NaN that stops."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flasheva import EvaConfig
from flasheva.choice import Implementation
from flasheva.visibility import Positions, visible
from tests.command_line import Run as Done
from tests.command_line import assert_mistake, run
from tests.tiny import TEXT
from tools.benchmarks import stability
from tools.benchmarks.stability import (
    SPAN,
    Plan,
    Run,
    compare,
    initial_model,
    load_text,
    train,
)
from zoo.llama import Llama

CPU = torch.device("cpu")
TRITON_DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU  # interpreted there
IMPLS: tuple[Implementation, ...] = ("triton", "reference")
SIZES = ("--length", 64, "--batch-size", 2, "--window-size", 16)


SMALL = Plan(
    impls=("reference",),
    seeds=(0, 1),
    steps=2,
    batch_size=1,
    length=48,
    window_size=16,
    dtype=torch.float32,
    device=CPU,
)


def text(plan: Plan) -> Tensor:
    return load_text(plan, TEXT.encode())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def bench(file: Path, *arguments: object) -> Done:
    given = ("--text", file, "--device", "cpu", "--dtype", "float32")
    return run("bench", "stability", *given, *SIZES, *arguments)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Training


def test_a_seed_decides_weights_and_batches() -> None:
    first, again, other = (train(SMALL, "reference", seed, text(SMALL)) for seed in (0, 0, 1))
    assert first.losses == again.losses
    assert first.losses[0] != other.losses[0]
    weights = [initial_model(SMALL, impl, 0).state_dict() for impl in IMPLS]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_learns() -> None:
    done = train(replace(SMALL, steps=25), "reference", 0, load_text(SMALL, b"abcd" * 50))
    assert done.failure is None
    assert done.losses[0] > 5  # log 256 = 5.5
    assert done.losses[-1] < 1.5  # log 4 = 1.4: which letters there are


def test_the_kernels_train_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(
        SMALL.config,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        layer_types=("eva_attention",),
    )
    monkeypatch.setattr(Plan, "config", property(lambda self: tiny))  # Triton interprets slowly
    both = replace(SMALL, impls=IMPLS, device=TRITON_DEVICE)
    runs = [train(both, "reference", seed, text(both)) for seed in both.seeds]
    runs.append(train(both, "triton", 0, text(both)))
    assert compare(runs).within_spread


def test_the_shortest_row_sees_a_summary() -> None:
    config = EvaConfig(window_size=32, chunk_size=16)

    def sees(length: int) -> bool:
        mask = visible(config, Positions(), length, length, length // 16, CPU)
        return bool(mask[..., length:].any())

    assert (sees(63), sees(64)) == (False, True)
    replace(SMALL, window_size=32, length=64)
    with pytest.raises(ValueError, match="length must be at least 64"):
        replace(SMALL, window_size=32, length=63)


# What is not finite


def sabotage(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Llama], object], seed: int = 0
) -> None:
    """Lets `spoil` change the model of one seed."""

    def spoilt(plan: Plan, impl: Implementation, given: int) -> Llama:
        model = initial_model(plan, impl, given)
        if given == seed:
            spoil(model)
        return model

    monkeypatch.setattr(stability, "initial_model", spoilt)


@torch.no_grad()
def nan_weight(model: Llama) -> None:
    model.lm_head.weight[0, 0] = math.nan


def infinite_gradient(model: Llama) -> None:
    """In the second step."""
    passes = iter((1.0, math.inf))
    model.lm_head.weight.register_hook(lambda gradient: gradient * next(passes))


@pytest.mark.parametrize(
    ("spoil", "steps", "what"),
    [
        (nan_weight, 0, "the loss is nan at step 1"),
        (infinite_gradient, 1, "the norm of the gradients is "),
    ],
)
def test_what_is_not_finite_ends_a_run(
    spoil: Callable[[Llama], object], steps: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch, spoil)
    told: list[float] = []
    done = train(replace(SMALL, steps=4), "reference", 0, text(SMALL), told.append)
    assert done.failure is not None
    assert done.failure.startswith(what)
    assert done.failure.endswith(f"at step {steps + 1}")
    assert list(done.losses) == told
    assert len(told) == steps


def test_a_failed_run_fails_the_command_and_others_go_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch, nan_weight)
    out = tmp_path / "rows.jsonl"
    done = bench(file, "--impl", "reference", "--steps", 1, "--out", out)
    assert done.code == 1
    assert "reference, seed 0: FAILED: the loss is nan at step 1" in done.out
    assert "no comparison, because a run has failed" in done.out
    rows = [(row["metric"], row["case"]["seed"], row["case"].get("failure")) for row in read(out)]
    assert rows == [("failed_step", 0, "the loss is nan at step 1"), ("loss", 1, None)]


@pytest.mark.slow
def test_jobs_change_nothing_but_the_time() -> None:
    plan = replace(SMALL, steps=3)
    alone, together = (
        list(stability.train_all(plan, TEXT.encode(), jobs, lambda *_: None)) for jobs in (1, 2)
    )
    assert [(x.impl, x.seed, x.losses) for x in alone] == [
        (x.impl, x.seed, x.losses) for x in together
    ]


# Comparing


def made_up(impl: Implementation, seed: int, *curve: float) -> Run:
    """A run with this curve."""
    losses = tuple(loss for loss in curve for _ in range(SPAN))
    return Run(impl=impl, seed=seed, losses=losses, failure=None, seconds=1.0)


SEEDS = [made_up("reference", 0, 4, 2, 1), made_up("reference", 1, 4, 3, 1)]
CURVES = {
    "near": ((4, 2.5, 1), True),
    "as_far": ((4, 1, 1), True),
    "far_at_one_point": ((4, 3.25, 1), False),
    "far_on_average": ((4.5, 2.5, 1.5), False),
}


@pytest.mark.parametrize(("curve", "within"), CURVES.values(), ids=CURVES)
def test_a_curve_must_stay_within_the_spread_of_seeds(
    curve: tuple[float, ...], within: bool
) -> None:
    found = compare([*SEEDS, made_up("triton", 0, *curve)])
    assert found.spread == pytest.approx((1 / 3, 1))
    assert found.within_spread == within


def test_a_curve_is_compared_with_its_own_seed() -> None:
    found = compare([*SEEDS, made_up("triton", 0, 4, 2, 1), made_up("triton", 1, 4, 3, 1)])
    assert found.differences == {("triton", 0): (0, 0), ("triton", 1): (0, 0)}


def test_of_more_seeds_the_nearest_pair_counts() -> None:
    found = compare([*SEEDS, made_up("reference", 2, 4, 2.25, 1)])
    assert found.spread == pytest.approx((0.25 / 3, 0.25))


def test_a_curve_has_the_mean_of_each_span_and_of_what_is_left() -> None:
    losses = (*[3.0] * (SPAN // 2), *[1.0] * (SPAN // 2), *[2.0] * 5)
    done = Run(impl="reference", seed=0, losses=losses, failure=None, seconds=1.0)
    assert done.curve == [2.0, 2.0]
    assert done.final_loss == pytest.approx((20 * 3 + 25 * 1 + 5 * 2) / 50)


@pytest.mark.parametrize(("curve", "code"), [((4, 2, 1), 0), ((4, 4, 4), 1)])
def test_the_verdict_is_the_exit_status(
    curve: tuple[float, ...],
    code: int,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")

    def trained(plan: Plan, impl: Implementation, seed: int, *rest: object) -> Run:
        return made_up(impl, seed, *curve) if impl == "triton" else SEEDS[seed]

    monkeypatch.setattr(stability, "train", trained)
    monkeypatch.setattr(stability, "resolve_impl", lambda *rest, **options: None)
    out, picture = tmp_path / "rows.jsonl", tmp_path / "curves.png"
    done = bench(file, "--out", out, "--plot", picture)
    assert done.code == code
    assert (
        f"within the spread of two seeds of the reference: {'NO' if code else 'yes'}" in done.out
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [(row["impl"], row["metric"], row["case"].get("seed")) for row in read(out)]
    names = ("curve_difference_mean", "curve_difference_max")
    assert rows == [
        *((impl, "loss", seed) for impl in ("triton", "reference") for seed in (0, 1)),
        *(("reference", name, None) for name in names),
        *(("triton", name, seed) for seed in (0, 1) for name in names),
    ]


# The command


def test_a_row_has_the_curve_and_what_was_trained(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ("--impl", "reference", "--steps", 6, "--json", "--out", out)
    done = bench(file, *options)
    assert (done.code, done.err) == (0, "")
    *lines, seeds, verdict = (json.loads(line) for line in done.out.splitlines())
    rows = read(out)
    assert [row["value"] for row in rows] == [
        *(line["loss"] for line in lines),
        *(seeds["mean"], seeds["max"]),
    ]
    assert verdict == {"within_spread": None}  # nothing to compare
    for seed, (row, line) in enumerate(zip(rows[:2], lines, strict=True)):
        case = row["case"]
        assert (row["bench"], row["impl"], row["metric"]) == ("stability", "reference", "loss")
        assert (case["seed"], case["steps"]) == (seed, 6)
        assert (case["context"], case["batch"], case["eva"]["window_size"]) == (64, 2, 16)
        assert (case["text"], case["bytes"]) == ([file.name], len(TEXT.encode()))
        assert case["curve"] == line["curve"] == [row["value"]]  # 6 steps: one point


MISTAKES = {
    "impl": ("--impl cuda", "--impl must be one of triton, flex, reference"),
    "no_reference": ("--impl triton", "'reference' must be among"),
    "cannot_run": ("--impl flex --impl reference", "impl='flex' has no backward on a CPU"),
    "dtype": ("--dtype float16", "float16"),
    "one_seed": ("--seed 3 --seed 3", "two different seeds"),
    "steps": ("--steps 0", "steps must be at least 1, not 0"),
    "length": ("--length 40", "length must be at least 48"),
    "short_text": ("--length 4096 --impl reference", "a row needs 4097 bytes"),
    "text": ("--text nowhere.txt", "nowhere.txt"),
    "device": ("--device cuda:99", "sees no GPU 'cuda:99'"),
    "out": ("--out nowhere/rows.jsonl", "nowhere"),
    "plot": ("--plot curves.jpg", ".png"),
}


@pytest.mark.parametrize(("line", "what"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(line: str, what: str, file: Path) -> None:
    assert_mistake(bench(file, *line.split()), what)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "flex"])
def test_on_a_gpu_bfloat16_training_stays_within_the_spread(impl: str, file: Path) -> None:
    options = ("--length", 128, "--steps", 20, "--impl", impl, "--impl", "reference")
    done = run("bench", "stability", "--text", file, *options)
    assert done.code == 0, done
