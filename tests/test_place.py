"""`zoo place`: the recipe that it writes, what it records, and that a killed search goes on."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import zoo
from flasheva import EvaConfig
from flasheva.visibility import Positions, visible
from recipes import read_recipe
from recipes.placement import SEARCHED
from tests.command_line import Run, assert_mistake, run, save
from tests.harness_inputs import write_data
from tests.tiny import SHORT_WINDOW, hf_config
from tools.evaluation.recall.fillers import Filler
from tools.placement.settings import SearchSettings, check_length

pytestmark = pytest.mark.usefixtures("short_prose")
CONTEXT = 512
DEPTH = 4
TEXT = ("--window", 64, "--windows", 2)
SMALL = ("--context", CONTEXT, "--n", 1, *TEXT, "--batch-size", 4, "--window-size", 16)


def save_full(path: Path, *, seed: int, context: int = 2048) -> Path:
    """A model with full attention everywhere."""
    config = hf_config(
        "llama",
        num_hidden_layers=DEPTH,
        max_position_embeddings=context,
        eva=SHORT_WINDOW.to_dict(),
    )
    return save(path, config, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With random weights that profit, by chance, from what is far, in every objective."""
    return save_full(tmp_path_factory.mktemp("models") / "full", seed=1)


def place(*arguments: object) -> Run:
    done = run("place", *arguments)
    assert done.code == 0, done.err
    return done


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_searched_recipe_is_one_that_loads(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    shown = place(folder, "--budget", 2, "--out", out, *SMALL).out
    recipe = read_recipe(out)
    assert recipe.search is not None
    assert recipe.search.rule == "greedy_retrieval"
    assert recipe.search.command.startswith("zoo place ")
    assert recipe.search.items == 4 * 2  # wordings, and of fillers one that repeats and one prose
    assert any("magic, passkey, locker, ticket" in line for line in recipe.search.searched_on)
    exact = recipe.layers.exact
    assert isinstance(exact, tuple)
    assert len(exact) == 2
    model = zoo.load(out)
    full = tuple(i for i, x in enumerate(model.config.layer_types) if x == "full_attention")
    assert full == exact
    assert model.config.eva.window_size == 16
    assert f"exact layers {exact[0]}, {exact[1]}" in shown
    # Every set of a greedy search of two rounds, and none and all for comparison.
    scored = lines_of(tmp_path / "mine.candidates.jsonl")
    sets = [tuple(x["layers"]) for x in scored]
    assert len(sets) == len(set(sets)) == DEPTH + (DEPTH - 1) + 2
    best = max((x for x in scored if len(x["layers"]) == 2), key=lambda x: x["score"])
    assert (tuple(best["layers"]), best["score"]) == (exact, recipe.search.score)
    assert {x["n"] for x in scored} == {8}
    assert all(set(cell) == {"score", "accuracy"} for cell in best["cells"].values())


def test_a_killed_search_goes_on_to_the_same_end(folder: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "mine.toml", tmp_path / "kept.jsonl"
    arguments = (folder, "--budget", 2, "--out", out, "--candidates", kept, *SMALL)
    place(*arguments)
    recipe, whole = out.read_text(), kept.read_bytes()
    out.unlink()
    lines = whole.splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # a kill cuts anywhere
    place(*arguments)
    assert out.read_text() == recipe
    after = kept.read_bytes()
    assert after.startswith(b"".join(lines[:5]))
    again = [line for line in after.splitlines() if line.endswith(b"}")]
    assert again == whole.splitlines()
    place(*arguments)  # and once more there is nothing to do
    assert kept.read_bytes() == after


def test_scores_of_other_settings_are_not_taken_for_ones_own(folder: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "mine.toml", tmp_path / "kept.jsonl"
    arguments = (folder, "--budget", 1, "--out", out, "--candidates", kept, *SMALL)
    place(*arguments)
    before = len(lines_of(kept))
    place(*arguments, "--seed", 1)
    assert len(lines_of(kept)) == 2 * before
    assert len({x["case"] for x in lines_of(kept)}) == 2


@pytest.mark.parametrize("rule", [rule for rule in SEARCHED if rule != "halo"])
def test_every_rule_gives_a_recipe(folder: Path, tmp_path: Path, rule: str) -> None:
    out = tmp_path / "mine.toml"
    arguments = (folder, "--budget", 2, "--rule", rule, "--out", out, *SMALL)
    found = json.loads(place(*arguments, "--steps", 2, "--json").out)
    recipe = read_recipe(out)
    assert recipe.search is not None
    assert recipe.search.rule == rule
    assert recipe.layers.exact == tuple(found["layers"]) == tuple(sorted(found["order"]))
    assert (recipe.search.score_none, recipe.search.score_all) == (
        found["score_none"],
        found["score_all"],
    )
    if rule.endswith("kl"):
        assert found["score_all"] == pytest.approx(0, abs=1e-6)


def test_both_is_the_mean_part_of_two_gaps_that_is_closed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    arguments = (folder, "--budget", 1, "--rule", "greedy_both", "--out", out, *SMALL)
    found = json.loads(place(*arguments, "--json").out)
    assert (found["score_none"], found["score_all"]) == (0, pytest.approx(1))
    scored = lines_of(tmp_path / "mine.candidates.jsonl")
    scores = {(x["objective"], tuple(x["layers"])): x["score"] for x in scored}
    every = tuple(range(DEPTH))
    for layers in [x for objective, x in scores if objective == "both"]:
        parts = [
            (scores[name, layers] - scores[name, ()]) / (scores[name, every] - scores[name, ()])
            for name in ("retrieval", "perplexity")
        ]
        assert scores["both", layers] == pytest.approx(sum(parts) / 2)


@pytest.mark.slow  # loads lm-evaluation-harness
def test_halo_reads_common_sense_too(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data")
    out = tmp_path / "mine.toml"
    options = ("--rule", "halo", "--n", 1, "--context", 1536, *TEXT)
    arguments = (folder, "--budget", 1, "--out", out, *options)
    place(*arguments, "--data", data, "--limit", 2, "--far", 8)
    recipe = read_recipe(out)
    assert recipe.search is not None
    assert any("hellaswag" in line for line in recipe.search.searched_on)
    scored = lines_of(tmp_path / "mine.candidates.jsonl")
    assert {x["objective"] for x in scored} == {"recall", "commonsense"}
    assert all(len(x["layers"]) == DEPTH - 1 for x in scored if x["objective"] == "commonsense")
    assert_mistake(run("place", *arguments), "name their folder with --data")


def test_a_killed_training_of_gates_goes_on_to_the_same_end(folder: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "mine.toml", tmp_path / "kept.jsonl"
    options = ("--rule", "gates_kl", "--steps", 4, *SMALL)
    arguments = (folder, "--budget", 1, "--out", out, "--candidates", kept, *options)
    place(*arguments)
    whole = kept.read_bytes()
    kept.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    place(*arguments)
    assert kept.read_bytes() == whole


@pytest.mark.slow
def test_sharing_work_changes_no_placement(folder: Path, tmp_path: Path) -> None:
    found = [
        json.loads(
            place(folder, "--budget", 2, "--out", tmp_path / f"{x}.toml", x, "--json", *SMALL).out
        )
        for x in ("--share", "--no-share")
    ]
    assert found[0]["layers"] == found[1]["layers"]
    assert found[0]["score"] == pytest.approx(found[1]["score"], rel=1e-5)
    assert found[0]["blocks"] < found[0]["blocks_alone"]


def test_the_rules_for_retrieval_read_the_tasks_that_are_named(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine.toml"
    place(folder, "--budget", 1, "--task", "facts", "--out", out, *SMALL)
    search = read_recipe(out).search
    assert search is not None
    assert search.items == 1  # of the one prose; facts are in no repeated sentences
    assert "tasks: facts, search half, seed 0" in search.searched_on
    done = run("place", folder, "--budget", 1, "--task", "mqar", "--out", out, *SMALL)
    assert_mistake(done, "a search reads passkey, needle, facts for retrieval, not 'mqar'")


def test_a_plain_rule_is_written_as_a_rule(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    place(folder, "--budget", 2, "--rule", "random", "--seed", 3, "--out", out)
    assert 'placement = { rule = "random", count = 2, seed = 3 }' in out.read_text()
    assert sum(x == "full_attention" for x in zoo.load(out).config.layer_types) == 2


def test_a_recipe_can_be_searched_anew(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    windows = ("--attention", "window_attention", "--window-size", 32)
    place(folder, "--budget", 1, "--rule", "uniform", "--out", first, *windows)
    place(first, "--budget", 1, "--rule", "last", "--out", second)
    recipe = read_recipe(second)
    assert Path(recipe.base) == folder
    assert (recipe.layers.attention, recipe.eva["window_size"]) == ("window_attention", 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rule", "greedy_retreival"), "there is no rule 'greedy_retreival'; choose from"),
        (("--budget", 9), "the budget must be 1 to 4, the layers there are, not 9"),
        (("--budget", 0), "the budget must be 1 to 4, the layers there are, not 0"),
        (("--layers", "1"), "--layers names the exact layers"),
        (("--out", "mine.json"), "a recipe is a .toml file, not mine.json"),
        (("--out", "no/mine.toml"), "there is no folder no"),
        (("--context", 4096), "a context of 4096 exceeds that of"),
        (("--windows", 0), "windows must be at least 1, not 0"),
        (("--window-size", CONTEXT), f"fit into the window of {CONTEXT}: every placement is"),
        (("--rule", "restore_kl", "--window", 16), "--window 32 would tell them apart"),
        # 16 of the window, 15 more until a chunk is complete, 16 sinks, and the last target.
        (("--rule", "restore_kl", "--window", 48), "fit into the window of 16 and the sinks"),
        (("--rule", "uniform", "--budget", 5), "cannot place 5 exact layers"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_a_mistake_is_one_line(
    folder: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    given = ("--budget", 1, "--out", tmp_path / "mine.toml", *SMALL, *arguments)
    assert_mistake(run("place", folder, *given), message)
    assert list(tmp_path.iterdir()) == []  # no empty file of candidates either


@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("sinks", [0, 4, 8])
def test_a_text_is_refused_where_all_of_it_is_seen_exactly(
    window: Literal["sliding", "block"], sinks: int
) -> None:
    eva = EvaConfig(window_size=16, chunk_size=4, window=window, sink_size=sinks)
    for tokens in range(2, 48):
        queries = tokens - 1  # the last token is only a target
        seen = visible(eva, Positions(), queries, queries, 0, torch.device("cpu"))[0]
        if seen.equal(torch.ones(queries, queries).tril().bool()):
            with pytest.raises(ValueError, match="every placement is the same model there"):
                check_length(eva, "kl", [512], tokens)
        else:
            check_length(eva, "kl", [512], tokens)


def test_by_default_a_search_reads_no_more_than_the_model(tmp_path: Path) -> None:
    folder = save_full(tmp_path / "full", seed=1, context=640)
    options = ("--budget", 1, "--n", 1, "--window-size", 320, "--out", tmp_path / "mine.toml")
    place(folder, *options, "--rule", "restore_retrieval")
    place(folder, *options, "--rule", "restore_kl", "--windows", 1)
    search = read_recipe(tmp_path / "mine.toml").search
    assert search is not None
    assert search.searched_on[-1].endswith("1 windows of 640 tokens")
    first = lines_of(tmp_path / "mine.candidates.jsonl")[0]
    assert {cell.split(", ")[1] for cell in first["cells"]} == {"context 640"}


def test_a_context_among_others_that_is_seen_exactly_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_length(EvaConfig(window_size=1024), "retrieval", [1024, 2048], 64)
    assert caplog.messages == ["--context 1024 fits into the window and tells no placement apart"]


def test_there_is_no_part_of_a_gap_that_is_none(tmp_path: Path) -> None:
    folder = save_full(tmp_path / "full", seed=2)
    options = ("--rule", "greedy_both", "--budget", 1, "--out", tmp_path / "mine.toml", *SMALL)
    assert_mistake(run("place", folder, *options), "exact layers do not help perplexity: -7")


def test_a_file_of_something_else_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "notes.jsonl"
    kept.write_text('{"a": 1}\n')
    given = ("--budget", 1, "--out", tmp_path / "mine.toml", "--candidates", kept, *SMALL)
    assert_mistake(run("place", folder, *given), "line 1: not a candidate of zoo place")
    assert kept.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": ("facts",)},
        {"contexts": (512,)},
        {"n": 3},
        {"seed": 5},
        {"text": Filler(name="other", text="A text.")},
        {"texts": (Filler(name="other", text="A text."),)},
        {"window": 64},
        {"windows": 3},
        {"limit": 7},
        {"far": 7},
        {"data": Path(__file__).parent},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_search_reads_tells_its_scores_apart(change: dict[str, Any]) -> None:
    assert SearchSettings(**change).case() != SearchSettings().case()
