"""Recipes: the shipped files, every mistake that a recipe may hold, and the placement rules."""

import copy
import pickle
import re
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recipes
from flasheva import EvaConfig
from recipes import (
    Layers,
    Placement,
    Recipe,
    default_placement,
    exact_layers,
    find_recipe,
    parse_layers,
    parse_recipe,
    read_recipe,
)
from recipes.placement import Rule

HYBRID = "smollm2-135m-instruct-eva-hybrid"
GOOD = """
base = "smollm2-135m"
description = "a test"
[eva]
window_size = 128
window = "block"
summary_bias = false
summary_bias_init = 0.25
[layers]
exact = [7, 3]
attention = "window_attention"
"""


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, int]:
    """A rule and a depth that it fits."""
    num_layers = draw(st.integers(1, 80))
    rule: Rule = draw(st.sampled_from(["uniform", "first", "last", "random"]))
    seed = draw(st.integers(0, 2**40)) if rule == "random" else None
    return Placement(rule=rule, count=draw(st.integers(1, num_layers)), seed=seed), num_layers


def error_of(text: str) -> str:
    """The one line that a broken recipe gives, without the recipe's name."""
    with pytest.raises(ValueError, match="recipe 'broken': ") as caught:
        parse_recipe(text, name="broken")
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("recipe 'broken': ")


# The schema


def test_every_field_is_read() -> None:
    recipe = parse_recipe(GOOD, name="x")
    assert recipe == Recipe(
        name="x",
        base="smollm2-135m",
        description="a test",
        eva={
            "window_size": 128,
            "window": "block",
            "summary_bias": False,
            "summary_bias_init": 0.25,
        },
        layers=Layers(exact=(7, 3), attention="window_attention"),
    )


def test_optional_fields_have_defaults() -> None:
    recipe = parse_recipe('base = "b"\n[layers]\nexact = []', name="x")
    assert (recipe.description, dict(recipe.eva)) == ("", {})
    assert recipe.layers == Layers(exact=(), attention="eva_attention")


def test_a_placement_rule_is_read() -> None:
    text = 'base = "b"\nlayers = {{ placement = {} }}'
    for table, placement in [
        ('{ rule = "uniform", count = 5 }', Placement(rule="uniform", count=5)),
        ('{ rule = "random", count = 2, seed = 0 }', Placement(rule="random", count=2, seed=0)),
    ]:
        assert parse_recipe(text.format(table), name="x").layers.exact == placement


def test_layer_types_follow_the_exact_layers() -> None:
    recipe = parse_recipe('base = "b"\n[layers]\nexact = [2, 0]', name="x")
    full, eva = "full_attention", "eva_attention"
    assert recipe.layer_types(4) == (full, eva, full, eva)
    windows = parse_recipe(GOOD, name="x").layer_types(8)
    assert windows == tuple(full if i in (3, 7) else "window_attention" for i in range(8))
    with pytest.raises(ValueError, match=r"^recipe 'x': no layer 7 in .*valid are 0 to 6$"):
        parse_recipe(GOOD, name="x").layer_types(7)


def test_a_recipe_cannot_be_changed_but_copied_and_pickled() -> None:
    recipe = parse_recipe(GOOD, name="x")
    with pytest.raises(TypeError):
        recipe.eva["window_size"] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        recipe.base = "y"  # type: ignore[misc]
    assert copy.deepcopy(recipe) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # unknown and missing keys
        (("base", "bse"), "unknown key 'bse'; did you mean 'base'?"),
        (("[eva]", "[evaa]"), "unknown key 'evaa'; did you mean 'eva'?"),
        (("exact", "exat"), "unknown key 'exat' in [layers]; did you mean 'exact'?"),
        (
            ("exact = [7, 3]", 'placement = { rul = "first", count = 1 }'),
            "unknown key 'rul' in [layers.placement]; did you mean 'rule'?",
        ),
        (
            ("description", "zzz"),
            "unknown key 'zzz'; known: base, description, eva, layers, search, stages",
        ),
        (('base = "smollm2-135m"', ""), "missing key 'base', the name of a model"),
        ((GOOD[GOOD.index("[layers]") :], ""), "missing key 'layers', a table"),
        (
            ("exact = [7, 3]", 'placement = { rule = "first" }'),
            "missing key 'layers.placement.count', an integer",
        ),
        # both or neither
        (
            ("exact = [7, 3]", ""),
            "[layers] has neither of 'exact' and 'placement'; "
            "give one of them, such as exact = [7, 18, 23]",
        ),
        (
            ("exact = [7, 3]", 'exact = [7]\nplacement = { rule = "first", count = 1 }'),
            "[layers] has both of 'exact' and 'placement'; "
            "give one of them, such as exact = [7, 18, 23]",
        ),
        # wrong types
        (('"smollm2-135m"', "3"), "base must be the name of a model, not 3"),
        (('"a test"', "false"), "description must be a string, not False"),
        (("[7, 3]", "7"), "layers.exact must be an array of integers, not 7"),
        (("[7, 3]", "[7, true]"), "a layer must be an integer of at least 0, not True"),
        (("[7, 3]", "[7.0]"), "a layer must be an integer of at least 0, not 7.0"),
        (("[7, 3]", "[[7]]"), "a layer must be an integer of at least 0, not [7]"),
        (
            ("window_size = 128", "window_size = [128]"),
            "eva.window_size must be a number, a string or a boolean, not [128]",
        ),
        (
            ("window_size = 128", "window_size = 2026-11-24"),
            "eva.window_size must be a number, a string or a boolean, "
            "not datetime.date(2026, 11, 24)",
        ),
        (
            ("exact = [7, 3]", 'placement = { rule = "first", count = true }'),
            "layers.placement.count must be an integer, not True",
        ),
        (
            ("exact = [7, 3]", 'placement = "first"'),
            "layers.placement must be a table, not 'first'",
        ),
        # wrong values
        (("[7, 3]", "[7, 3, 7]"), "layer 7 is listed twice"),
        (("[7, 3]", "[7, -3]"), "a layer must be an integer of at least 0, not -3"),
        (
            ('"window_attention"', '"full_attention"'),
            "attention must be one of 'eva_attention', 'window_attention', not 'full_attention'",
        ),
        (
            ("exact = [7, 3]", 'placement = { rule = "middle", count = 1 }'),
            "rule must be one of 'uniform', 'first', 'last', 'random', not 'middle'",
        ),
        (
            ("exact = [7, 3]", 'placement = { rule = "first", count = 0 }'),
            "count must be an integer of at least 1, not 0",
        ),
        (
            ("exact = [7, 3]", 'placement = { rule = "first", count = 1, seed = 1 }'),
            "seed is for rule 'random' only; remove it for 'first'",
        ),
        (
            ("exact = [7, 3]", 'placement = { rule = "random", count = 1 }'),
            "rule 'random' needs a seed, an integer of at least 0, not None",
        ),
        (
            ("exact = [7, 3]", 'placement = { rule = "random", count = 1, seed = -1 }'),
            "rule 'random' needs a seed, an integer of at least 0, not -1",
        ),
    ],
)
def test_a_mistake_gives_one_line_that_says_where(change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    assert error_of(GOOD.replace(*change)) == message


@pytest.mark.parametrize(
    "text",
    ["base = ", "base", "[layers\n", 'base = "a"\nbase = "b"', "[layers]\n[layers]\n"],
    ids=repr,
)
def test_broken_or_repeated_toml_names_the_line(text: str) -> None:
    assert " line " in error_of(text) or "end of document" in error_of(text)


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    assert read_recipe(file) == read_recipe(str(file)) == parse_recipe(GOOD, name="mine")

    file.write_text(GOOD.replace("base", "bas"))
    with pytest.raises(ValueError, match=r"mine\.toml: unknown key 'bas'; did you mean 'base'\?$"):
        read_recipe(file)
    file.write_bytes(b'base = "\xff"')
    with pytest.raises(ValueError, match=r"mine\.toml: not UTF-8 \(at byte 8\)$"):
        read_recipe(file)
    with pytest.raises(ValueError, match=r"^cannot read recipe .*no\.toml: No such file"):
        read_recipe(tmp_path / "no.toml")
    with pytest.raises(ValueError, match=r"^cannot read recipe .*: Is a directory$"):
        read_recipe(tmp_path)


# The shipped recipes


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_is_valid(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe is not None
    assert recipe.name == name
    assert recipe.description
    # A name that zoo.load knows, or one of the stages that fine-tune it.
    assert recipe.base == name.removesuffix("-eva-hybrid") or recipe.stages
    assert name.startswith(recipe.base)
    EvaConfig.from_dict(recipe.eva)


def test_the_searched_placement_ships() -> None:
    assert HYBRID in recipes.names()
    recipe = find_recipe(HYBRID)
    assert recipe is not None
    types = recipe.layer_types(30)
    full = tuple(layer for layer in range(30) if types[layer] == "full_attention")
    assert full == (7, 18, 20, 23)
    config = EvaConfig.from_dict(recipe.eva)
    assert (config.window, config.window_size, config.chunk_size) == ("sliding", 1024, 16)


@pytest.mark.parametrize("name", ["nothing", "", ".", "../recipes/" + HYBRID, HYBRID + ".toml"])
def test_an_unknown_name_finds_no_recipe(name: str) -> None:
    assert find_recipe(name) is None


# Placement


@settings(deadline=None)
@given(placements())
def test_a_rule_gives_that_many_layers_of_the_model_in_order(case: tuple[Placement, int]) -> None:
    placement, num_layers = case
    layers = exact_layers(placement, num_layers)
    assert len(set(layers)) == placement.count
    assert list(layers) == sorted(layers)
    assert set(layers) <= set(range(num_layers))


@settings(deadline=None)
@given(placements())
def test_the_layers_of_a_rule_pass_as_a_list(case: tuple[Placement, int]) -> None:
    placement, num_layers = case
    layers = exact_layers(placement, num_layers)
    assert exact_layers(tuple(reversed(layers)), num_layers) == layers


@pytest.mark.parametrize(
    ("count", "num_layers", "layers"),
    [
        (6, 30, (2, 7, 12, 17, 22, 27)),
        (3, 30, (5, 15, 25)),
        (5, 30, (3, 9, 15, 21, 27)),
        (1, 1, (0,)),
        (4, 4, (0, 1, 2, 3)),
    ],
)
def test_uniform_takes_the_middle_of_equal_stretches(
    count: int, num_layers: int, layers: tuple[int, ...]
) -> None:
    assert exact_layers(Placement(rule="uniform", count=count), num_layers) == layers


@settings(deadline=None)
@given(st.integers(1, 80), st.data())
def test_uniform_spreads_evenly(num_layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_layers))
    layers = exact_layers(Placement(rule="uniform", count=count), num_layers)
    gaps = [after - before for before, after in pairwise(layers)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    # as far from the first layer as from the last, up to rounding
    assert abs(layers[0] - (num_layers - 1 - layers[-1])) <= 1


def test_first_and_last_take_the_ends() -> None:
    assert exact_layers(Placement(rule="first", count=2), 5) == (0, 1)
    assert exact_layers(Placement(rule="last", count=2), 5) == (3, 4)


@pytest.mark.parametrize(
    ("seed", "layers"), [(0, (3, 7, 12, 15, 25)), (1, (9, 13, 19, 20, 26))], ids=["0", "1"]
)
def test_random_is_the_same_everywhere(seed: int, layers: tuple[int, ...]) -> None:
    # written down once: another Python or platform must find the same
    assert exact_layers(Placement(rule="random", count=5, seed=seed), 30) == layers


@settings(deadline=None)
@given(st.integers(2, 80), st.integers(0, 1000), st.data())
def test_random_with_one_more_layer_keeps_the_others(
    num_layers: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_layers - 1))
    fewer, more = (
        set(exact_layers(Placement(rule="random", count=k, seed=seed), num_layers))
        for k in (count, count + 1)
    )
    assert fewer < more


def test_random_reaches_every_layer() -> None:
    drawn = {
        exact_layers(Placement(rule="random", count=1, seed=seed), 8)[0] for seed in range(100)
    }
    assert drawn == set(range(8))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((3, 30, 41), "no layer 30, 41 in a model of 30 layers; valid are 0 to 29"),
        ((3, -1), "a layer must be an integer of at least 0, not -1"),
        ((3, 4, 3), "layer 3 is listed twice"),
        (
            Placement(rule="uniform", count=31),
            "cannot place 31 exact layers in a model of 30 layers; count may be 1 to 30",
        ),
    ],
    ids=["too deep", "negative", "twice", "too many"],
)
def test_layers_that_do_not_fit_are_refused(
    rule: Placement | tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        exact_layers(rule, 30)


def test_the_default_is_a_sixth_of_the_layers_and_at_least_one() -> None:
    counts = {depth: default_placement(depth).count for depth in (1, 2, 6, 12, 16, 22, 30, 36)}
    assert counts == {1: 1, 2: 1, 6: 1, 12: 2, 16: 3, 22: 4, 30: 5, 36: 6}
    assert default_placement(30).rule == "uniform"


@settings(deadline=None)
@given(st.integers(1, 200))
def test_the_default_fits_every_depth(num_layers: int) -> None:
    assert len(exact_layers(default_placement(num_layers), num_layers)) >= 1


# Lists of layers from a command line


@settings(deadline=None)
@given(st.sets(st.integers(0, 9999), min_size=1, max_size=8), st.randoms(), st.data())
def test_written_layers_are_read_back(
    starts: set[int], order: Random, data: st.DataObject
) -> None:
    parts: list[str] = []
    layers: set[int] = set()
    for start in starts:
        length = data.draw(st.integers(1, 4))
        run = range(start, min(start + length, 10000))
        if layers.isdisjoint(run):
            layers.update(run)
            space = data.draw(st.sampled_from(["", " "]))
            single = len(run) == 1 and data.draw(st.booleans())
            parts.append(f"{start}{space}" if single else f"{start}{space}-{space}{run[-1]}")
    order.shuffle(parts)
    assert parse_layers(",".join(parts)) == tuple(sorted(layers))


def test_layers_and_ranges_are_read() -> None:
    assert parse_layers("7,17-18,20") == (7, 17, 18, 20)
    assert parse_layers(" 20 , 7 ") == (7, 20)
    assert parse_layers("3-3") == (3,)
    assert parse_layers("none") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "cannot read '' in the layers ''; "
            "write layers and ranges, such as 7,17-18,20, or none",
        ),
        ("7,,8", "cannot read '' in the layers '7,,8'; "),
        ("7,x", "cannot read 'x' in the layers '7,x'; "),
        ("-1", "cannot read '-1' in the layers '-1'; "),
        ("1.5", "cannot read '1.5' in the layers '1.5'; "),
        ("1-2-3", "cannot read '1-2-3' in the layers '1-2-3'; "),
        ("7 8", "cannot read '7 8' in the layers '7 8'; "),
        ("0-999999999999", "cannot read '0-999999999999' in the layers "),
        ("²", "cannot read '²' in the layers '²'; "),
        ("18-17", "range 18-17 runs backwards; write 17-18"),
        ("7,5-8", "layer 7 is listed twice"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_lists_of_layers_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
        parse_layers(text)
