import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save

import zoo
from tests.hub_server import HubServer
from zoo.weights.checkpoint import read_folder

# The client reads its environment when it is imported, hence processes: one for each environment.
# The stand-in for the package saves each of them the import of torch, which hub.py does not need.
_WORKER = f"""
import json, sys, types
sys.modules["zoo"] = types.ModuleType("zoo")
sys.modules["zoo"].__path__ = {zoo.__path__!r}
from zoo.weights import hub
for line in sys.stdin:
    name, repo, revision = json.loads(line)
    try:
        folder = getattr(hub, name)(repo, revision)
        answer = [None if folder is None else str(folder), None]
    except hub.HubError as error:
        answer = [None, str(error)]
    print(json.dumps(answer), flush=True)
"""
_CONFIG = json.dumps({"model_type": "llama", "hidden_size": 8}).encode()


class Answer(NamedTuple):
    folder: Path | None
    error: str | None


class Client:
    """`zoo.weights.hub` in a process of its own."""

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

    def call(self, name: str, repo: str, revision: str | None = None) -> Answer:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, repo, revision]) + "\n")
        self._process.stdin.flush()
        folder, error = json.loads(self._process.stdout.readline())
        return Answer(folder and Path(folder), error)

    def fetch(self, repo: str, revision: str | None = None) -> Path:
        folder, error = self.call("fetch", repo, revision)
        assert error is None
        assert folder is not None
        return folder

    def cached(self, repo: str, revision: str | None = None) -> Path | None:
        folder, error = self.call("cached", repo, revision)
        assert error is None
        return folder

    def refusal(self, repo: str, revision: str | None = None) -> str:
        """The one line with which `fetch` refuses."""
        folder, error = self.call("fetch", repo, revision)
        assert folder is None
        assert error is not None
        assert "\n" not in error
        return error

    def stop(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer({}) as hub:
        yield hub


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    server.repair()
    server.requests.clear()
    return server


@pytest.fixture(scope="module")
def clients(server: HubServer, home: Path) -> Iterator[dict[str, Client]]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    extra = {
        "online": {},
        "offline": {"HF_HUB_OFFLINE": "1"},
        "unreachable": {"HF_ENDPOINT": nobody},
    }
    env = server.env(home)
    clients = {name: Client({**env, **more}, home / f"{name}.log") for name, more in extra.items()}
    yield clients
    for process in clients.values():
        process.stop()


@pytest.fixture
def client(clients: dict[str, Client]) -> Client:
    return clients["online"]


def single(seed: int = 0) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(seed)
    weights = {"a.weight": torch.randn(64, 32, generator=generator), "b.weight": torch.zeros(3)}
    return {
        "config.json": _CONFIG,
        "model.safetensors": save(weights, {"format": "pt"}),
        "generation_config.json": b"{}",
        "README.md": b"# A model",
        "pytorch_model.bin": b"pickled",
        "onnx/model.onnx": b"not ours",
    }


def sharded(shards: int = 3) -> dict[str, bytes]:
    names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    index = {"metadata": {}, "weight_map": {f"{i}.weight": n for i, n in enumerate(names)}}
    files = {n: save({f"{i}.weight": torch.full((99,), float(i))}) for i, n in enumerate(names)}
    return {
        "config.json": _CONFIG,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **files,
    }


def test_first_load_downloads_what_a_checkpoint_needs_and_nothing_else(
    hub: HubServer, client: Client
) -> None:
    hub.repos["org/first"] = single()
    assert client.cached("org/first") is None
    folder = client.fetch("org/first")
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    for file in folder.iterdir():
        assert file.read_bytes() == hub.repos["org/first"][file.name]
    assert read_folder(folder, source="here").tensors.shape("a.weight") == (64, 32)
    assert "%" in client.log.read_text()  # the client's progress bars


def test_cached_load_asks_the_server_nothing(
    hub: HubServer, client: Client, clients: dict[str, Client]
) -> None:
    hub.repos["org/again"] = single()
    folder = client.fetch("org/again")
    hub.requests.clear()
    assert client.cached("org/again") == folder
    assert client.cached("org/again", folder.name) == folder
    assert clients["offline"].cached("org/again") == folder
    assert hub.requests == []


def test_sharded_repository_downloads_the_shards_of_its_index(
    hub: HubServer, client: Client
) -> None:
    hub.repos["org/sharded"] = {**sharded(), "model-00009-of-00009.safetensors": b"stray"}
    folder = client.fetch("org/sharded")
    tensors = read_folder(folder, source="here").tensors
    assert [tensors.load(f"{i}.weight")[0].item() for i in range(3)] == [0.0, 1.0, 2.0]
    assert not (folder / "model-00009-of-00009.safetensors").exists()
    assert client.cached("org/sharded") == folder


def test_revisions_are_branches_tags_and_commits(hub: HubServer, client: Client) -> None:
    hub.repos |= {"org/revised": single(1), "org/revised@v1": single(2)}
    commit = hub.commit("org/revised", "v1")
    main, tagged = client.fetch("org/revised"), client.fetch("org/revised", "v1")
    assert main.name != tagged.name
    assert tagged.name == commit
    assert client.fetch("org/revised", commit) == tagged
    for folder, name in ((main, "org/revised"), (tagged, "org/revised@v1")):
        content = (folder / "model.safetensors").read_bytes()
        assert content == hub.repos[name]["model.safetensors"]
    assert "no revision 'v2'" in client.refusal("org/revised", "v2")


@pytest.mark.parametrize("environment", ["offline", "unreachable"])
def test_without_a_network_what_is_not_cached_says_what_to_run(
    hub: HubServer, clients: dict[str, Client], environment: str
) -> None:
    process = clients[environment]
    assert process.cached("org/absent") is None
    error = process.refusal("org/absent", "v3")
    assert "`hf download org/absent --revision v3`" in error
    assert "local folder" in error
    reason = {"offline": "HF_HUB_OFFLINE", "unreachable": "Connection refused"}[environment]
    assert reason in error
    assert hub.requests == []


def test_interrupted_download_resumes_where_it_stopped(hub: HubServer, client: Client) -> None:
    size, chunk = 11 * 2**20, 10 * 2**20  # the client writes, and so resumes, by chunks
    weights = save({"a.weight": torch.arange(size // 4, dtype=torch.int32)})
    hub.repos["org/cut"] = {"config.json": _CONFIG, "model.safetensors": weights}
    hub.cut("org/cut", "model.safetensors", after=size - 1000)
    folder = client.fetch("org/cut")
    gets = [r for r in hub.requests if r.method == "GET" and r.path.endswith("model.safetensors")]
    assert [r.range for r in gets] == [None, f"bytes={chunk}-"]
    assert (folder / "model.safetensors").read_bytes() == weights


def test_broken_download_is_not_taken_for_complete_and_goes_on_later(
    hub: HubServer, client: Client, clients: dict[str, Client], home: Path
) -> None:
    hub.repos["org/broken"] = sharded()
    hub.cut("org/broken", "model-00002-of-00003.safetensors", after=50, times=99, reset=True)
    assert "try again" in client.refusal("org/broken")
    assert client.cached("org/broken") is None
    for name, process in clients.items():
        if name != "online":
            assert "`hf download org/broken`" in process.refusal("org/broken")
    arrived = {path.name for path in home.glob("hub/models--org--broken/snapshots/*/*")}
    assert "config.json" not in arrived
    hub.repair()
    hub.requests.clear()
    folder = client.fetch("org/broken")
    assert client.cached("org/broken") == folder
    for name in hub.repos["org/broken"]:
        assert hub.count("GET", name) == (0 if name in arrived else 1)


def test_a_snapshot_that_lost_a_shard_is_completed(hub: HubServer, client: Client) -> None:
    hub.repos["org/lost"] = sharded()
    folder = client.fetch("org/lost")
    lost = folder / "model-00002-of-00003.safetensors"
    lost.resolve().unlink()
    assert client.cached("org/lost") is None
    hub.requests.clear()
    assert client.fetch("org/lost") == folder == client.cached("org/lost")
    assert [r.path.rsplit("/", 1)[-1] for r in hub.requests if "resolve" in r.path] == [
        lost.name
    ] * 2  # HEAD and GET


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "generation_config.json",
        "config.json",
        "model.safetensors.index.json",
        "model-00002-of-00003.safetensors",
    ],
)
def test_wrong_checksum_is_refused_and_not_left_in_the_cache(
    hub: HubServer, client: Client, home: Path, file: str
) -> None:
    repo = f"org/corrupt-{file}"
    hub.repos[repo] = sharded() if "model-" in file or "index" in file else single(3)
    hub.repos[repo]["generation_config.json"] = b'{"eos_token_id": 7}'
    hub.corrupt(repo, file)
    error = client.refusal(repo)
    assert f"{file} came with a wrong checksum" in error
    assert client.cached(repo) is None
    cache = home / "hub" / f"models--{repo.replace('/', '--')}"
    assert not list(cache.glob(f"snapshots/*/{file}"))
    for blob in cache.glob("blobs/*"):
        assert blob.read_bytes() in hub.repos[repo].values()
    hub.repair()
    assert (client.fetch(repo) / file).read_bytes() == hub.repos[repo][file]


def test_a_file_that_is_listed_but_not_served_is_named(hub: HubServer, client: Client) -> None:
    hub.repos["org/dropped"] = single()
    hub.drop("org/dropped", "model.safetensors")
    error = client.refusal("org/dropped")
    assert "lists a file that the hub lacks" in error
    assert "model.safetensors" in error


def test_a_shard_that_the_repository_lacks_is_named(hub: HubServer, client: Client) -> None:
    hub.repos["org/missing"] = sharded()
    del hub.repos["org/missing"]["model-00002-of-00003.safetensors"]
    error = client.refusal("org/missing")
    assert "model-00002-of-00003.safetensors" in error
    assert hub.count("GET", "model-00001-of-00003.safetensors") == 0


def test_an_index_that_is_not_json_is_refused(hub: HubServer, client: Client) -> None:
    hub.repos["org/index"] = {**sharded(), "model.safetensors.index.json": b"{"}
    assert "not valid JSON" in client.refusal("org/index")


def test_a_repository_without_a_config_is_refused(hub: HubServer, client: Client) -> None:
    hub.repos["org/bare"] = single()
    del hub.repos["org/bare"]["config.json"]
    assert "no config.json" in client.refusal("org/bare")


def test_pickles_are_never_downloaded(hub: HubServer, client: Client) -> None:
    hub.repos["org/pickled"] = {"config.json": _CONFIG, "pytorch_model.bin": b"pickled"}
    error = client.refusal("org/pickled")
    assert "pytorch_model.bin" in error
    assert "save_pretrained" in error
    assert not [request for request in hub.requests if "/resolve/" in request.path]


def test_gated_repository_says_to_accept_the_licence_and_log_in(
    hub: HubServer, client: Client
) -> None:
    hub.repos["org/gated"] = single()
    hub.gate("org/gated")
    error = client.refusal("org/gated")
    assert "accept its licence" in error
    assert "`hf auth login`" in error


def test_unknown_and_malformed_names_are_refused(hub: HubServer, client: Client) -> None:
    assert f"there is no {hub.url}/org/nobody" in client.refusal("org/nobody")
    assert "expected org/name" in client.refusal("org/../name")
    assert "expected org/name" in str(client.call("cached", "a/b/c").error)
