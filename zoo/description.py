"""zoo.describe: the configuration that `zoo.load` would build, without reading any weights."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download

from flasheva import EvaConfig
from zoo.config import ModelConfig
from zoo.families import read_config
from zoo.opening import NO_PATH, base_preset, base_target, refuse_other_attention
from zoo.target import Target, configure, resolve
from zoo.weights import hub
from zoo.weights.adapter import is_adapter, read_adapter_config
from zoo.weights.gguf import read_gguf
from zoo.weights.weight_files import CONFIG_FILE, read_json


def describe(
    name_or_path: str | Path,
    *,
    eva: EvaConfig | None = None,
    layer_types: Sequence[str] | None = None,
    revision: str | None = None,
    weights: str | Path = "auto",
) -> ModelConfig:
    """The configuration of a model: sizes, layer types, EVA options.

    A registered name needs no network: its sizes are part of this package. Of a repository on the
    hub only config.json is fetched.

    Args:
        name_or_path, eva, layer_types, revision, weights: as `zoo.load`.

    Raises:
        ValueError: one line: an unknown name, a missing or broken config.json, layer types or
            options that do not fit.
    """
    target = resolve(name_or_path)
    saved = read_config(_hf_config(target, weights, revision))
    config = configure(target, saved, eva, layer_types)
    path = target.path if str(weights) in NO_PATH else Path(weights)
    if path is not None and is_adapter(path):
        refuse_other_attention(config, saved, f"adapter {path}")
    return config


def _hf_config(target: Target, weights: str | Path, revision: str | None) -> Mapping[str, object]:
    path = target.path if str(weights) in NO_PATH else Path(weights)
    if path is not None and is_adapter(path):
        adapter = read_adapter_config(path)
        return adapter.model_config(_hf_config(base_target(path, adapter), "published", revision))
    if path is not None:
        return _read_path(path.expanduser())
    if target.repo is not None:
        return _read_repo(target.repo, revision)
    return base_preset(target)


def _read_path(path: Path) -> Mapping[str, object]:
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf(path, source=f"file {path}").config
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path} is not a model folder: it has no {CONFIG_FILE}")
    return read_json(path / CONFIG_FILE)


def _read_repo(repo: str, revision: str | None) -> Mapping[str, object]:
    folder = hub.cached(repo, revision)
    if folder is not None:
        return read_json(folder / CONFIG_FILE)
    # Not into the client's cache, where a config.json says that the weights beside it are whole.
    with tempfile.TemporaryDirectory() as temporary, hub.one_line(repo, revision):
        path = hf_hub_download(repo, CONFIG_FILE, revision=revision, local_dir=temporary)
        return read_json(Path(path))
