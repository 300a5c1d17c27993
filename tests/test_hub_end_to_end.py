"""zoo.load and `zoo generate` through the real huggingface-hub client and a loopback hub."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from recipes import default_placement, exact_layers
from tests.hub_server import HubServer
from tests.tiny import END, VOCAB_SIZE, make_tokenizer, scramble, tokenizer_json

PYTHIA = "EleutherAI/pythia-160m"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
PROMPT = "The server listens on 2048; a naïve café"
# config.json of Pythia as it is published.
PUBLISHED = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
SMALL = PUBLISHED | {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB_SIZE,
}

# The client reads its environment when it is imported, hence processes: one for each environment.
_WORKER = """
import json, logging, sys
import torch
import zoo
torch.set_num_threads(1)
said = []
class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("zoo").addHandler(Said())
logging.getLogger("zoo").setLevel(logging.INFO)
for line in sys.stdin:
    name, prompt, options = json.loads(line)
    said.clear()
    try:
        model = zoo.load(name, **options)
        [row] = zoo.generate(model, prompt, max_new_tokens=4)
        with torch.inference_mode():
            logits = model(torch.tensor([row.prompt_ids]))[0, -1].tolist()
        answer = {
            "layer_types": model.config.layer_types,
            "source": model.weights_source,
            "prompt_ids": row.prompt_ids,
            "logits": logits,
            "ids": row.ids,
            "text": row.text,
            "said": said,
        }
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Loaded(NamedTuple):
    layer_types: list[str]
    source: str
    prompt_ids: list[int]
    logits: list[float]
    ids: list[int]
    text: str
    said: list[str]


class Process:
    """`zoo.load` and a little text from it, in a process of its own."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env={**os.environ, **env},
            text=True,
        )

    def load(self, name: str, **options: str) -> Loaded:
        answer = self._call(name, options)
        assert "error" not in answer, answer
        return Loaded(**answer)

    def refusal(self, name: str, **options: str) -> str:
        error = self._call(name, options)["error"]
        assert "\n" not in error
        return error

    def _call(self, name: str, options: dict[str, str]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, PROMPT, options]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.log.read_text()
        return json.loads(answer)

    def stop(self) -> None:
        self._process.communicate()


class Published(NamedTuple):
    """A repository of a Pythia, and what transformers computes with its weights."""

    files: dict[str, bytes]
    logits: Tensor


def published(config: dict[str, object] = SMALL, seed: int = 0, shards: int = 1) -> Published:
    """Random weights in the layout of Pythia: float16, old names, old buffers."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    scramble(model, seed)
    model = model.half().float().eval()  # the numbers that a file of float16 holds
    tensors = {
        name.replace("lm_head", "embed_out"): tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
    }
    context = model.config.max_position_embeddings
    for layer in range(model.config.num_hidden_layers):
        prefix = f"gpt_neox.layers.{layer}.attention."
        tensors[f"{prefix}bias"] = torch.ones(1, 1, context, context, dtype=torch.bool).tril()
        tensors[f"{prefix}masked_bias"] = torch.tensor(-1e9)
        tensors[f"{prefix}rotary_emb.inv_freq"] = torch.ones(8)
    special = {f"{name}_token": END for name in ("bos", "eos", "unk")}
    files = {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": tokenizer_json().encode(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **special}
        ).encode(),
        "special_tokens_map.json": json.dumps(special).encode(),
        "README.md": b"# Pythia",
        "pytorch_model.bin": b"pickled",
    }
    if shards == 1:
        files["model.safetensors"] = save(tensors, {"format": "pt"})
    else:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        where = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
        files |= {
            file: save({n: t for n, t in tensors.items() if where[n] == file}, {"format": "pt"})
            for file in names
        }
        index = {"metadata": {}, "weight_map": where}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    ids = torch.tensor([make_tokenizer().encode(PROMPT)])
    with torch.inference_mode():
        return Published(files, model(ids).logits[0, -1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def pythia() -> Published:
    torch.set_num_threads(1)
    return published()


@pytest.fixture(scope="module")
def server(pythia: Published) -> Iterator[HubServer]:
    with HubServer({PYTHIA: pythia.files}) as hub:
        yield hub


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    server.repair()
    server.requests.clear()
    return server


@pytest.fixture(scope="module")
def environments(server: HubServer, home: Path) -> dict[str, dict[str, str]]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    env = server.env(home)
    return {
        "online": env,
        "unreachable": env | {"HF_ENDPOINT": nobody},
    }


@pytest.fixture(scope="module")
def processes(environments: dict[str, dict[str, str]], home: Path) -> Iterator[dict[str, Process]]:
    started = {name: Process(env, home / f"{name}.log") for name, env in environments.items()}
    yield started
    for process in started.values():
        process.stop()


@pytest.fixture
def online(processes: dict[str, Process]) -> Process:
    return processes["online"]


@pytest.fixture(scope="module")
def first(server: HubServer, processes: dict[str, Process]) -> Loaded:
    """The first load of a model whose files nobody has."""
    server.requests.clear()
    return processes["online"].load("pythia-160m-eva-hybrid")


def assert_is(loaded: Loaded, wanted: Published) -> None:
    """The prompt is shorter than the window: EVA at its initial values changes nothing."""
    torch.testing.assert_close(torch.tensor(loaded.logits), wanted.logits, atol=1e-4, rtol=0)
    assert loaded.prompt_ids == make_tokenizer().encode(PROMPT)
    assert loaded.ids[0] == int(wanted.logits.argmax())
    assert loaded.text == make_tokenizer().decode(loaded.ids)


def test_first_load_of_a_hybrid_downloads_converts_and_writes_text(
    server: HubServer, first: Loaded, pythia: Published
) -> None:
    exact = exact_layers(default_placement(4), 4)
    assert [i for i, kind in enumerate(first.layer_types) if kind == "full_attention"] == [*exact]
    assert first.layer_types.count("eva_attention") == 4 - len(exact)
    assert first.source.startswith(f"Hugging Face hub, {PYTHIA} (")
    commit = server.commit(PYTHIA)
    assert commit is not None
    assert commit[:8] in first.source
    assert_is(first, pythia)
    downloaded = {r.path.rsplit("/", 1)[-1] for r in server.requests if r.method == "GET"}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= downloaded
    assert not downloaded & {"pytorch_model.bin", "README.md"}
    assert len(first.said) == 3
    assert "its exact layers have not been searched for" in first.said[0]
    assert "are untrained" in first.said[1]
    assert first.said[2] == f"pythia-160m-eva-hybrid: weights from {first.source}"


@pytest.mark.parametrize("environment", ["online", "unreachable"])
def test_later_loads_come_from_the_cache_without_a_network(
    hub: HubServer,
    processes: dict[str, Process],
    first: Loaded,
    pythia: Published,
    environment: str,
) -> None:
    again = processes[environment].load("pythia-160m-eva-hybrid")
    assert again.source.startswith(f"Hugging Face cache, {PYTHIA} (")
    assert again.logits == first.logits
    assert (again.ids, again.text) == (first.ids, first.text)
    # The same files serve the other names, and the name of the repository.
    for name, kinds in (
        ("pythia-160m", {"full_attention"}),
        ("pythia-160m-eva", {"eva_attention"}),
        (PYTHIA, {"full_attention"}),
    ):
        loaded = processes[environment].load(name)
        assert {*loaded.layer_types} == kinds
        assert_is(loaded, pythia)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("pythia-410m-eva", "EleutherAI/pythia-410m"),
        ("org/absent", "org/absent"),
    ],
)
def test_what_is_not_cached_says_what_to_run(
    hub: HubServer, processes: dict[str, Process], name: str, repo: str
) -> None:
    error = processes["unreachable"].refusal(name)
    assert f"`hf download {repo}`" in error
    assert "local folder" in error
    assert hub.requests == []


def test_a_repository_may_be_sharded_and_have_revisions(hub: HubServer, online: Process) -> None:
    main, old = published(seed=1, shards=3), published(seed=2)
    hub.repos |= {"org/sharded": main.files, "org/sharded@v1": old.files}
    assert_is(online.load("org/sharded"), main)
    loaded = online.load("org/sharded", revision="v1")
    assert_is(loaded, old)
    assert "org/sharded at v1" in loaded.source
    hub.requests.clear()
    assert_is(online.load("org/sharded"), main)
    assert_is(online.load("org/sharded", revision="v1"), old)
    commit = hub.commit("org/sharded", "v1")
    assert commit is not None
    assert_is(online.load("org/sharded", revision=commit), old)
    assert hub.requests == []
    assert "no revision 'v2'" in online.refusal("org/sharded", revision="v2")


def test_a_registered_name_takes_a_revision_too(hub: HubServer, online: Process) -> None:
    step = published(seed=3)
    hub.repos[f"{PYTHIA}@step1000"] = step.files
    loaded = online.load("pythia-160m-eva", revision="step1000")
    assert_is(loaded, step)
    assert f"{PYTHIA} at step1000" in loaded.source


def test_an_interrupted_download_goes_on_and_fetches_nothing_twice(
    hub: HubServer, online: Process
) -> None:
    model = published(seed=4, shards=3)
    hub.repos["org/cut"] = model.files
    second = "model-00002-of-00003.safetensors"
    hub.cut("org/cut", second, after=1000, times=99, reset=True)
    error = online.refusal("org/cut")
    assert "org/cut is not complete" in error
    assert "try again" in error
    arrived = {name for name in model.files if hub.count("GET", name)} - {second}
    hub.repair()
    hub.requests.clear()
    assert_is(online.load("org/cut"), model)
    assert hub.count("GET", second) == 1
    assert not [name for name in arrived if name != "config.json" and hub.count("GET", name)]


def test_a_cache_that_another_tool_left_without_a_tokenizer_is_completed(
    hub: HubServer, online: Process, home: Path
) -> None:
    # transformers' AutoModel downloads config.json and the weights only.
    model = published(seed=7)
    hub.repos["org/half"] = model.files
    online.load("org/half")
    for file in home.glob("hub/models--org--half/snapshots/*/*token*"):
        file.unlink()
    assert_is(online.load("org/half"), model)


def test_a_wrong_checksum_is_refused_and_downloaded_anew(hub: HubServer, online: Process) -> None:
    model = published(seed=5)
    hub.repos["org/corrupt"] = model.files
    hub.corrupt("org/corrupt", "model.safetensors")
    for _ in range(2):
        assert "model.safetensors came with a wrong checksum" in online.refusal("org/corrupt")
    hub.repair()
    assert_is(online.load("org/corrupt"), model)


def test_a_missing_file_is_named(hub: HubServer, online: Process) -> None:
    model = published(seed=6, shards=2)
    hub.repos["org/dropped"] = model.files
    hub.drop("org/dropped", "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors" in online.refusal("org/dropped")
    lacking = {k: v for k, v in model.files.items() if k != "model-00002-of-00002.safetensors"}
    hub.repos["org/lacking"] = lacking
    assert "model-00002-of-00002.safetensors" in online.refusal("org/lacking")
    hub.repos["org/bare"] = {k: v for k, v in model.files.items() if k != "config.json"}
    assert "no config.json" in online.refusal("org/bare")
    assert f"{hub.url}/org/nobody" in online.refusal("org/nobody")


def test_a_repository_with_pickles_only_is_refused(
    hub: HubServer, online: Process, pythia: Published
) -> None:
    files = {k: v for k, v in pythia.files.items() if k != "model.safetensors"}
    hub.repos["org/pickled"] = files
    error = online.refusal("org/pickled")
    assert "only pickled weights (pytorch_model.bin)" in error
    assert "save_pretrained" in error
    assert hub.count("GET", "pytorch_model.bin") == 0


def test_what_the_hub_has_wrong_is_refused_as_a_folder_would_be(
    hub: HubServer, online: Process, pythia: Published
) -> None:
    weights = pythia.files["model.safetensors"]
    hub.repos["org/short"] = pythia.files | {"model.safetensors": weights[:-10]}
    assert "truncated or damaged" in online.refusal("org/short")
    fewer = json.dumps(SMALL | {"num_hidden_layers": 5}).encode()
    hub.repos["org/deeper"] = pythia.files | {"config.json": fewer}
    error = online.refusal("org/deeper")
    assert "org/deeper" in error
    assert "lacks 12 tensor(s)" in error
    assert "gpt_neox.layers.4." in error
    other = json.dumps({"model_type": "mamba"}).encode()
    hub.repos["org/mamba"] = pythia.files | {"config.json": other}
    assert "not 'mamba'" in online.refusal("org/mamba")


# The command line


def zoo_generate(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.generate", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_the_text_of_the_model_offline(
    environments: dict[str, dict[str, str]], first: Loaded
) -> None:
    options = ("pythia-160m-eva-hybrid", "--prompt", PROMPT, "--max-new-tokens", "4")
    done = zoo_generate(environments["online"] | OFFLINE, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == first.text + "\n"
    assert f"weights from Hugging Face cache, {PYTHIA}" in done.stderr


def test_the_command_says_offline_in_one_line_what_to_run(
    environments: dict[str, dict[str, str]],
) -> None:
    done = zoo_generate(environments["online"] | OFFLINE, "pythia-1b-eva", "--prompt", "a")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(
        r"error: .*HF_HUB_OFFLINE is set.*`hf download EleutherAI/pythia-1b`.*\n", done.stderr
    )


@pytest.mark.slow
def test_the_command_downloads_a_pythia_of_the_real_size(tmp_path: Path) -> None:
    files = published(PUBLISHED).files
    assert len(files["model.safetensors"]) > 370_000_000
    with HubServer({PYTHIA: files}) as hub:
        options = ("pythia-160m-eva-hybrid", "--prompt", PROMPT, "--max-new-tokens", "8", "--json")
        done = zoo_generate(hub.env(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["new_tokens"] == 8
    assert result["weights_source"].startswith(f"Hugging Face hub, {PYTHIA} (")
    shutil.rmtree(tmp_path)  # pytest would keep 400 MB
