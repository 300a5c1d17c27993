import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zoo.text.tokenizer import Tokenizer
from zoo.weights.checkpoint import Checkpoint, read_folder, write_folder

CONFIG: dict[str, object] = {"model_type": "llama", "hidden_size": 8, "name": "é"}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {"a.weight": torch.randn(5, 4, generator=generator), "b.weight": torch.arange(6)}
    return {**values, "c.weight": values["a.weight"].bfloat16(), "d.scale": torch.tensor(2.0)}


def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE({"a": 0, "</s>": 1}, []))
    return Tokenizer(backend, special={"eos_token": "</s>"}, chat_template="{{ 1 }}")


def read(path: Path) -> Checkpoint:
    return read_folder(path, source="a test")


def check(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    source = checkpoint.tensors
    assert sorted(source.keys()) == sorted(expected)
    for name, tensor in expected.items():
        loaded = source.load(name)
        assert torch.equal(loaded, tensor.cpu())
        assert loaded.dtype == source.dtype(name) == tensor.dtype
        assert tuple(loaded.shape) == source.shape(name)


@pytest.mark.parametrize("max_shard_size", ["5GB", 100])
def test_written_folders_read_back_equal(tmp_path: Path, max_shard_size: int | str) -> None:
    folder = tmp_path / "deep" / "model"
    write_folder(
        folder,
        config=CONFIG,
        tensors=tensors(),
        tokenizer=tokenizer(),
        max_shard_size=max_shard_size,
    )
    assert (folder / "model.safetensors").exists() == (max_shard_size == "5GB")
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_size == 100)
    checkpoint = read(folder)
    check(checkpoint, tensors())
    assert checkpoint.config == CONFIG
    assert checkpoint.source == "a test"
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.eos_ids == (1,)
    assert os.listdir(folder.parent) == ["model"]


def test_config_json_is_sorted_and_files_are_readable_by_others(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", config=CONFIG, tensors=tensors(), tokenizer=None)
    text = (tmp_path / "m" / "config.json").read_text()
    assert text == json.dumps(CONFIG, indent=2, sort_keys=True) + "\n"
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "m").iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors"], modes["config.json"])


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    write_folder(
        tmp_path / "m", config=config.to_dict(), tensors=model.state_dict(), tokenizer=None
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_views_and_shared_memory_are_written_under_every_name(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    views = {"q": whole[:2], "k": whole[2:].T, "whole": whole, "again": whole}
    write_folder(tmp_path / "m", config=CONFIG, tensors=views, tokenizer=None)
    check(read(tmp_path / "m"), views)


def test_saving_again_replaces_the_model_and_keeps_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_folder(
        folder, config=CONFIG, tensors=tensors(), tokenizer=tokenizer(), max_shard_size=100
    )
    (folder / "notes.md").write_text("mine")
    (folder / "runs").mkdir()
    new = {"a.weight": torch.zeros(2)}
    write_folder(folder, config={"model_type": "phi"}, tensors=new, tokenizer=None)
    check(read(folder), new)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "notes.md", "runs"]
    assert os.listdir(tmp_path) == ["m"]


def test_an_empty_folder_is_filled_and_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "link", config=CONFIG, tensors=tensors(), tokenizer=None)
    check(read(tmp_path / "real"), tensors())
    assert (tmp_path / "link").is_symlink()


def test_folders_that_hold_no_model_and_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for target, reason in (("home", "no config.json"), ("home/thesis.tex", "which is a file")):
        with pytest.raises(ValueError, match=reason):
            write_folder(tmp_path / target, config=CONFIG, tensors=tensors(), tokenizer=None)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["home"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["write", "first rename", "second rename"])
def test_an_interrupted_save_leaves_the_previous_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = tmp_path / "m"
    write_folder(folder, config=CONFIG, tensors=tensors(), tokenizer=None)
    calls: list[Path] = []

    def killing(real: Callable[[Path, Path], None], when: int) -> Callable[[Path, Path], None]:
        def call(source: Path, target: Path) -> None:
            calls.append(target)
            if len(calls) == when:
                raise Killed
            real(source, target)

        return call

    name, when = {"write": ("replace", 1), "first rename": ("rename", 1)}.get(at, ("rename", 2))
    monkeypatch.setattr(os, name, killing(getattr(os, name), when))
    with pytest.raises(Killed):
        write_folder(folder, config={}, tensors={"x": torch.zeros(1)}, tokenizer=None)
    assert len(calls) >= when
    check(read(folder), tensors())
    assert os.listdir(tmp_path) == ["m"]


def test_a_kill_between_the_renames_says_where_the_previous_model_is(tmp_path: Path) -> None:
    write_folder(tmp_path / ".m.0123.old", config=CONFIG, tensors=tensors(), tokenizer=None)
    with pytest.raises(
        ValueError, match=r"there is no folder .*m; an interrupted save.*0123\.old"
    ):
        read(tmp_path / "m")


def test_what_json_cannot_write_destroys_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", config=CONFIG, tensors=tensors(), tokenizer=None)
    with pytest.raises(TypeError):
        write_folder(tmp_path / "m", config={"a": object()}, tensors=tensors(), tokenizer=None)
    check(read(tmp_path / "m"), tensors())
    assert os.listdir(tmp_path) == ["m"]


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    write_folder(path, config=CONFIG, tensors=tensors(), tokenizer=None, max_shard_size=100)
    return path


def test_a_missing_folder_or_config_is_named(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nothing")
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff", ""])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_safetensors_are_refused(folder: Path, keep: int) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    error = refusal(folder)
    assert "truncated or damaged" in error
    assert shard.name in error


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"has no {shard.name}, which model.safetensors.index.json names" in refusal(folder)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        (None, "no weight_map"),
        ({"z": "model-00001-of-00002.safetensors"}, "has no tensor z"),
        ({"z": "../other.safetensors"}, "beside the index"),
        ({"z": "/etc/passwd"}, "beside the index"),
        ({"z": "pytorch_model.bin"}, "beside the index"),
        ({"z": 3}, "beside the index"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    folder: Path, weight_map: object, reason: str
) -> None:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert "model-00001-of-00002.safetensors" in shards
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert reason in refusal(folder)


def test_a_tensor_that_is_in_two_shards_is_refused(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    one, two = sorted(set(index["weight_map"].values()))[:2]
    names = [name for name, shard in index["weight_map"].items() if shard == two]
    values = {name: torch.zeros(1) for name in [*names, "extra"]}
    twice = next(name for name, shard in index["weight_map"].items() if shard == one)
    save_file({**values, twice: torch.zeros(1)}, folder / two)
    assert f"{twice} is in" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("model.pt", "save_pretrained"),
        ("consolidated.00.pth", "save_pretrained"),
        ("model.Q4_1.gguf", "pass the path of that file"),
        ("other.txt", "neither model.safetensors nor"),
    ],
)
def test_folders_without_safetensors_say_what_would_work(
    tmp_path: Path, name: str, advice: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    error = refusal(tmp_path)
    assert name in error
    assert advice in error
    assert not Path("ran").exists()
