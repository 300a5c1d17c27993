"""The harness's own Hugging Face model and ours give the same scores, item by item."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.harness_inputs import HAY, tiny, write_data
from tools.evaluation.batches import BatchLimits
from tools.evaluation.harness import LOCAL_TASKS, LONG_TASKS, run_harness
from tools.evaluation.outcome import Outcome

pytest.importorskip("lm_eval", reason="needs the eval extra")

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from tools.evaluation.harness.model import ZooLM

SHORT = [name for name in LOCAL_TASKS if name not in LONG_TASKS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def hf_lm(folder: Path, batch_size: int, device: str = "cpu") -> TemplateLM:
    """The harness's model of a folder that `zoo.save` wrote."""
    pytest.importorskip("accelerate", reason="the harness's Hugging Face model needs it")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .to(device)
        .eval(),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        batch_size=batch_size,
    )


def _same(one: Outcome, other: Outcome) -> bool:
    names = [(x.task, x.item, x.metric, x.cell, x.weight) for x in (one, other)]
    exact = one.metric.startswith("acc")
    value = one.value if exact else pytest.approx(one.value, rel=1e-4)
    return names[0] == names[1] and bool(other.value == value)


def assert_same(theirs: list[Outcome], ours: list[Outcome]) -> None:
    assert theirs
    for one, other in zip(theirs, ours, strict=True):
        assert _same(one, other), (one, other)


@pytest.mark.parametrize("far", [0, 60])
def test_a_tiny_model_scores_as_with_the_harness_own(far: int, data: Path, tmp_path: Path) -> None:
    model = tiny(full=True)
    zoo.save(model, tmp_path / "saved")
    theirs = hf_lm(tmp_path / "saved", batch_size=2)
    names = SHORT if far else list(LOCAL_TASKS)
    options: dict[str, Any] = {"data": data, "far": far, "hay": HAY}
    assert_same(
        list(run_harness(theirs, "theirs", names, **options)),
        list(run_harness(model, "ours", names, limits=BatchLimits(rows=3), **options)),
    )
    if not far:
        asked = [
            Instance("generate_until", {}, (prompt, {"until": until, "max_gen_toks": 12}), 0)
            for prompt in ("A cache keeps", "Numbers such as")
            for until in ([], [" "], ["e", "\n"])
        ]
        found = ZooLM(model, batch_size=2).generate_until(asked, True)
        assert found == theirs.generate_until(asked, True)


@pytest.mark.slow
@pytest.mark.skipif("ZOO_DATA" not in os.environ, reason="needs ZOO_DATA, a folder of files")
@pytest.mark.parametrize(("far", "limit"), [(0, 8), (200, 2)])
def test_smollm2_scores_as_with_the_harness_own(far: int, limit: int, tmp_path: Path) -> None:
    """ZOO_DATA is what `zoo evaluate` takes as --data; ZOO_LIMIT is another number of items.

    Counts are printed (pytest -s). On a GPU all tasks are compared, else the short ones.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 32 if device == "cuda" else 4
    model = zoo.load("smollm2-135m-instruct", device=device, dtype=torch.float32)
    zoo.save(model, tmp_path / "saved")
    theirs = hf_lm(tmp_path / "saved", rows, device)
    limit = int(os.environ.get("ZOO_LIMIT", limit))
    options: dict[str, Any] = {"data": Path(os.environ["ZOO_DATA"]), "far": far, "limit": limit}
    differ: list[str] = []
    for task in LOCAL_TASKS if device == "cuda" and not far else SHORT:
        one = list(run_harness(theirs, "theirs", [task], **options))
        other = list(run_harness(model, "ours", [task], limits=BatchLimits(rows=rows), **options))
        pairs = list(zip(one, other, strict=True))
        assert pairs, f"{task} has no items"
        for metric in dict.fromkeys(x.metric for x in one):
            both = [(x.value, y.value) for x, y in pairs if x.metric == metric]
            sums = [sum(values) for values in zip(*both, strict=True)]
            most = max(abs(x - y) / max(1.0, abs(x)) for x, y in both)
            print(f"{task} far {far} {metric}: {len(both)} items, sums {sums}, apart {most:.1e}")
        differ += [
            f"{task} {x.item} {x.metric}: {x.value} {y.value}" for x, y in pairs if not _same(x, y)
        ]
    assert not differ
