"""`zoo compare --relative`: each task once, void cells and short prompts left out, intervals."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import assert_mistake, run
from tests.test_compare import write
from tools.evaluation.outcome import Outcome
from tools.evaluation.relative import relative_accuracy


def accuracies(task: str, context: int, values: list[float]) -> list[Outcome]:
    return [
        Outcome(task=task, cell={"context": context}, item=str(i), metric="accuracy", value=v)
        for i, v in enumerate(values)
    ]


def flips(n: int, p: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [float(draw.random() < p) for _ in range(n)]


def test_each_task_counts_once_however_many_items_it_has() -> None:
    full = accuracies("passkey", 2048, [1.0] * 100) + accuracies("kv", 2048, [1.0, 1.0, 0.0, 0.0])
    less = accuracies("passkey", 2048, [1.0] * 100) + accuracies("kv", 2048, [1.0, 0.0, 0.0, 0.0])
    (row,) = relative_accuracy({"full": full, "less": less}, set())
    assert row.tasks == ("passkey", "kv")
    assert row.n == 104
    assert row.value == pytest.approx((1 + 0.25) / (1 + 0.5))
    assert row.low < row.value < row.high


def test_the_base_beside_itself_has_all_of_it() -> None:
    full = accuracies("passkey", 2048, flips(200, 0.7, 0))
    (row,) = relative_accuracy({"full": full, "again": list(full)}, set())
    assert (row.value, row.low, row.high) == (1, 1, 1)


def test_an_interval_has_the_width_of_the_delta_method() -> None:
    a, b = flips(2000, 0.8, 1), flips(2000, 0.6, 2)
    (row,) = relative_accuracy(
        {"full": accuracies("kv", 2048, a), "less": accuracies("kv", 2048, b)}, set()
    )
    x, y = np.array(a), np.array(b)
    error = (y - y.mean() / x.mean() * x).std() / math.sqrt(len(x)) / x.mean()
    assert row.high - row.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_what_is_void_short_no_accuracy_or_no_recall_does_not_count() -> None:
    extra = accuracies("passkey", 1024, [0.0] * 8) + accuracies("piqa", 4096, [0.0] * 8)
    loss = Outcome(task="kv", cell={"context": 4096}, item="0", metric="log_likelihood", value=-9)
    good, bad = (accuracies("kv", 4096, [1.0, v, 1.0, v]) for v in (1.0, 0.0))
    void = accuracies("kv", 8192, [0.0] * 4)
    models = {"full": [*good, *void, *extra], "less": [*bad, *void, *extra, loss]}
    cells = {("kv", json.dumps({"context": 8192}))}
    (row,) = relative_accuracy(models, cells, beyond=1024)
    assert (row.tasks, row.n, row.value) == (("kv",), 4, 0.5)
    with pytest.raises(ValueError, match="prompts of more than 4096 tokens"):
        relative_accuracy(models, cells, beyond=4096)


def test_models_share_what_both_have() -> None:
    full = accuracies("kv", 2048, [1.0] * 6) + accuracies("passkey", 2048, [1.0] * 6)
    models = {"full": full, "some": accuracies("kv", 2048, [1.0, 0.0])}
    (row,) = relative_accuracy(models, set())
    assert (row.tasks, row.n, row.value) == (("kv",), 2, 0.5)


def test_the_command_judges_by_the_model_with_full_attention(tmp_path: Path) -> None:
    full = accuracies("kv", 2048, flips(60, 0.9, 0)) + accuracies("kv", 4096, [0.0] * 60)
    path = write(tmp_path / "a.jsonl", "full", full, full=True)
    for name, p in (("hybrid", 0.8), ("eva", 0.3)):
        given = accuracies("kv", 2048, flips(60, p, 1)) + accuracies("kv", 4096, [1.0] * 60)
        write(path, name, given)
    done = run("compare", path, "--relative", "--json")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["base"], row["model"], row["n"]) for row in rows] == [
        ("full", "hybrid", 60),
        ("full", "eva", 60),
    ]
    assert rows[0]["value"] > rows[1]["value"]
    shown = run("compare", path, "--relative", "--model", "hybrid", "--model", "eva")
    assert "base: hybrid; tasks: kv" in shown.out
    assert_mistake(run("compare", path, "--beyond", 1024), "--beyond is for --relative")
    assert_mistake(run("compare", path, "--relative", "--by", "context"), "leave out --by")
    assert_mistake(run("compare", path, "--relative", "--beyond", 9000), "more than 9000 tokens")
