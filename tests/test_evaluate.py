"""`zoo evaluate`: what it prints and records, and that a killed run goes on to the same end."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

import zoo
from tests.command_line import ENVIRONMENT, ROOT, Run, assert_mistake, run, save
from tests.harness_inputs import write_data
from tests.tiny import hf_config, make_model, mixed
from tools.evaluation.generating import ModelWriter, Written
from tools.evaluation.outcome import Outcome, Score
from tools.evaluation.record import Record, key_of
from tools.evaluation.report import Column, print_scores, report, score_key
from tools.evaluation.suite import choose_tasks, groups

CONTEXT = 640
NEEDLES = ("--tasks", "needle", "--context", 512)
KEYS = ("--tasks", "multikey", "--context", CONTEXT)  # has no wordings, so fewer samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a layer of each type."""
    config = mixed("llama", max_position_embeddings=CONTEXT)
    return save(tmp_path_factory.mktemp("models") / "mixed", config)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention everywhere."""
    config = hf_config("llama", max_position_embeddings=CONTEXT)
    return save(tmp_path_factory.mktemp("models") / "full", config)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose to hide things in, short enough for a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(" ".join(f"Sentence {i} says little." for i in range(200)), encoding="utf-8")
    return path


def checked(text: Path) -> str:
    """A text's name in results."""
    return f"{text.name}-{zlib.crc32(text.read_bytes()):08x}"


def evaluate(*arguments: object) -> Run:
    done = run("evaluate", *arguments)
    assert done.code == 0, done.err
    return done


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(path: Path) -> list[tuple[object, ...]]:
    """What rows measure: not when and by which command."""
    return [
        (json.dumps(row["case"], sort_keys=True), row["metric"], row["value"], row["spread"])
        for row in rows_of(path)
    ]


def test_the_list_names_every_task_and_group() -> None:
    for arguments in (["--list"], ["--tasks", "list"]):
        out = evaluate(*arguments).out
        names = [line.split()[0] for line in out.splitlines() if line.strip()]
        assert {"passkey", "mqar", "squad", "fda", "recall", "commonsense", "all"} <= set(names)


def test_groups_stand_for_their_tasks_each_once() -> None:
    assert choose_tasks(["kv", "recall", "kv"]) == [
        "kv",
        *(task for task in groups()["recall"] if task != "kv"),
    ]
    assert set(groups()["commonsense"]) <= set(groups()["all"])


def test_rows_and_samples_say_what_was_measured(folder: Path, text: Path, tmp_path: Path) -> None:
    out, samples = tmp_path / "out.jsonl", tmp_path / "samples.jsonl"
    files = ("--judge-text", text, "--out", out, "--samples", samples)
    shown = evaluate(folder, *NEEDLES, "--n", 4, *files, "--limit", 2, "--seed", 7).out
    rows, items = rows_of(out), rows_of(samples)
    first = rows[0]
    assert first["bench"] == "evaluate"
    case = first["case"]
    assert isinstance(case, dict)
    assert case["task"] == "needle"
    assert case["cell"] == {"context": 512}
    assert (case["seed"], case["limit"], case["n"]) == (7, 2, 12)  # 2 of each of 6 wordings
    assert (case["split"], case["fillers"]) == ("judge", ["river", checked(text)])
    assert case["layers"] == {
        "eva_attention": "0",
        "full_attention": "1",
        "window_attention": "2",
    }
    assert {row["metric"] for row in rows} == {"accuracy", "log_likelihood"}
    # Each of 6 wordings, both depths that 2 items have, and all together, of 2 metrics.
    assert len(rows) == 2 * (6 + 2 + 1)
    assert len(items) == 2 * 12
    assert set(items[0]) == {
        *("model", "case", "full", "task", "cell", "item", "metric", "value", "weight")
    }
    values = [x["value"] for x in items if x["metric"] == "log_likelihood"]
    mean = sum(float(str(value)) for value in values) / 12
    (row,) = (r for r in rows if r["case"] == case and r["metric"] == "log_likelihood")
    assert row["value"] == pytest.approx(mean)
    assert f"{mean:.3f}" in shown
    assert row["spread"] is not None


def test_batches_of_1_and_32_give_the_same_rows(folder: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 32):
        out = tmp_path / f"{size}.jsonl"
        evaluate(folder, *KEYS, "--n", 5, "--judge-text", text, "--batch-size", size, "--out", out)
        found.append(rows_of(out))
    assert len(found[0]) == len(found[1]) > 0
    for one, other in zip(*found, strict=True):
        assert one["metric"] == other["metric"]
        assert one["value"] == pytest.approx(other["value"], rel=1e-5)


def test_a_run_goes_on_behind_what_the_record_holds(
    full: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (full, *KEYS, "--n", 8, "--batch-size", 3, "--judge-text", text)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluate(*arguments, "--out", whole, "--samples", tmp_path / "samples")
    lines = (tmp_path / "samples").read_bytes().splitlines(keepends=True)
    # A kill: 7 outcomes, of 3 samples and a half, and a part of the next line.
    (tmp_path / "again").write_bytes(b"".join(lines[:7]) + lines[7][:30])
    written: list[int] = []
    write = ModelWriter.write

    def counted(
        self: ModelWriter,
        prompts: Sequence[list[int]],
        limit: int,
        answers: Sequence[list[int]] | None = None,
    ) -> list[Written]:
        written.append(len(prompts))
        return write(self, prompts, limit, answers)

    monkeypatch.setattr(ModelWriter, "write", counted)
    evaluate(*arguments, "--out", cut, "--samples", tmp_path / "again")
    assert sum(written) == 8 - 3
    assert_same(numbers(cut), numbers(whole))
    written.clear()
    evaluate(*arguments, "--out", cut, "--samples", tmp_path / "again")
    assert written == []
    assert len(numbers(cut)) == len(numbers(whole))  # no row a second time
    evaluate(*arguments, "--out", cut, "--samples", tmp_path / "again", "--seed", 1)
    assert sum(written) == 8


def assert_same(found: list[tuple[object, ...]], expected: list[tuple[object, ...]]) -> None:
    """The same rows; other batches round otherwise."""
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one[2:] == pytest.approx(other[2:], rel=1e-5)


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(
    full: Path, text: Path, tmp_path: Path
) -> None:
    given = (full, *KEYS, "--n", 12, "--batch-size", 1, "--judge-text", text)
    arguments = [str(argument) for argument in given]
    whole, killed, samples = (tmp_path / name for name in ("whole", "killed", "samples"))
    files = ["--out", str(killed), "--samples", str(samples)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.evaluate", *arguments, *files],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if samples.exists() and samples.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    there = samples.read_bytes().count(b"\n")
    assert 4 <= there < 24
    assert not killed.exists()  # rows come when a task is complete
    evaluate(*arguments, *files)
    assert samples.read_bytes().count(b"\n") in (24, 25)  # a line may have been cut
    evaluate(*arguments, "--out", whole)
    assert_same(numbers(killed), numbers(whole))


def outcome(item: str, value: float = 1.0, **cell: object) -> Outcome:
    return Outcome(task="needle", cell=cell, item=item, metric="accuracy", value=value)


def test_a_record_keeps_models_apart_and_passes_over_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with Record(path, "a", {"model": "a"}) as record:
        record.add(outcome("0", context=512))
        record.add(outcome("0", context=512))  # known
        record.add(outcome("1", context=512))
    whole = path.read_bytes()
    assert whole.count(b"\n") == 2
    path.write_bytes(whole[:-20])
    with Record(path, "b", {"model": "b"}) as record:
        assert not record.done
        record.add(outcome("1", context=512))
    for _ in range(2):  # what was cut is in the middle by now
        with Record(path, "a", {"model": "a"}) as record:
            assert record.done == {key_of(outcome("0", context=512))}
    path.write_bytes(b'{"model": "a"}\n' + whole)
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1"):
        Record(path, "a", {"model": "a"})


def test_a_report_is_by_parts_of_the_cell_and_says_nothing_twice() -> None:
    outcomes = [
        outcome("0", 1.0, context=1, depth=0.1),
        outcome("1", 0.0, context=1, depth=0.9),
        outcome("2", 0.0, context="published"),
    ]
    found = report(outcomes, [("context",), ("context", "depth")])
    assert [(x.cell, x.value, x.n) for x in found] == [
        ({"context": 1}, 0.5, 2),
        ({"context": "published"}, 0.0, 1),
        ({"context": 1, "depth": 0.1}, 1.0, 1),
        ({"context": 1, "depth": 0.9}, 0.0, 1),
    ]
    assert [x.cell for x in report(outcomes, [])] == [x.cell for x in outcomes]


def column(name: str, *, full: bool, **values: float) -> Column:
    found = [
        Score(task=task, cell={}, metric="accuracy", value=value, error=0.01, n=200)
        for task, value in values.items()
    ]
    return Column(name=name, full=full, scores={score_key(score): score for score in found})


def test_where_full_attention_fails_the_others_are_void(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hybrid = column("hybrid", full=False, needle=0.3, kv=0.3, hellaswag=0.3)
    base = column("base", full=True, needle=0.9, kv=0.49, hellaswag=0.31)
    print_scores([hybrid, base])
    lines = {
        line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line
    }
    assert lines["needle"][-6:] == ["0.300", "±", "0.010", "0.900", "±", "0.010"]
    assert lines["kv"][-4:] == ["void", "0.490", "±", "0.010"]
    assert "void" not in lines["hellaswag"]  # of four choices, a quarter is right by chance
    print_scores([hybrid])
    assert "void" not in capsys.readouterr().out
    print_scores([base, hybrid, column("larger", full=True, kv=0.9)])
    (line,) = (x.split() for x in capsys.readouterr().out.splitlines() if x.startswith("kv"))
    assert line[-7:] == ["0.490", "±", "0.010", "void", "0.900", "±", "0.010"]


def test_another_text_of_the_same_name_is_not_taken_for_the_first(
    full: Path, text: Path, tmp_path: Path
) -> None:
    samples, names = tmp_path / "samples", []
    for folder in ("a", "b"):
        other = tmp_path / folder / text.name
        other.parent.mkdir()
        other.write_text(f"{folder}. {text.read_text(encoding='utf-8')}", encoding="utf-8")
        evaluate(full, *KEYS, "--n", 1, "--judge-text", other, "--samples", samples)
        names.append(checked(other))
    found = [row["cell"] for row in rows_of(samples) if row["metric"] == "accuracy"]
    assert [cell["filler"] for cell in found if isinstance(cell, dict)] == names


def test_a_row_of_another_device_is_another_row(full: Path, text: Path, tmp_path: Path) -> None:
    out, samples = tmp_path / "out", tmp_path / "samples"
    files = ("--judge-text", text, "--out", out, "--samples", samples)
    evaluate(full, *KEYS, "--n", 1, *files)
    rows = rows_of(out)
    out.write_text(
        "".join(json.dumps(row | {"device": "another"}) + "\n" for row in rows), encoding="utf-8"
    )
    evaluate(full, *KEYS, "--n", 1, *files)
    assert len(rows_of(out)) == 2 * len(rows)


def test_a_limit_holds_for_tasks_of_the_harness_beside_recall(
    full: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    out, samples = tmp_path / "out", tmp_path / "samples"
    tasks = ("--tasks", "multikey,piqa,positions", "--data", write_data(tmp_path), "--text", text)
    files = ("--judge-text", text, "--out", out, "--samples", samples)
    arguments = (full, *tasks, "--context", CONTEXT, "--n", 2, "--far", 8, *files)
    evaluate(*arguments, "--limit", 1)
    rows = rows_of(out)
    for row in rows:
        case = row["case"]
        assert isinstance(case, dict)
        assert (case["limit"], case["n"], case["seed"]) == (1, 1, 0)
    assert {row["case"]["task"] for row in rows if isinstance(row["case"], dict)} == {
        *("multikey", "piqa", "loss_by_position", "repeated_ngrams")
    }
    evaluate(*arguments, "--limit", 1)
    assert rows_of(out) == rows
    evaluate(*arguments, "--limit", 2)
    limits = [row["case"]["limit"] for row in rows_of(out) if isinstance(row["case"], dict)]
    assert limits.count(2) > limits.count(1) == len(rows)


def test_models_of_one_command_stand_side_by_side(folder: Path, full: Path, text: Path) -> None:
    shown = evaluate(full, folder, *NEEDLES, "--n", 1, "--judge-text", text).out
    header, *_ = shown.splitlines()
    assert header.split() == ["task", "cell", "metric", "n", str(full), str(folder)]
    needles = [line for line in shown.splitlines() if line.startswith("needle")]
    accuracies = [line for line in needles if " accuracy " in line]
    assert accuracies
    assert all(line.rstrip().endswith("void") for line in accuracies)
    assert not any("void" in line for line in needles if "log_likelihood" in line)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--tasks", "nedle"), "there is no task 'nedle'"),
        (("--tasks", ""), "name at least one task"),
        (("--tasks", "squad"), "--data"),
        (("--tasks", "positions"), "--text"),
        (("--tasks", "positions", "--text", "/no/such"), "there is no file /no/such"),
        (("--tasks", "kv", "--out", "same", "--samples", "./same"), "name two files"),
        (("--tasks", "kv", "--n", 0), "n must be at least 1, not 0"),
        (("--tasks", "kv", "--limit", 0), "limit must be at least 1, not 0"),
        (("--tasks", "kv", "--context", 641), "641 exceeds"),
        (("--tasks", "kv", "--context", -5), "context must be at least 1, not -5"),
        (("--tasks", "kv", "--batch-size", 0), "batch_size must be at least 1, not 0"),
        (("--tasks", "kv", "--context", 200), "choose a greater length"),
        (("--tasks", "kv", "--out", "/no/such/folder/x"), "/no/such/folder"),
        (("--tasks", "kv", "--out", __file__), "holds no rows of results"),
        (("--tasks", "kv", "--data", "/no/such", "--judge-text", "/no/such"), "No such file"),
    ],
    ids=[
        "task",
        "none",
        "data",
        "words",
        "file",
        "same",
        "n",
        "limit",
        "context",
        "negative",
        "batch",
        "short",
        "out",
        "code",
        "text",
    ],
)
def test_a_mistake_is_one_line(folder: Path, arguments: tuple[object, ...], what: str) -> None:
    assert_mistake(run("evaluate", folder, *arguments), what)


def test_what_does_not_fit_is_refused_before_any_task_has_run(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    options = ("--n", 1, "--judge-text", text, "--out", out)
    done = run("evaluate", folder, "--tasks", "multikey,kv", "--context", 400, *options)
    assert_mistake(done, "kv: a prompt of 400 tokens cannot hold")
    done = run("evaluate", folder, "--tasks", "multikey,positions", "--text", text, *options)
    assert_mistake(done, "windows of 640 tokens, fewer than 16; ask for fewer")
    assert not out.exists()


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    zoo.save(make_model(hf_config("llama")), tmp_path / "bare")
    for task in ("kv", "positions"):
        done = run("evaluate", tmp_path / "bare", "--tasks", task, "--text", __file__)
        assert_mistake(done, "bare does not have; put its tokenizer.json beside")


def test_a_model_named_twice_is_a_mistake(folder: Path) -> None:
    assert_mistake(run("evaluate", folder, folder, *KEYS), "is named 2 times")


def test_a_command_without_a_model_says_so() -> None:
    assert_mistake(run("evaluate", "--tasks", "kv"), "name at least one model")
    assert_mistake(run("evaluate", "smolm2", "--tasks", "kv"), "smolm2")
