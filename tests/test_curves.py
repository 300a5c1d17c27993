"""`zoo curves`: points are means of steps, of the stage and metric that were asked for."""

import json
import lzma
from pathlib import Path

import pytest

from tests.command_line import assert_mistake, run
from tools.curves import CurvePoint, curve


def write(path: Path, losses: list[float], stage: str = "distill", tokens: int = 100) -> Path:
    """Adds the lines of a stage to a file of metrics."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        for step, loss in enumerate(losses):
            row = {"stage": stage, "step": step, "tokens": tokens * (step + 1), "loss": loss}
            file.write(json.dumps(row) + "\n")
    return path


def test_points_are_means_of_steps_of_the_last_stage(tmp_path: Path) -> None:
    path = write(tmp_path / "mine" / "metrics.jsonl", [9.0, 9.0], stage="align")
    write(path, [1.0, 3.0, 5.0])
    with path.open("a") as file:
        file.write('{"stage": "distill", "st')  # cut by a kill
    assert curve(path, "loss", None, 2) == [
        CurvePoint(run="mine", stage="distill", tokens=200, value=2.0, n=2),
        CurvePoint(run="mine", stage="distill", tokens=300, value=5.0, n=1),
    ]
    assert [point.value for point in curve(path, "loss", "align", 1)] == [9.0, 9.0]


def test_steps_without_the_metric_count_as_none(tmp_path: Path) -> None:
    path = write(tmp_path / "hybrid.metrics.jsonl", [1.0, 2.0])
    with path.open("a") as file:
        row = {"stage": "distill", "step": 2, "tokens": 300, "loss": 3.0, "perplexity": 20.0}
        file.write(json.dumps(row) + "\n")
    assert curve(path, "perplexity", None, 1) == [
        CurvePoint(run="hybrid", stage="distill", tokens=300, value=20.0, n=1)
    ]


def test_the_command_draws_runs_with_the_numbers_beside(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plain = write(tmp_path / "a" / "metrics.jsonl", [2.0, 1.0])
    packed = tmp_path / "b.metrics.jsonl.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    done = run("curves", plain, packed, "--out", tmp_path / "loss.png", "--mean", 2)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [(row["run"], row["value"], row["n"]) for row in rows] == [("a", 1.5, 2), ("b", 1.5, 2)]


def test_mistakes_are_one_line_and_say_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "metrics.jsonl", [1.0])
    other = tmp_path / "other.jsonl"
    other.write_text('{"a": 1}\n')
    plot = ("--out", tmp_path / "loss.png")
    assert_mistake(run("curves", path, *plot, "--metric", "kl"), "has no 'kl' in stage 'distill'")
    assert_mistake(run("curves", path, *plot, "--stage", "a"), "its stages are distill")
    assert_mistake(run("curves", path, *plot, "--mean", 0), "mean must be at least 1, not 0")
    assert_mistake(run("curves", path, "--out", tmp_path / "a.pdf"), "a plot is a .png file")
    assert_mistake(run("curves", other, *plot), "holds no metrics of `zoo finetune`")
    other.write_text('{"stage": "a", "step": 0, "tokens": null, "loss": 1.0}\n')
    assert_mistake(run("curves", other, *plot), "holds no metrics of `zoo finetune`")
    assert not (tmp_path / "loss.png").exists()


def test_what_a_run_recorded_is_never_replaced(tmp_path: Path) -> None:
    """The numbers beside FILE.png are FILE.jsonl, and a run's own file is metrics.jsonl."""
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "a" / "metrics.jsonl", [2.0, 1.0])
    packed = write(tmp_path / "hybrid.jsonl", [2.0, 1.0])
    for out in (path.with_suffix(".png"), packed.with_suffix(".png")):
        assert_mistake(run("curves", path, packed, "--out", out), "what a run recorded")
    assert_mistake(run("curves", packed, "--out", path.with_suffix(".png")), "what a run recorded")
    assert len(path.read_text().splitlines()) == len(packed.read_text().splitlines()) == 2


def test_two_runs_of_one_name_are_not_drawn_as_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [write(tmp_path / f / "window.metrics.jsonl", [2.0, 1.0]) for f in ("a", "b")]
    done = run("curves", *files, "--out", tmp_path / "loss.png")
    assert_mistake(done, "would both be called 'window' in the picture")
    assert not (tmp_path / "loss.png").exists()
