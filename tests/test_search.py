"""Searches over synthetic scores whose best placements are known, and recipes they end in."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recipes
from recipes import Layers, Placement, Recipe, Search, parse_recipe, recipe_text, write_recipe
from recipes.placement import (
    SEARCHED,
    Found,
    LayerSet,
    drop_one,
    greedy,
    most_missed,
    one_by_one,
    ratio_of_drops,
    restore_one,
    top,
)

L = 12
LAYERS = tuple(range(L))


def chain(layers: LayerSet) -> float:
    """As in retrieval: layer 7 helps alone, 3 only behind 7, and 9 only behind both.

    Layers 0 and 1 help a little by themselves and little more together.
    """
    chosen = set(layers)
    return (
        4.0 * (7 in chosen)
        + 5.0 * ({3, 7} <= chosen)
        + 6.0 * ({3, 7, 9} <= chosen)
        + 0.5 * (0 in chosen)
        + 0.5 * (1 in chosen)
    )


def trap(layers: LayerSet) -> float:
    """Layer 5 is the best alone, but 2 and 8 together are better than any pair with it."""
    chosen = set(layers)
    alone = 3.0 * (5 in chosen) + 2.0 * (2 in chosen) + 1.9 * (8 in chosen)
    return alone + 4.0 * ({2, 8} <= chosen) - 2.5 * ({2, 5} <= chosen)


def best(score, size: int) -> LayerSet:
    return max(itertools.combinations(LAYERS, size), key=score)


def test_greedy_finds_the_best_sets_of_a_score_that_builds_up() -> None:
    found = greedy(one_by_one(chain), LAYERS, 3)
    assert [x.layers for x in found] == [best(chain, size) for size in (1, 2, 3)]
    assert found[-1] == Found(layers=(3, 7, 9), order=(7, 3, 9), score=15.0)


def test_layers_ranked_alone_miss_what_helps_together() -> None:
    # What makes the test above one that a wrong search fails.
    ranked = top(restore_one(one_by_one(chain), LAYERS), 3)
    assert ranked.layers == (0, 1, 7)
    assert ranked.score is None
    assert chain(ranked.layers) < chain(best(chain, 3))


def test_exchanges_leave_a_trap_that_greedy_stays_in() -> None:
    plain = greedy(one_by_one(trap), LAYERS, 2)[-1]
    assert 5 in plain.layers
    assert best(trap, 2) == (2, 8)
    assert trap(plain.layers) < trap((2, 8))
    found = greedy(one_by_one(trap), LAYERS, 2, exchanges=3)[-1]
    assert found.layers == (2, 8)
    assert found.score == trap((2, 8))


@given(st.lists(st.integers(-50, 50), min_size=L, max_size=L), st.integers(1, L))
@settings(deadline=None, max_examples=50)
def test_greedy_and_ranking_are_best_for_a_sum_over_layers(values: list[int], count: int) -> None:
    def score(layers: LayerSet) -> float:
        return float(sum(values[layer] for layer in layers))

    scores = one_by_one(score)
    most = sum(sorted(values)[L - count :])
    (*_, found) = greedy(scores, LAYERS, count, exchanges=1)
    assert found.score == score(found.layers) == most
    assert score(top(restore_one(scores, LAYERS), count).layers) == most


def test_exchanges_never_make_a_set_worse() -> None:
    for score in (chain, trap):
        plain = greedy(one_by_one(score), LAYERS, 5)
        refined = greedy(one_by_one(score), LAYERS, 5, exchanges=2)
        assert refined[0] == plain[0]
        assert [x.score for x in refined] >= [x.score for x in plain]


def test_greedy_asks_for_one_list_of_sets_a_round() -> None:
    asked: list[int] = []

    def scores(sets: Sequence[LayerSet]) -> list[float]:
        asked.append(len(sets))
        assert all(list(layers) == sorted(set(layers)) for layers in sets)
        return [chain(layers) for layers in sets]

    greedy(scores, LAYERS, 3)
    assert asked == [12, 11, 10]


def test_only_candidates_are_chosen() -> None:
    found = greedy(one_by_one(chain), [0, 3, 9, 11], 2)
    assert found[-1].layers == (0, 3)


def test_of_equal_scores_the_first_layer_wins() -> None:
    assert greedy(one_by_one(lambda layers: 0.0), LAYERS, 2)[-1].order == (0, 1)


def test_dropping_one_layer_scores_all_the_others() -> None:
    assert drop_one(one_by_one(lambda layers: sum(layers)), (1, 2, 4)) == {1: 6, 2: 5, 4: 3}


def test_the_most_missed_layer_is_the_first() -> None:
    values = {1: 2.0, 2: -1.0, 4: 5.0}
    ranking = most_missed(one_by_one(lambda layers: sum(values[x] for x in layers)), (1, 2, 4))
    assert [layer for layer, _ in ranking] == [4, 1, 2]
    assert top(ranking, 2) == Found(layers=(1, 4), order=(4, 1), score=None)


def test_the_ratio_of_drops_is_that_of_its_formula() -> None:
    recall = {0: 0.9, 1: 0.6, 2: 0.7}
    sense = {0: 0.5, 1: 0.4, 2: 0.5}
    ranking = ratio_of_drops(recall, sense, epsilon=0.1)
    assert [layer for layer, _ in ranking] == [2, 1, 0]
    assert [value for _, value in ranking] == pytest.approx([0.2 / 0.1, 0.3 / 0.2, 0.0])


def test_a_search_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"^count must be 1 to 12"):
        greedy(one_by_one(chain), LAYERS, 13)
    with pytest.raises(ValueError, match=r"^exchanges must be at least 0, not -1$"):
        greedy(one_by_one(chain), LAYERS, 1, exchanges=-1)
    with pytest.raises(ValueError, match=r"^the score of layers \[0\] is not a number$"):
        greedy(one_by_one(lambda layers: float("nan")), LAYERS, 1)


# Recipes

SEARCH = Search(
    rule="greedy_retrieval",
    order=(18, 7, 23),
    score=-0.25,
    score_none=-31.5,
    score_all=0.0,
    items=96,
    searched_on=('a "quoted" line', "back\\slash \x7f, tab\t and ü"),
    command="zoo place x --budget 3",
)
RECIPE = Recipe(
    name="mine",
    base="smollm2-135m",
    eva={"window_size": 128, "window": "block", "summary_bias": False, "summary_bias_init": 0.5},
    layers=Layers(exact=(7, 18, 23), attention="window_attention"),
    description="a test",
    search=SEARCH,
)


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        Recipe(name="mine", base="b", eva={}, layers=Layers(exact=())),
        Recipe(
            name="mine",
            base="b",
            eva={},
            layers=Layers(exact=Placement(rule="random", count=2, seed=3)),
        ),
        Recipe(
            name="mine",
            base="b",
            eva={},
            layers=Layers(exact=(1,)),
            search=Search(rule="halo", score=0.0),
        ),
    ],
    ids=["all", "least", "rule", "score of 0"],
)
def test_a_written_recipe_is_read_back(recipe: Recipe, tmp_path: Path) -> None:
    assert parse_recipe(recipe_text(recipe), name="mine") == recipe
    write_recipe(recipe, tmp_path / "mine.toml")
    assert recipes.read_recipe(tmp_path / "mine.toml") == recipe
    assert [x.name for x in tmp_path.iterdir()] == ["mine.toml"]


def test_a_failed_write_leaves_the_old_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.toml"
    write_recipe(RECIPE, path)
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no room"):
        write_recipe(Recipe(name="other", base="b", eva={}, layers=Layers(exact=())), path)
    assert path.read_text() == before
    assert [x.name for x in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("order", "odrer"), "unknown key 'odrer' in [search]; did you mean 'order'?"),
        (
            ('rule = "greedy_retrieval"', 'rule = "greedy_retreival"'),
            "search.rule must be a searched rule, not 'greedy_retreival'; did you mean "
            "'greedy_retrieval'?",
        ),
        (
            ("order = [18, 7, 23]", "order = [18, 7]"),
            "search.order [18, 7] has other layers than layers.exact; a placement that was "
            "changed by hand has no [search]",
        ),
        (("score = -0.25", "score = true"), "search.score must be a number, not True"),
        (("items = 96", "items = 9.5"), "search.items must be an integer, not 9.5"),
        (
            ("exact = [7, 18, 23]", 'placement = { rule = "greedy_kl", count = 3 }'),
            "rule 'greedy_kl' is a search over a model; run it with `zoo place` and list the "
            "layers that it finds in `exact`",
        ),
    ],
)
def test_a_mistake_in_a_search_is_named(change: tuple[str, str], message: str) -> None:
    text = recipe_text(RECIPE)
    assert change[0] in text
    with pytest.raises(ValueError, match=r"^recipe 'broken': ") as caught:
        parse_recipe(text.replace(*change), name="broken")
    assert str(caught.value) == f"recipe 'broken': {message}"


def test_rules_that_search_are_no_placements() -> None:
    for rule in SEARCHED:
        with pytest.raises(ValueError, match="zoo place"):
            Placement(rule=rule, count=1)  # type: ignore[arg-type]
