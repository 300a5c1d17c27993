"""Unmodified models give the numbers of transformers, through folders that both sides write."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import zoo
from tests.tiny import VOCAB_SIZE, hf_config, scramble
from zoo.families import build, preset, read_config
from zoo.registry import BASES

TOLERANCE = 1e-4  # of logits that are several units apart
LENGTHS = (1, 2, 17, 96)
BATCH = 3
STEPS = 64

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so that 96 tokens need every branch of it
}
CASES: dict[str, dict[str, object]] = {
    "llama": hf_config("llama", num_key_value_heads=4),
    "llama-grouped": hf_config("llama", num_attention_heads=6, hidden_size=48),
    "llama-one-key-head": hf_config("llama", num_key_value_heads=1),
    "llama-wide-heads": hf_config("llama", head_dim=20),
    "llama-tied": hf_config("llama", tie_word_embeddings=True),
    "llama-biases": hf_config("llama", attention_bias=True, mlp_bias=True),
    "llama-theta-eps": hf_config("llama", rope_theta=500.0, rms_norm_eps=1e-2),
    "llama-llama3-rope": hf_config("llama", head_dim=32, rope_parameters=LLAMA3),
    "llama-gelu": hf_config("llama", hidden_act="gelu"),
    "llama-null-heads": hf_config("llama", num_key_value_heads=None, head_dim=None),
    "neox": hf_config("gpt_neox", hidden_size=64),
    "neox-sequential-half": hf_config("gpt_neox", rotary_pct=0.5, use_parallel_residual=False),
    "neox-full-rotary": hf_config("gpt_neox", rotary_pct=1.0, rotary_emb_base=300),
    "neox-tied": hf_config("gpt_neox", tie_word_embeddings=True, num_attention_heads=2),
    "neox-no-attention-bias": hf_config("gpt_neox", attention_bias=False, layer_norm_eps=1e-2),
    "neox-llama3-rope": hf_config(
        "gpt_neox", hidden_act="gelu_new", rope_parameters=LLAMA3 | {"partial_rotary_factor": 1.0}
    ),
    "phi": hf_config("phi", num_key_value_heads=4),
    "phi-grouped-quarter": hf_config("phi", hidden_size=64, partial_rotary_factor=0.25),
    "phi-full-rotary": hf_config("phi", partial_rotary_factor=1.0, num_key_value_heads=1),
    "phi-tied": hf_config("phi", tie_word_embeddings=True, hidden_act="gelu"),
    "phi-theta-eps": hf_config("phi", rope_theta=500.0, layer_norm_eps=1e-2),
}


class Pair(NamedTuple):
    theirs: PreTrainedModel
    folder: Path
    ours: zoo.CausalLM


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """transformers' model with random weights, its folder, and ours from that folder."""
    fields = CASES[request.param]
    # Nothing ends a row: every one has all the steps.
    config = AutoConfig.for_model(**fields, eos_token_id=None, bos_token_id=None)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    scramble(theirs)
    folder = tmp_path_factory.mktemp("parity")
    theirs.save_pretrained(folder)
    return Pair(theirs, folder, zoo.load(folder))


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


def random_ids(length: int, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=generator)


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_equal_those_of_transformers(pair: Pair, length: int) -> None:
    ids = random_ids(length)
    wanted = pair.theirs(ids).logits
    assert wanted.std() > 0.5  # otherwise the tolerance would say little
    assert pair.ours(ids).dtype == torch.float32
    torch.testing.assert_close(pair.ours(ids), wanted, atol=TOLERANCE, rtol=0)


def test_64_greedy_tokens_equal_those_of_transformers(pair: Pair) -> None:
    prompts = random_ids(11, batch=2)
    wanted = pair.theirs.generate(prompts, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)[
        :, prompts.shape[1] :
    ]
    assert wanted.shape == (2, STEPS)
    assert len(wanted.unique()) > 5
    written = zoo.generate(pair.ours, prompts.tolist(), max_new_tokens=STEPS)
    assert [row.ids for row in written] == wanted.tolist()


def test_a_saved_model_is_read_back_by_transformers(pair: Pair, tmp_path: Path) -> None:
    zoo.save(pair.ours, tmp_path / "saved")
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_ids(50)
    assert torch.equal(again.eval()(ids).logits, pair.theirs(ids).logits)
    assert torch.equal(zoo.load(tmp_path / "saved")(ids), pair.ours(ids))


def old_spelling(fields: dict[str, object]) -> dict[str, object]:
    """A config.json as transformers 4 wrote it."""
    fields = dict(fields)
    rope = fields.pop("rope_parameters")
    assert isinstance(rope, dict)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    partial = rope.pop("partial_rotary_factor", None)
    fields["torch_dtype"] = fields.pop("dtype")
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if fields["model_type"] == "gpt_neox":
        return fields | {"rotary_pct": partial, "rotary_emb_base": theta}
    if fields["model_type"] == "phi":
        fields["partial_rotary_factor"] = partial
    return fields | {"rope_theta": theta}


def test_old_spellings_of_config_json_are_read(pair: Pair, tmp_path: Path) -> None:
    new = json.loads((pair.folder / "config.json").read_text())
    old = old_spelling(new)
    assert "rope_parameters" not in old
    assert read_config(old) == pair.ours.config
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "model.safetensors").symlink_to(pair.folder / "model.safetensors")
    model = zoo.load(tmp_path)
    ids = random_ids(40)
    assert torch.equal(model(ids), pair.ours(ids))
    # What is saved then has one spelling only.
    zoo.save(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    kept = set(old) & set(saved) & {"rotary_pct", "rotary_emb_base", "rope_theta", "torch_dtype"}
    assert not kept
    assert read_config(saved) == pair.ours.config


# As published; those of SmolLM2 follow from their config.json.
PARAMETERS = {
    "tiny": 6_951_168,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "phi-1.5": 1_418_270_720,
    "gemma3-270m": 268_098_176,
}
PRESETS = {base.preset: base.family for base in BASES.values()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_parameters_under_the_names_of_transformers(name: str) -> None:
    fields = preset(PRESETS[name], name)
    with torch.device("meta"):
        ours = build(read_config(fields), "auto")
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert sum(parameter.numel() for parameter in ours.parameters()) == PARAMETERS[name]
    # In files GPT-NeoX's head is `embed_out`; transformers 5 renames it when it reads them.
    head = "embed_out" if PRESETS[name] == "gpt_neox" else "lm_head"
    wanted = {n.replace("lm_head", head): p.shape for n, p in theirs.named_parameters()}
    assert {ours.hf_name(n): p.shape for n, p in ours.named_parameters()} == wanted


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_leaves_out_has_the_defaults_of_transformers(name: str) -> None:
    fields = preset(PRESETS[name], name)
    assert read_config(AutoConfig.for_model(**fields).to_dict()) == read_config(fields)
