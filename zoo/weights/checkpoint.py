"""Checkpoints in Hugging Face's layout: a config, tensors read one at a time, a tokenizer.

`read_folder` opens a model folder, `write_folder` writes one; other sources (GGUF files, the hub)
come down to the same `Checkpoint`. Only safetensors are read, never pickles.
"""

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.text.tokenizer import Tokenizer
from zoo.weights.atomic import replacing_folder, set_aside, write_text
from zoo.weights.weight_files import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    no_safetensors,
    read_index,
    read_json,
)

# Files of a saved model, which a new save replaces; anything else in the folder is the user's.
_OURS = (
    CONFIG_FILE,
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorSource(Protocol):
    """Tensors that are read when asked for, under the checkpoint's own (Hugging Face) names."""

    def keys(self) -> list[str]:
        """The names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `load` returns."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `load` returns."""
        ...

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a model is built from.

    Attributes:
        config: config.json as read.
        tensors: the weights.
        tokenizer: None if the checkpoint has none.
        source: one readable phrase that says where it comes from.
    """

    config: dict[str, object]
    tensors: TensorSource
    tokenizer: Tokenizer | None
    source: str


def read_folder(path: Path, *, source: str) -> Checkpoint:
    """Open a model folder; headers are checked now, tensors are read when asked for.

    Raises:
        ValueError: in one line, a missing folder or file, broken JSON, truncated safetensors, an
            index that does not fit its shards, pickled weights only.
    """
    if not path.is_dir():
        aside = "".join(
            f"; an interrupted save left the previous one in {p}" for p in set_aside(path)
        )
        raise ValueError(f"there is no folder {path}{aside}")
    files = [entry.name for entry in path.iterdir()]
    if CONFIG_FILE not in files:
        raise ValueError(f"{path} is not a model folder: it has no {CONFIG_FILE}")
    config = read_json(path / CONFIG_FILE)
    if WEIGHTS_FILE in files:
        tensors = SafetensorsFiles([path / WEIGHTS_FILE])
    elif INDEX_FILE in files:
        tensors = _read_shards(path)
    else:
        raise ValueError(no_safetensors(str(path), files))
    return Checkpoint(
        config=config, tensors=tensors, tokenizer=Tokenizer.from_folder(path), source=source
    )


def write_folder(
    path: Path,
    *,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model folder that `read_folder` and transformers read.

    A previous model at `path` is replaced as a whole once the new one is complete; files there
    that are no part of a model stay.

    Args:
        path: the folder; its parents are made.
        config: config.json.
        tensors: every name is written, also where two share memory, so give tied weights once.
        tokenizer: None writes none.
        max_shard_size: in bytes or like "5GB"; larger models are split, with an index.

    Raises:
        ValueError: `path` is a file or a folder that holds something else than a model.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"cannot save a model to {path}, which is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG_FILE).exists():
        raise ValueError(
            f"will not replace {path}, which has files but no {CONFIG_FILE}; name a new folder"
        )
    with replacing_folder(path, owned=_is_ours) as folder:
        write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_torch_state_dict(_unshared(tensors), folder, max_shard_size=max_shard_size)
        mode = (folder / CONFIG_FILE).stat().st_mode
        for file in folder.glob("*.safetensors"):
            file.chmod(mode)  # safetensors lets only the owner read them
        if tokenizer is not None:
            tokenizer.save(folder)


class _OpenFile(Protocol):
    """What we use of `safetensors.safe_open`, whose stubs have no types."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> "_Slice": ...
    def get_tensor(self, name: str) -> Tensor: ...


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class SafetensorsFiles:
    """TensorSource over one or more safetensors files."""

    def __init__(self, paths: list[Path]) -> None:
        """Open the files and check their headers.

        Raises:
            ValueError: a file is truncated or damaged, or two files have the same tensor.
        """
        self._files: dict[str, _OpenFile] = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            try:
                file: _OpenFile = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} is truncated or damaged, get it again: {error}"
                ) from None
            for name in file.keys():  # noqa: SIM118, not a mapping
                if name in self._files:
                    raise ValueError(f"{name} is in {self._paths[name]} and again in {path}")
                self._files[name], self._paths[name] = file, path

    def keys(self) -> list[str]:
        """The names, file by file."""
        return list(self._files)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._paths[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `load` returns."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `load` returns."""
        stored = self._files[name].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ValueError(
                f"{self._paths[name]} stores {name} as {stored}, which is not supported"
            )
        return _DTYPES[stored]

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        return self._files[name].get_tensor(name)


def _read_shards(folder: Path) -> SafetensorsFiles:
    index = read_index(folder / INDEX_FILE)
    shards = sorted(set(index.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}, which {INDEX_FILE} names")
    tensors = SafetensorsFiles([folder / shard for shard in shards])
    held = set(tensors.keys())
    for name, shard in index.items():
        if name not in held or tensors.path(name) != folder / shard:
            raise ValueError(
                f"{folder / shard} has no tensor {name}, which {INDEX_FILE} puts there"
            )
    return tensors


def _is_ours(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _OURS)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what is a view or shares memory: safetensors would drop or refuse such tensors."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        if storage.nbytes():
            seen.add(storage.data_ptr())
        result[name] = tensor.clone() if shared else tensor
    return result
