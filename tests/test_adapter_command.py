"""`zoo adapter`: what it writes, what it says is lost, and that a budget is kept."""

import json
from pathlib import Path

import pytest
import torch

import zoo
from tests.command_line import assert_mistake, run
from tests.tiny import SHORT_WINDOW, hf_config, make_model
from tools.adapter_budget import Trials, lost
from zoo.weights.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from zoo.weights.encoding import Encoding

TYPES = ["eva_attention", "full_attention", "eva_attention"]
ENCODINGS = ("whole", "int8", "int4", "low_rank:1", "low_rank:7:int8", "low_rank:32:float32")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `tuned`, a hybrid of it in which everything trained, matrices mostly in rank 2.

    `eva` is a hybrid in which only EVA parameters and norms did.
    """
    root = tmp_path_factory.mktemp("models")
    zoo.save(make_model(hf_config("llama")), root / "base")
    generator = torch.Generator().manual_seed(1)
    for name in ("tuned", "eva"):
        model = zoo.load(root / "base", layer_types=TYPES, eva=SHORT_WINDOW)
        with torch.no_grad():
            for key, parameter in sorted(model.named_parameters()):
                noise = 0.01 * torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 1 or ".attend." in key:
                    parameter.add_(noise)
                elif name == "tuned":
                    low = [torch.randn(n, 2, generator=generator) for n in parameter.shape]
                    parameter.add_(noise + 0.1 * low[0] @ low[1].T)
        zoo.save(model, root / name)
    return root


def size(folder: Path) -> int:
    files = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    return sum((folder / name).stat().st_size for name in files)


@pytest.mark.parametrize("encode", ENCODINGS)
def test_it_says_how_large_the_adapter_is_and_what_is_lost(
    root: Path, tmp_path: Path, encode: str
) -> None:
    out, base = tmp_path / "out", root / "base"
    done = run(
        *("adapter", root / "tuned", "--base", base, "--out", out),
        *("--encode", encode, "--json"),
    )
    assert done.code == 0
    found = json.loads(done.out)
    assert found["bytes"] == size(out)
    tuned, loaded, old = (zoo.load(each) for each in (root / "tuned", out, base))
    # 3 layers of 7 matrices and 2 norms, and embedding, head and last norm.
    assert sum(each["tensors"] for each in found["lost"].values()) == 3 * 9 + 3
    assert found["lost"]["norm.weight"]["lost"] == 0
    weights = [
        [m.get_parameter(f"layers.{i}.mlp.up_proj.weight") for i in range(3)]
        for m in (tuned, loaded, old)
    ]
    new, kept, before = (torch.stack([*each]).detach().double() for each in weights)
    expected = torch.linalg.vector_norm(new - kept) / torch.linalg.vector_norm(new - before)
    up_proj = found["lost"]["up_proj.weight"]
    assert up_proj["tensors"] == 3
    assert up_proj["lost"] == pytest.approx(float(expected), rel=1e-6)
    assert lost(tuned, tuned, old)["up_proj.weight"] == (3, 0.0)
    shown = run("adapter", root / "tuned", "--base", base, "--out", out, "--encode", encode).out
    assert f"{out}: {found['bytes'] / 1e6:.2f} MB, {encode}" in shown
    assert "up_proj.weight" in shown


def test_sizes_are_known_before_anything_is_encoded(root: Path, tmp_path: Path) -> None:
    model, base = zoo.load(root / "tuned"), zoo.load(root / "base")
    trials = Trials(model, base)
    for encode in ENCODINGS:
        zoo.save_adapter(
            model, tmp_path / "a", base=base, base_name=str(root / "base"), encode=encode
        )
        planned, found = trials.bytes(Encoding.parse(encode)), size(tmp_path / "a")
        # What is not known beforehand is text: a few hundred bytes a tensor.
        assert found <= planned <= found + 30 * 400


def test_a_budget_is_kept_and_the_best_encoding_in_it_is_taken(root: Path, tmp_path: Path) -> None:
    command = ("adapter", root / "tuned", "--base", root / "base", "--out", tmp_path / "a")
    previous = 1.0
    for budget in (60_000, 80_000, 200_000, 400_000):
        found = json.loads(run(*command, "--budget-mb", budget / 1e6, "--json").out)
        assert size(tmp_path / "a") == found["bytes"] <= budget
        assert all(trial["bytes"] <= budget for trial in found["trials"])
        least = min(found["trials"], key=lambda trial: trial["lost"])
        assert least["encoding"] == found["encode"]
        assert least["lost"] < previous
        previous = least["lost"]
    assert found["encode"] == "whole"
    assert previous == 0
    assert "low_rank:" in run(*command, "--budget-mb", 0.08).out
    assert_mistake(run(*command, "--budget-mb", 0.001), "nothing fits into 1,000 bytes")


def test_where_no_matrix_changed_there_is_nothing_to_choose(root: Path, tmp_path: Path) -> None:
    command = ("adapter", root / "eva", "--base", root / "base", "--out", tmp_path / "a")
    assert run(*command).code == 0
    first = size(tmp_path / "a")
    assert run(*command, "--budget-mb", 1).code == 0
    assert size(tmp_path / "a") == first
    model, loaded = zoo.load(root / "eva"), zoo.load(tmp_path / "a")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_mistakes_are_one_line_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("adapter", root / "tuned", "--base", root / "base", "--out", out)
    assert_mistake(run(*command), "is a matrix that changed; say how to keep it")
    assert_mistake(run(*command, "--encode", "int2"), "an encoding must be whole")
    assert_mistake(run(*command, "--encode", "int4", "--budget-mb", "1"), "exclude each other")
    assert_mistake(run(*command, "--budget-mb", "nan"), "a positive number, not nan")
    assert_mistake(run(*command[:2], "--base", "nobody", "--out", out), "unknown model")
    assert_mistake(run("adapter", root / "tuned", "--out", out), "--base")
    assert not out.exists()
