"""Exported folders: transformers loads them without this package and gives the same logits."""

import ast
import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
)

import zoo
from flasheva import EvaConfig
from tests.accuracy import UNIT_ROUNDOFF, error
from tests.command_line import ENVIRONMENT, TEMPLATE, assert_mistake, run, save
from tests.tiny import (
    FAMILIES,
    SHORT_WINDOW,
    TEXT,
    VOCAB_SIZE,
    hf_config,
    make_model,
    make_tokenizer,
    mixed,
)
from zoo import CausalLM
from zoo.export import export_model
from zoo.export.folder import REMOTE_CODE

ROOT = Path(__file__).parents[1]
LENGTHS = (1, 3, 4, 8, 9, 16, 77)  # of a window of 8 and chunks of 4
NATIVE = {"llama": "LlamaForCausalLM", "gpt_neox": "GPTNeoXForCausalLM", "phi": "PhiForCausalLM"}
OPTIONS = {
    "sliding": SHORT_WINDOW,
    "block": EvaConfig(window_size=8, chunk_size=4, window="block", sink_size=8),
    "pooled": EvaConfig(window_size=8, chunk_size=4, summary_map="pooled", sink_size=0),
    "layernorm": EvaConfig(
        window_size=8, chunk_size=2, summary_map="layernorm", summary_bias=False
    ),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
HYBRIDS: dict[str, dict[str, object]] = {
    **{f"{family}-sliding": mixed(family) for family in FAMILIES},
    **{f"llama-{name}": mixed("llama", eva) for name, eva in OPTIONS.items()},
    "llama-tied-biases": mixed(
        "llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "llama-llama3-rope": mixed("llama", head_dim=32, rope_parameters=LLAMA3),
    "neox-tied-sequential": mixed(
        "gpt_neox", tie_word_embeddings=True, use_parallel_residual=False, hidden_act="gelu_new"
    ),
    "phi-tied-pooled": mixed("phi", OPTIONS["pooled"], tie_word_embeddings=True),
}
TEXTS = ["", " two  spaces ", "naïve café, 2048!\n\n\tx", "a<|endoftext|>b", TEXT]


@pytest.fixture(scope="module", autouse=True)
def _modules_of_the_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies modelling code to a cache of its own, which is kept out of the home."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        torch.set_num_threads(1)
        yield


def with_tokenizer(config: dict[str, object]) -> CausalLM:
    model = make_model(config)
    model.tokenizer = make_tokenizer()
    model.tokenizer.chat_template = TEMPLATE
    return model


def exported(model: CausalLM, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What transformers makes of it, every tensor accounted for."""
    if not folder.exists():
        export_model(model, folder)
    hybrid = set(model.config.layer_types) != {"full_attention"}
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=hybrid, output_loading_info=True, dtype=dtype
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return theirs.eval()


def random_ids(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, VOCAB_SIZE, (batch, length), generator=generator)


@torch.inference_mode()
def assert_same_logits(model: CausalLM, folder: Path, *rows: Tensor) -> None:
    """In float64 the same, and in float32 as near to that as ours (by a factor of 2)."""
    exact_model = copy.deepcopy(model).double()
    theirs = exported(model, folder)
    theirs_exact = exported(model, folder, torch.float64)
    for ids in rows:
        exact, ours = exact_model(ids), model(ids)
        assert exact.std() > 0.5  # otherwise small differences would say little
        assert error(theirs_exact(ids).logits, exact) < 1e-12
        found = theirs(ids).logits
        assert found.dtype == torch.float32
        allowed = 2 * max(error(ours, exact), UNIT_ROUNDOFF[torch.float32])
        assert error(found, exact) <= allowed
        assert (found - ours).abs().max() < 1e-4


@pytest.mark.parametrize("case", HYBRIDS)
def test_a_hybrid_has_our_logits(case: str, tmp_path: Path) -> None:
    model = with_tokenizer(HYBRIDS[case])
    assert_same_logits(model, tmp_path / "out", *(random_ids(length) for length in LENGTHS))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_is_native_and_has_our_logits(family: str, tmp_path: Path) -> None:
    # Its repository once came with code of its own, which is not part of the folder.
    own_code = {"auto_map": {"AutoModelForCausalLM": f"modeling_{family}.Model"}}
    model = with_tokenizer(hf_config(family, **own_code))
    theirs = exported(model, tmp_path / "out")
    assert type(theirs).__name__ == NATIVE[family]
    assert not list((tmp_path / "out").glob("*.py"))
    with torch.inference_mode():
        for length in LENGTHS:
            ids = random_ids(length)
            assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


def test_every_kind_of_attention_matters(tmp_path: Path) -> None:
    """Otherwise equal logits would prove little."""
    ids, found = random_ids(77), []
    for kind in ("full_attention", "eva_attention", "window_attention"):
        config = hf_config("llama", layer_types=[kind] * 3, eva=SHORT_WINDOW.to_dict())
        found.append(exported(with_tokenizer(config), tmp_path / kind)(ids).logits)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (found[a] - found[b]).abs().max() > 0.1


def test_a_hybrid_is_refused_without_its_code(tmp_path: Path) -> None:
    # Window attention is a name that transformers knows, of something else.
    config = hf_config("llama", layer_types=["window_attention"] * 3, eva=SHORT_WINDOW.to_dict())
    export_model(with_tokenizer(config), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_ours(family: str, use_cache: bool, tmp_path: Path) -> None:
    model = make_model(mixed(family))  # no tokenizer: nothing ends a row
    export_model(model, tmp_path / "out", tokenizer=False)
    theirs = exported(model, tmp_path / "out")
    prompts, steps = random_ids(11), 40
    found = theirs.generate(
        prompts, max_new_tokens=steps, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    written = zoo.generate(model, prompts.tolist(), max_new_tokens=steps)
    assert found[:, 11:].tolist() == [row.ids for row in written]
    assert len(found[:, 11:].unique()) > 5


@pytest.mark.parametrize("front", [True, False], ids=["front", "behind"])
def test_padded_rows_have_the_logits_of_rows_alone(front: bool, tmp_path: Path) -> None:
    theirs = exported(with_tokenizer(mixed("llama", OPTIONS["layernorm"])), tmp_path / "out")
    sizes, width = (30, 19, 1, 26), 30
    ids, mask = random_ids(width, batch=4), torch.zeros(4, width, dtype=torch.int64)
    for row, size in enumerate(sizes):
        mask[row, width - size if front else 0 : width if front else size] = 1
    with torch.inference_mode():
        together = theirs(ids, attention_mask=mask).logits
        for row, size in enumerate(sizes):
            alone = theirs(ids[row][mask[row] == 1][None]).logits[0]
            assert len(alone) == size
            assert (together[row][mask[row] == 1] - alone).abs().max() < 1e-4


def test_rows_padded_in_front_are_continued_as_alone_from_the_cache(tmp_path: Path) -> None:
    theirs = exported(with_tokenizer(mixed("llama")), tmp_path / "out")
    rows = [random_ids(size, batch=1) for size in (21, 13)]
    ids, mask = torch.zeros(2, 21, dtype=torch.int64), torch.zeros(2, 21, dtype=torch.int64)
    for row, prompt in enumerate(rows):
        ids[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt[0], 1
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": VOCAB_SIZE}
    together = theirs.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    for row, prompt in enumerate(rows):
        alone = theirs.generate(prompt, pad_token_id=0, **options)
        assert together[row, 21:].tolist() == alone[0, prompt.shape[1] :].tolist()


def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path) -> None:
    theirs, ids = exported(with_tokenizer(mixed("llama")), tmp_path / "out"), random_ids(6)
    hole = torch.tensor([[1, 1, 0, 0, 1, 1]]).expand(2, -1)
    with pytest.raises(ValueError, match="between ones"):
        theirs(ids, attention_mask=hole)
    with pytest.raises(ValueError, match=r"must be \[2, 6\]"):
        theirs(ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match="position_ids"):
        theirs(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="DynamicCache"):
        theirs(ids, past_key_values=object())


def test_the_loss_is_that_of_the_next_token(tmp_path: Path) -> None:
    theirs, ids = exported(with_tokenizer(mixed("llama")), tmp_path / "out"), random_ids(20)
    output = theirs(ids, labels=ids)
    wanted = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:])
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in theirs.parameters())


def test_the_tokenizer_is_ours(tmp_path: Path) -> None:
    model = with_tokenizer(mixed("llama"))
    export_model(model, tmp_path / "out")
    assert_same_tokenizer(model, AutoTokenizer.from_pretrained(tmp_path / "out"), TEXTS)


def assert_same_tokenizer(
    model: CausalLM, theirs: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    ours = model.tokenizer
    assert ours is not None
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False)
    for name in ("bos", "eos", "pad"):
        assert getattr(theirs, f"{name}_token_id") == getattr(ours, f"{name}_id")
    messages = [{"role": "user", "content": "Why is 1 < 2?"}]
    rendered = ours.render_chat(messages, add_generation_prompt=True)
    assert rendered == theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == ours.encode(rendered, add_bos=False)


ALONE = """
import sys
for name in ("zoo", "flasheva", "layers", "recipes", "tools"):
    sys.modules[name] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.load(sys.argv[2])
torch.save(model(ids).logits.detach(), sys.argv[3])
"""


def test_a_hybrid_runs_where_this_package_is_not(tmp_path: Path) -> None:
    model, ids = with_tokenizer(mixed("llama")), random_ids(50)
    export_model(model, tmp_path / "out")
    torch.save(ids, tmp_path / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out", tmp_path / "ids.pt", tmp_path / "logits"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        assert (torch.load(tmp_path / "logits") - model(ids)).abs().max() < 1e-4


def test_its_code_is_ours_to_the_letter_and_imports_torch_and_transformers_only(
    tmp_path: Path,
) -> None:
    export_model(with_tokenizer(mixed("phi")), tmp_path / "out")
    files = sorted(REMOTE_CODE.glob("*.py"))
    assert [file.name for file in files] == sorted(p.name for p in (tmp_path / "out").glob("*.py"))
    for file in files:
        source = file.read_text(encoding="utf-8")
        assert (tmp_path / "out" / file.name).read_text(encoding="utf-8") == source
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.py" if node.level else str(node.module)}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            else:
                continue
            allowed = sys.stdlib_module_names | {"torch", "transformers"}
            for name in names:
                assert name in {f.name for f in files} or name.partition(".")[0] in allowed


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    model = with_tokenizer(mixed("llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="which has files; name a new folder"):
        export_model(model, tmp_path / "out")
    with pytest.raises(ValueError, match="which is a file"):
        export_model(model, tmp_path / "out" / "notes.txt")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_without_a_tokenizer_the_model_alone_is_exported_if_asked(tmp_path: Path) -> None:
    model = make_model(mixed("llama"))
    with pytest.raises(ValueError, match="no tokenizer to export"):
        export_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_model(model, tmp_path / "out", tokenizer=False)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert_same_logits(model, tmp_path / "out", random_ids(30))


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(with_tokenizer(mixed("llama")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_exports(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", hf_config("llama"))
    done = run("export", folder, tmp_path / "base")
    assert done.out == f'AutoModelForCausalLM.from_pretrained("{tmp_path / "base"}")\n'
    options = ("--layers", "1", "--window-size", 8, "--chunk-size", 4, "--dtype", "bfloat16")
    done = run("export", folder, tmp_path / "hybrid", *options)
    assert "trust_remote_code=True" in done.out
    config = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    assert config["attention_types"] == ["eva_attention", "full_attention", "eva_attention"]
    assert (config["dtype"], config["eva"]["window_size"]) == ("bfloat16", 8)
    assert_mistake(run("export", folder, tmp_path / "base"), "name a new folder")
    assert_mistake(
        run("export", "pythia-70m", tmp_path / "x", "--weights", "random"), "no tokenizer"
    )


SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_TEXTS = [
    *TEXTS,
    "The year 1984 cost 3.14 EUR; don't you'll see?  \n\n  x²½ 你好 🙂",
    "<|im_start|>user\nhi<|im_end|>\n",
    (ROOT / "README.md").read_text(encoding="utf-8")[:6000],
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "-eva-hybrid"], ids=["base", "hybrid"])
def test_smollm2_has_our_logits_and_tokens(variant: str, tmp_path: Path) -> None:
    model = zoo.load(SMOLLM2 + variant, device="cpu")
    theirs = exported(model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert_same_tokenizer(model, tokenizer, SMOLLM2_TEXTS)
    ids = torch.tensor([tokenizer(SMOLLM2_TEXTS[-1]).input_ids[:1300]])
    assert ids.shape[1] == 1300  # far behind a window of 1,024
    with torch.inference_mode():
        ours, found = model(ids), theirs(ids).logits
        exact = model.double()(ids)
    assert error(found, exact) <= 2 * error(ours, exact)
    assert (found.argmax(2) == ours.argmax(2)).double().mean() > 0.99
