"""`zoo ablate`: points, rows and samples of a sweep, going on after a kill, table and plots."""

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest

from recipes.ablation import Ablation, JudgeTable, read_ablation
from tests.command_line import ROOT, Run, assert_mistake, run, save
from tests.test_gemma3 import fields
from tests.tiny import SHORT_WINDOW, hf_config
from tools.evaluation.outcome import Outcome
from tools.placement.ablation import Point, points
from tools.placement.judge import retrieval_score
from tools.placement.report import write_sweep_plots
from tools.placement.summary import placement_rows, summaries

pytestmark = pytest.mark.usefixtures("short_prose")
DEPTH = 3
TEXT = " ".join(f"Sentence {i} says little." for i in range(300))
RECIPE = """
model = "{model}"
rules = ["uniform", "random", "greedy_kl"]
counts = [1, 2]
seeds = [4, 5]
window_sizes = [16, 8]
chunk_sizes = [4]
[search]
contexts = [512]
n = 1
window = 64
windows = 2
[judge]
tasks = ["passkey"]
contexts = [512]
n = 1
perplexity_text = "judge.txt"
window = 64
windows = 2
"""
# none, uniform and greedy_kl with two counts, random with two counts and seeds
POINTS = 1 + 2 + 4 + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with full attention everywhere."""
    config = hf_config(
        "llama",
        num_hidden_layers=DEPTH,
        max_position_embeddings=1024,
        eva=SHORT_WINDOW.to_dict(),
    )
    return save(tmp_path_factory.mktemp("models") / "full", config)


def write(path: Path, folder: Path, *changes: tuple[str, str]) -> Path:
    text = RECIPE.format(model=folder)
    for change in changes:
        assert change[0] in text
        text = text.replace(*change)
    path.write_text(text, encoding="utf-8")
    (path.parent / "judge.txt").write_text(TEXT, encoding="utf-8")
    return path


def ablate(*arguments: object) -> Run:
    done = run("ablate", *arguments)
    assert done.code == 0, done.err
    return done


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(path: Path) -> list[tuple[object, ...]]:
    """What rows measure: not when and by which command."""
    return sorted(
        (json.dumps(x["case"], sort_keys=True), x["metric"], x["value"]) for x in rows_of(path)
    )


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that has run; its recipe."""
    recipe = write(tmp_path_factory.mktemp("sweep") / "sweep.toml", folder)
    ablate(recipe)
    return recipe


def test_every_point_is_judged_once(done: Path) -> None:
    rows = rows_of(done.with_suffix(".results.jsonl"))
    assert {x["bench"] for x in rows} == {"placement"}
    last = [x["case"] for x in rows if x["metric"] == "cache_bytes"]
    assert len(last) == 1 + 2 * POINTS  # full attention once, the others for each window
    seen = [
        (x["rule"], x["count"], x.get("seed"), x.get("eva", {}).get("window_size")) for x in last
    ]
    assert len(set(seen)) == len(seen)
    assert ("all", DEPTH, None, None) in seen
    assert {x[2] for x in seen if x[0] == "random"} == {4, 5}
    for case in last:
        exact = case["layers"].get("full_attention", "")
        assert sum(1 for part in exact.replace("-", ",").split(",") if part) >= min(
            case["count"], 2
        )
    metrics = {x["metric"] for x in rows}
    assert metrics == {
        *("accuracy", "retrieval", "perplexity", "perplexity_second_half"),
        *("cache_bytes", "importance"),
    }


def test_a_rule_that_finds_no_layers_costs_the_others_nothing(
    folder: Path, tmp_path: Path
) -> None:
    # What is far does not help these random weights.
    recipe = write(
        tmp_path / "sweep.toml",
        folder,
        ("window_sizes = [16, 8]", "window_sizes = [16]"),
        ('"uniform", "random", "greedy_kl"', '"greedy_both", "uniform"'),
    )
    done = run("ablate", recipe)
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith("error: 3 things of this sweep could not be measured, all others are")
    assert "greedy_both 1 at 16/4: exact layers do not help" in last
    assert "uniform" in done.out
    found = [x["case"] for x in rows_of(recipe.with_suffix(".results.jsonl"))]
    judged = {(x["rule"], x["count"]) for x in found if "rule" in x}
    assert judged == {("all", DEPTH), ("none", 0), ("uniform", 1), ("uniform", 2)}


def test_decoding_is_timed_once_for_as_many_exact_layers(folder: Path, tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "speed.toml",
        folder,
        ("window_sizes = [16, 8]", "window_sizes = [16]"),
        ('"uniform", "random", "greedy_kl"', '"first", "last"'),
    )
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text + "[judge.speed]\nbatch_size = 1\nprompt = 16\nnew = 4\n")
    ablate(recipe)
    rows = rows_of(recipe.with_suffix(".results.jsonl"))
    timed = [x for x in rows if x["metric"] == "decode_tokens_per_second"]
    once = {json.dumps(x["case"]["layers"]): x["value"] for x in timed if "rule" not in x["case"]}
    assert all(x["case"]["impl"] == x["impl"] for x in timed if "rule" not in x["case"])
    mixes = [{"eva_attention": DEPTH - n, "full_attention": n} for n in range(DEPTH + 1)]
    assert set(once) == {json.dumps({k: n for k, n in mix.items() if n}) for mix in mixes}
    by_count = {x["case"]["count"]: x["value"] for x in timed if "rule" in x["case"]}
    assert sorted(by_count.values()) == sorted(once.values())
    assert len(timed) == len(once) + 2 + 2 * 2  # none, all; two rules with two counts


def test_rows_are_what_zoo_evaluate_gives_for_the_same_layers(
    done: Path, folder: Path, tmp_path: Path
) -> None:
    rows = rows_of(done.with_suffix(".results.jsonl"))
    (row,) = (
        x
        for x in rows
        if x["metric"] == "accuracy"
        and (x["case"]["rule"], x["case"]["count"]) == ("uniform", 1)
        and x["case"]["eva"]["window_size"] == 16
        and set(x["case"]["cell"]) == {"context"}
    )
    out = tmp_path / "out.jsonl"
    options = ("--layers", "1", "--window-size", 16, "--chunk-size", 4, "--sink-size", 4)
    asked = ("--tasks", "passkey", "--context", 512, "--n", 1, "--seed", 1, "--out", out)
    finished = run("evaluate", folder, *options, *asked)
    assert finished.code == 0, finished.err
    (same,) = (
        x
        for x in rows_of(out)
        if x["metric"] == "accuracy" and set(x["case"]["cell"]) == {"context"}
    )
    assert row["case"]["layers"] == same["case"]["layers"]
    assert row["case"]["eva"] == same["case"]["eva"]
    assert (row["value"], row["case"]["n"]) == (same["value"], same["case"]["n"])
    perplexity = [
        x["value"]
        for x in rows
        if x["metric"] == "perplexity" and x["case"]["layers"] == row["case"]["layers"]
    ]
    text = done.parent / "judge.txt"
    own = ("--text", text, "--window", 64, "--windows", 2, "--json")
    found = json.loads(run("perplexity", folder, *options, *own).out)
    assert any(x == pytest.approx(found["perplexity"], rel=1e-6) for x in perplexity)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_rows(done: Path, folder: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "sweep.toml", folder)
    whole = done.with_suffix(".results.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    out = tmp_path / "sweep.results.jsonl"
    out.write_bytes(b"".join(lines[:30]) + lines[30][:50])
    ablate(recipe)
    kept = tmp_path / "kept.jsonl"
    kept.write_bytes(b"".join(x for x in out.read_bytes().splitlines(True) if x.endswith(b"}\n")))
    assert numbers(kept) == numbers(done.with_suffix(".results.jsonl"))
    before = out.read_bytes()
    ablate(recipe)  # and once more there is nothing to do
    assert out.read_bytes() == before


def test_answers_can_be_scored_under_teacher_forcing(folder: Path, tmp_path: Path) -> None:
    forced = ("tasks =", "teacher_forcing = true\ntasks =")
    few = ('"uniform", "random", "greedy_kl"', '"uniform"')
    recipe = write(tmp_path / "sweep.toml", folder, forced, few)
    ablate(recipe)
    rows = rows_of(tmp_path / "sweep.results.jsonl")
    own = [x["case"] for x in rows if x["metric"] != "importance"]
    assert len([x for x in rows if x["metric"] == "cache_bytes"]) == 1 + 2 * 3
    assert all(case["teacher_forcing"] for case in own)
    samples = [rows_of(path) for path in (tmp_path / "sweep.work" / "samples").iterdir()]
    assert len(samples) == 1 + 2 * 3
    assert all(len(x) == 6 and {y["metric"] for y in x} == {"accuracy"} for x in samples)


def test_the_table_and_the_plots_are_made_of_the_rows(done: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown = ablate(done, "--report-only", "--plot", tmp_path / "plots").out
    assert sum(line.startswith("*") for line in shown.splitlines()) >= 1
    assert "random 4" in shown
    names = {x.name for x in (tmp_path / "plots").iterdir()}
    assert names == {
        f"{name}.{end}"
        for name in ("retrieval", "importance", "windows")
        for end in ("png", "jsonl")
    }
    bars = rows_of(tmp_path / "plots" / "importance.jsonl")
    assert [(x["objective"], x["layer"]) for x in bars] == [("kl", i) for i in range(DEPTH)]
    packed = tmp_path / "rows.jsonl.xz"
    packed.write_bytes(lzma.compress(done.with_suffix(".results.jsonl").read_bytes()))
    for out in ((), ("--out", packed)):
        kinds = ablate(done, "--report-only", "--json", *out).out.splitlines()
        assert len(kinds) == 1 + 2 * POINTS
    assert_mistake(run("ablate", done, "--out", packed), "holds no rows of results to add to")


def made(rule: str, count: int, **metrics: float) -> list[dict[str, Any]]:
    """Rows of a placement."""
    case = {"model": "m", "rule": rule, "count": count, "layers": {"full_attention": "0"}}
    return [
        {"bench": "placement", "case": case, "metric": metric, "value": value, "spread": 0.1,
         "device": "d"}
        for metric, value in metrics.items()
    ]  # fmt: skip


def test_a_picture_over_sizes_leaves_out_what_has_none(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = []
    for window in (16, 32):
        for count in (1, 3):  # all 3 are exact: nothing has a window
            for row in made("first", count, retrieval=0.5, perplexity=9.0):
                eva = {"eva": {"window_size": window, "chunk_size": 4}} if count < 3 else {}
                rows.append(row | {"case": row["case"] | eva})
    names = {path.name for path in write_sweep_plots(tmp_path, rows)}
    assert names == {"retrieval.png", "windows.png"}
    assert [x["count"] for x in rows_of(tmp_path / "windows.jsonl")] == [1, 1]
    assert {x["count"] for x in rows_of(tmp_path / "retrieval.jsonl")} == {1, 3}


def test_what_nothing_beats_is_marked() -> None:
    found = summaries(
        [
            *made("all", 9, perplexity=10.0, retrieval=1.0, cache_bytes=900),
            *made("a", 2, perplexity=12.0, retrieval=0.8, cache_bytes=200),
            *made("b", 2, perplexity=12.5, retrieval=0.7, cache_bytes=200),
            *made("none", 0, perplexity=15.0, retrieval=0.0, cache_bytes=50),
            *made("c", 3, perplexity=12.0, retrieval=0.8, cache_bytes=300),
        ]
    )
    assert [x.best for x in found] == [True, True, False, True, False]
    assert found[0].retrieval is not None
    assert found[0].retrieval.half == pytest.approx(0.196)


def test_of_two_alike_the_faster_one_is_marked() -> None:
    same = {"perplexity": 12.0, "retrieval": 0.8, "cache_bytes": 200}
    slow = made("slow", 2, decode_tokens_per_second=90.0, **same)
    fast = made("fast", 2, decode_tokens_per_second=100.0, **same)
    assert [x.best for x in summaries([*slow, *fast])] == [False, True]


def test_what_full_attention_does_not_find_does_not_count() -> None:
    def cells(rule: str, **accuracies: float) -> list[dict[str, Any]]:
        return [
            {"bench": "placement", "metric": "accuracy", "value": value, "spread": None,
             "device": "d",
             "case": {"model": "m", "rule": rule, "count": 1, "layers": {}, "task": "needle",
                      "fillers": ["f"], "cell": {"context": 512, "wording": wording}}}
            for wording, value in accuracies.items()
        ]  # fmt: skip

    found = summaries([*cells("all", x=1.0, y=0.96, z=0.5), *cells("a", x=0.5, y=0.96, z=0.5)])
    assert found[1].cells == 2
    assert found[1].of_full == pytest.approx(0.75)


def test_retrieval_counts_items_of_recall_tasks_alike() -> None:
    def outcome(task: str, item: str, metric: str, value: float) -> Outcome:
        return Outcome(task=task, item=item, metric=metric, value=value)

    found = retrieval_score(
        [
            *(outcome("needle", f"{i}", "accuracy", float(i < 3)) for i in range(8)),
            *(outcome("passkey", f"{i}", "accuracy", 1.0) for i in range(2)),
            outcome("needle", "0", "log_likelihood", -9.0),
            outcome("hellaswag", "0", "acc", 0.0),
        ]
    )
    assert found is not None
    assert (found.value, found.n) == (0.5, 10)
    assert found.error == pytest.approx(math.sqrt(0.25 / 9))
    assert retrieval_score([outcome("piqa", "0", "acc", 1.0)]) is None


def test_rules_that_draw_have_a_point_for_each_seed() -> None:
    ablation = Ablation(
        model="m", rules=("first", "random"), counts=(4, 2), judge=JudgeTable(tasks=("kv",))
    )
    assert list(points(ablation)) == [
        Point("none", 0),
        Point("first", 2),
        Point("first", 4),
        *(Point("random", count, seed) for seed in (0, 1, 2) for count in (2, 4)),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("counts", "cuonts"), "unknown key 'cuonts'; did you mean 'counts'?"),
        (('"uniform"', '"unifrom"'), "there is no rule 'unifrom'; did you mean 'uniform'?"),
        (("counts = [1, 2]", "counts = [1, 4]"), "a count of 4 exceeds the 3 layers of"),
        (("counts = [1, 2]", "counts = []"), "counts must not be empty"),
        (("counts = [1, 2]", "counts = [1, true]"), "counts must be an array of integers"),
        (("chunk_sizes = [4]", "chunk_sizes = [5]"), "no chunk size divides a window size"),
        (("[search]", "[eva]\nchunk_size = 4\n[search]"), "write chunk_sizes = [4]"),
        (("[search]", "[eva]\nsink_siez = 4\n[search]"), "did you mean 'sink_size'?"),
        (('"passkey"', '"pass"'), "there is no task 'pass'"),
        (("judge.txt", "no.txt"), "there is no file"),
        (("tasks =", "speed = { now = 1 }\ntasks ="), "unknown key 'now' in [judge.speed]"),
        (("[search]", '[search]\ntexts = ["judge.txt"]'), "searched with and judged with"),
        (("[search]", '[search]\ntext = "judge.txt"'), "searched with and judged with"),
        (("[search]", "[search]\nseeds = []"), "search.seeds must not be empty"),
        (("contexts = [512]\nn = 1\nwindow", "contexts = []\nn = 1\nwindow"), "search.contexts"),
        (("chunk_sizes = [4]", "chunk_sizes = [0]"), "must be at least 1, not 0"),
        # At the last size, and before anything is measured.
        (("window_sizes = [16, 8]", "window_sizes = [16, 64]"), "search.window of 128 would"),
        (("tasks =", "limit = 0\ntasks ="), "judge.limit must be at least 1, not 0"),
        (("tasks =", "speed = { new = 2 }\ntasks ="), "judge.speed.new must be at least 4, not 2"),
        (
            ("tasks =", "speed = { prompt = 1000 }\ntasks ="),
            "at most 1024 together, not 1000 + 64",
        ),
    ],
    ids=lambda x: x[1] if isinstance(x, tuple) else "",
)
def test_a_mistake_is_one_line(
    folder: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    recipe = write(tmp_path / "sweep.toml", folder, change)
    assert_mistake(run("ablate", recipe), message)
    assert not (tmp_path / "sweep.results.jsonl").exists()


@pytest.mark.slow
def test_other_settings_of_the_judge_are_measured_anew(folder: Path, tmp_path: Path) -> None:
    fewer = ("window_sizes = [16, 8]", "window_sizes = [16]")
    short = ('["uniform", "random", "greedy_kl"]', '["uniform"]')
    recipe = write(tmp_path / "sweep.toml", folder, fewer, short)
    ablate(recipe)
    out = recipe.with_suffix(".results.jsonl")
    first = rows_of(out)
    ablate(recipe)
    assert rows_of(out) == first
    write(
        recipe,
        folder,
        fewer,
        short,
        ('"passkey"]\ncontexts = [512]', '"passkey"]\ncontexts = [640]'),
    )
    ablate(recipe)
    new = rows_of(out)[len(first) :]
    pooled = [
        [x["case"]["n"] for x in rows if x["metric"] == "retrieval"] for rows in (first, new)
    ]
    assert pooled[0] == pooled[1]  # not together with the others
    assert len(pooled[0]) == 4
    assert len(summaries(placement_rows(out, str(folder)))) == 8
    (tmp_path / "judge.txt").write_text(TEXT.upper(), encoding="utf-8")
    ablate(recipe)
    added = rows_of(out)[len(first) + len(new) :]
    assert [x["metric"] for x in added].count("perplexity") == 4


def test_paths_are_relative_to_the_recipe(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    recipe = write(tmp_path / "deep" / "sweep.toml", folder)
    assert read_ablation(recipe).judge.perplexity_text == tmp_path / "deep" / "judge.txt"


def test_a_cut_row_is_left_out_of_a_report(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps(x) for x in made("a", 1, perplexity=1.0)]
    half = rows[0].replace('"count": 1, ', "")
    path.write_text("\n".join((rows[0][:20], half, "", rows[0])) + "\n")
    assert len(placement_rows(path, "m")) == 1


def test_a_report_says_which_model_a_file_says_nothing_about(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(made("a", 1, perplexity=1.0)[0]))
    with pytest.raises(ValueError, match=r"rows.jsonl has no row of a placement of n;"):
        placement_rows(path, "n")


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "ablations").glob("*.toml")))
def test_published_sweeps_can_be_read(path: Path) -> None:
    sweep = read_ablation(path)
    assert {point.rule for point in points(sweep)} == {"none", *sweep.rules}


@pytest.mark.slow
def test_layers_that_slide_as_published_are_not_placed(tmp_path: Path) -> None:
    """Gemma 3 with 6 layers, of which 2 and 5 do not slide."""
    config = fields(
        vocab_size=512,
        num_hidden_layers=6,
        sliding_window_pattern=3,
        max_position_embeddings=1024,
        eva=SHORT_WINDOW.to_dict(),
    )
    recipe = write(
        tmp_path / "sweep.toml",
        save(tmp_path / "gemma", config),
        ('"greedy_kl"', '"greedy_perplexity", "gates_retrieval", "drop_retrieval"'),
        ("counts = [1, 2]", "counts = [1]"),
        ("window_sizes = [16, 8]", "window_sizes = [16]"),
        ("[judge]\n", "steps = 3\n[judge]\nteacher_forcing = true\n"),
    )
    ablate(recipe)
    cases = [
        row["case"]
        for row in rows_of(recipe.with_suffix(".results.jsonl"))
        if row["metric"] == "cache_bytes"
    ]
    found = {(case["rule"], case["count"]): case["layers"].get("full_attention") for case in cases}
    assert found.pop(("none", 0)) is None
    assert found.pop(("all", 2)) == "2,5"
    rules = ("uniform", "random", "greedy_perplexity", "gates_retrieval", "drop_retrieval")
    assert set(found) == {(rule, 1) for rule in rules}
    assert set(found.values()) <= {"2", "5"}
    assert {case["layers"]["sliding_attention"] for case in cases} == {"0-1,3-4"}
