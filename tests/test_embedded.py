"""The embedded model's names, sizes, weights and recipes."""

import dataclasses
import re
import socket

import pytest
import torch

import zoo
from flasheva import EvaConfig
from recipes import Recipe, find_recipe
from tests.command_line import run
from tools.training.parameters import trained_names
from zoo import target
from zoo.registry import BASES, EMBEDDED
from zoo.weights.sources import open_base

NAMES = ("tiny", "tiny-eva", "tiny-eva-hybrid")
FULL, EVA = "full_attention", "eva_attention"


def recipe(name: str) -> Recipe:
    found = find_recipe(name)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_its_weights_in_the_package(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", None)  # no network
    model = zoo.load(name, dtype=dtype)
    adapter = "" if name == "tiny" else f" + embedded adapter {name}"
    assert model.weights_source == f"embedded tiny{adapter}"
    assert model.config == zoo.describe(name)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert zoo.load(name, weights="published").weights_source == "embedded tiny"
    assert model.tokenizer is not None
    text = "Martha's kite is green.\n\nWhere is it?"
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_with_other_options_it_is_untrained_which_its_recipe_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(target, "_said", set())
    eva = zoo.describe("tiny-eva-hybrid").eva
    other = dataclasses.replace(eva, window_size=32)
    assert zoo.load("tiny-eva-hybrid", eva=other).weights_source == "embedded tiny"
    left_out, untrained = [record.getMessage() for record in caplog.records[:2]]
    assert left_out.endswith("is left out")
    assert untrained.endswith("6 layers are untrained, at their initial values")


def test_bfloat16_loses_nothing_of_what_ships() -> None:
    for name in NAMES:
        rounded = dict(zoo.load(name, dtype="bfloat16").named_parameters())
        for key, value in zoo.load(name, dtype="float32").named_parameters():
            assert torch.equal(value, rounded[key].float())


def test_generate_without_a_name_writes_with_what_the_package_has() -> None:
    done = run("generate", "--prompt", "Once upon a time", "--max-new-tokens", 4)
    assert done.code == 0
    assert len(done.out.split()) >= 2
    assert "weights from embedded tiny + embedded adapter tiny-eva-hybrid" in done.err


@pytest.mark.parametrize("name", NAMES)
def test_a_name_loads_with_random_weights(name: str) -> None:
    model = zoo.load(name, weights="random")
    ids = torch.arange(200)[None] % 4096
    assert model(ids).shape == (1, 200, 4096)
    assert model(ids).isfinite().all()
    config = zoo.describe(name)
    assert model.config == config
    assert config.max_position_embeddings == 1024


def test_the_window_is_far_shorter_than_the_context() -> None:
    for name in NAMES[1:]:
        eva = zoo.describe(name).eva
        assert eva == dataclasses.replace(EvaConfig(), window_size=64, chunk_size=8, sink_size=8)
    assert set(zoo.describe("tiny").layer_types) == {FULL}
    assert set(zoo.describe("tiny-eva").layer_types) == {EVA}
    hybrid = zoo.describe("tiny-eva-hybrid").layer_types
    assert [i for i, kind in enumerate(hybrid) if kind == FULL] == [6, 7]


def test_the_model_and_two_adapters_fit_into_21_megabytes() -> None:
    assert sum(p.numel() for p in zoo.load("tiny").parameters()) == 6_951_168
    files = [file for name in NAMES for file in (EMBEDDED / name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 21_000_000
    for file in files:  # nothing of the machine that they were made on
        if "config" in file.name:
            assert not re.search(r'"/|folder ', file.read_text())


@pytest.mark.parametrize("name", ["tiny-recall", "tiny-pretrain"])
def test_pretraining_trains_everything_with_full_attention_and_no_teacher(name: str) -> None:
    found = recipe(name)
    assert set(found.layer_types(8)) == {FULL}
    (stage,) = found.stages
    assert not stage.needs_teacher
    assert stage.loss == (("cross_entropy", 1.0),)
    model = zoo.load("tiny", weights="random")
    assert {*trained_names(model, stage)} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES[1:])
def test_conversion_distils_logits_into_attention_only(name: str) -> None:
    found = recipe(name)
    assert found.base == "tiny"
    assert [stage.loss for stage in found.stages] == [
        (("attention_mse", 1.0),),
        (("logit_kl", 1.0),),
    ]
    model = zoo.load(name, weights="random")
    for stage in found.stages:
        assert stage.context == model.config.max_position_embeddings
        names = {*trained_names(model, stage)}
        attention = {n for n, _ in model.named_parameters() if ".attention." in n}
        if "attention_mse" in stage.weights:  # in which exact layers have no part
            types = model.config.layer_types
            attention = {n for n in attention if types[int(n.split(".")[1])] == "eva_attention"}
        assert names == attention


def test_no_repository_is_asked_for_weights_that_only_this_package_has() -> None:
    assert BASES["tiny"].embedded
    assert [name for name, base in BASES.items() if base.embedded] == ["tiny"]


def test_a_build_without_weights_says_so_in_one_line() -> None:
    wanted = r"^this build of flasheva-zoo has no weights of none; [^\n]+$"
    with pytest.raises(ValueError, match=wanted):
        open_base(dataclasses.replace(BASES["tiny"], preset="none"), None)


def test_a_revision_of_what_is_on_no_hub_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="'abc' is for the hub, but tiny comes with this package"):
        zoo.load("tiny", revision="abc")
