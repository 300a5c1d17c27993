"""Adapter folders: what a fine-tuned model has that its base has not.

adapter_config.json says which base, which attention, and how every tensor is kept (encoding.py);
adapter.safetensors holds the parts. Names are published ones, as in any checkpoint.
`AdapterTensors` reads both over the base's tensors as if they were one checkpoint.

A base is told from another by checksums, one per tensor: SHA-256 over 64 values of it in float32,
evenly spaced from the first to the last. They cost nothing where a tensor is read anyway, and are
the same whatever dtype and device a model is loaded in. Bases that differ only in a few rows
of one matrix may pass for the same one.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from flasheva import EvaConfig
from zoo.weights.atomic import replacing_folder, write_text
from zoo.weights.checkpoint import SafetensorsFiles, TensorSource
from zoo.weights.encoding import Encoded, Entry, decode
from zoo.weights.weight_files import CONFIG_FILE, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter.safetensors"

_Json = TypeVar("_Json", str, list[object], dict[str, object])

_FORMAT, _VERSION = "flasheva-zoo adapter", 1
_SAMPLES = 64  # values of a tensor that its checksum sees
_FIRST_CHECKS = 4  # tensors that are compared before any is used


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """adapter_config.json.

    Attributes:
        base: what `zoo.load` takes; a path that begins with a dot is relative to the folder.
        base_source: where the base's weights came from when the adapter was made.
        base_checksums: of the base's tensors, without those of EVA layers.
        layer_types, eva: the attention that the adapter was trained with.
        tensors: those that differ from the base or are not in it; all others are the base's.
    """

    base: str
    base_source: str
    base_checksums: Mapping[str, str]
    layer_types: tuple[str, ...]
    eva: EvaConfig
    tensors: Mapping[str, Entry]

    def to_json(self) -> dict[str, object]:
        """The inverse of `from_json`."""
        return {
            "format": _FORMAT,
            "format_version": _VERSION,
            "base": self.base,
            "base_source": self.base_source,
            "base_checksums": dict(self.base_checksums),
            "layer_types": list(self.layer_types),
            "eva": self.eva.to_dict(),
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, object]) -> Self:
        """Reads the object of an adapter_config.json.

        Raises:
            ValueError: another format or version, or a field that is missing or wrong.
        """
        if fields.get("format") != _FORMAT:
            peft = "; adapters of peft are not read" if "peft_type" in fields else ""
            raise ValueError(f"format must be {_FORMAT!r}, not {fields.get('format')!r}{peft}")
        if fields.get("format_version") != _VERSION:
            raise ValueError(
                f"format_version must be {_VERSION}, not {fields.get('format_version')!r}"
            )
        texts = [_field(fields, name, str) for name in ("base", "base_source")]
        checksums = {str(k): str(v) for k, v in _field(fields, "base_checksums", dict).items()}
        tensors = {}
        for name, value in _field(fields, "tensors", dict).items():
            try:
                tensors[str(name)] = Entry.from_json(value)
            except ValueError as error:
                raise ValueError(f"tensors: {name}: {error}") from None
            if tensors[name].encoding != "whole" and name not in checksums:
                raise ValueError(f"tensors: {name} differs from a base that does not have it")
        return cls(
            base=texts[0],
            base_source=texts[1],
            base_checksums=checksums,
            layer_types=tuple(map(str, _field(fields, "layer_types", list))),
            eva=EvaConfig.from_dict(_field(fields, "eva", dict)),
            tensors=tensors,
        )

    def model_config(self, base: Mapping[str, object]) -> dict[str, object]:
        """The config.json of the model, from the base's."""
        return {**base, "layer_types": list(self.layer_types), "eva": self.eva.to_dict()}


def is_adapter(path: Path) -> bool:
    """Whether `path` is a folder with an adapter, and not one with a model."""
    path = path.expanduser()
    return (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG_FILE).exists()


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads adapter_config.json.

    Raises:
        ValueError: it is missing or wrong; one line.
    """
    file = folder.expanduser() / ADAPTER_CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} is not an adapter: it has no {ADAPTER_CONFIG}")
    fields = read_json(file)
    try:
        return AdapterConfig.from_json(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def write_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, Encoded]) -> None:
    """Writes an adapter folder; a previous one is replaced as a whole once this one is complete.

    Args:
        folder: its parents are made; files in it that are no part of an adapter stay.
        config: its `tensors` are those of `tensors`.
        tensors: by published name.

    Raises:
        ValueError: `folder` is a file or a folder that holds something else than an adapter.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot save an adapter to {folder}, which is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_adapter(folder):
        raise ValueError(
            f"will not replace {folder}, which has files but no adapter; name a new folder"
        )
    parts = {
        name + end: part.contiguous()
        for name, encoded in tensors.items()
        for end, part in encoded.parts.items()
    }
    with replacing_folder(folder, owned={ADAPTER_CONFIG, ADAPTER_WEIGHTS}.__contains__) as fresh:
        text = json.dumps(config.to_json(), indent=1, sort_keys=True) + "\n"
        write_text(fresh / ADAPTER_CONFIG, text)
        save_file(parts, fresh / ADAPTER_WEIGHTS)
        # safetensors lets only the owner read them.
        (fresh / ADAPTER_WEIGHTS).chmod((fresh / ADAPTER_CONFIG).stat().st_mode)


def checksum(tensor: Tensor) -> str:
    """What tells a base's tensor apart from those of other weights; see the module."""
    flat = tensor.detach().flatten()
    last = len(flat) - 1
    places = torch.arange(_SAMPLES, device=flat.device) * last // (_SAMPLES - 1)
    values = flat[places].to("cpu", torch.float32).numpy().astype("<f4")
    content = str(list(tensor.shape)).encode() + values.tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


class AdapterTensors:
    """TensorSource of an adapter over its base; a tensor is decoded when it is loaded."""

    def __init__(self, folder: Path, config: AdapterConfig, base: TensorSource) -> None:
        """Check the file's header against the config.

        Raises:
            ValueError: the file is missing or damaged, or has other tensors than the config says.
        """
        self.base = base
        self._folder, self._config = folder, config
        path = folder.expanduser() / ADAPTER_WEIGHTS
        if not path.is_file():
            raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}")
        self._file = SafetensorsFiles([path])
        wanted = {
            name + end: part
            for name, entry in config.tensors.items()
            for end, part in entry.parts().items()
        }
        held = set(self._file.keys())
        for what, wrong in (("lacks", wanted.keys() - held), ("has", held - wanted.keys())):
            if wrong:
                and_not = "" if what == "lacks" else f", which {ADAPTER_CONFIG} does not name"
                raise ValueError(f"{path} {what} {min(wrong)}{and_not}")
        for name, (dtype, shape) in wanted.items():
            found = self._file.dtype(name), self._file.shape(name)
            if found != (dtype, shape):
                raise ValueError(
                    f"{path}: {name} is {_described(*found)}, but {ADAPTER_CONFIG} makes it "
                    f"{_described(dtype, shape)}"
                )

    def why_not_this_base(self) -> str | None:
        """What shows that the base's weights are others, looking at little of them; or None."""
        base, checksums = self.base, self._config.base_checksums
        missing = checksums.keys() - set(base.keys())
        if missing:
            return f"{min(missing)} is not there"
        for name, entry in self._config.tensors.items():
            if name in checksums and base.shape(name) != entry.shape:
                return f"{name} has shape {list(base.shape(name))}, not {list(entry.shape)}"
        # The smallest matrices: vectors survive quantisation, and large ones take time to read.
        matrices = [name for name in checksums if len(base.shape(name)) > 1]
        matrices.sort(key=lambda name: (math.prod(base.shape(name)), name))
        for name in matrices[:_FIRST_CHECKS]:
            if checksum(base.load(name)) != checksums[name]:
                return f"{name} has other values"
        return None

    def keys(self) -> list[str]:
        """The base's names, but for those of its EVA layers, and the adapter's."""
        names = [name for name in self.base.keys() if ".attend." not in name]  # noqa: SIM118
        return list(dict.fromkeys((*names, *self._config.tensors)))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `load` returns."""
        entry = self._config.tensors.get(name)
        return self.base.shape(name) if entry is None else entry.shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `load` returns."""
        entry = self._config.tensors.get(name)
        if entry is None:
            return self.base.dtype(name)
        if entry.encoding == "whole":
            found: torch.dtype = getattr(torch, entry.stored)
            return found
        wide = torch.promote_types(self.base.dtype(name), torch.float32)
        return torch.float64 if entry.stored == "float64" else wide

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU; ValueError if the base's part in it is of other weights."""
        entry = self._config.tensors.get(name)
        if entry is None:
            return self._of_base(name)
        return decode(
            entry,
            part=lambda end: self._file.load(name + end),
            base=lambda: self._of_base(name),
        )

    def _of_base(self, name: str) -> Tensor:
        tensor = self.base.load(name)
        expected = self._config.base_checksums.get(name)
        if expected is not None and checksum(tensor) != expected:
            raise ValueError(
                f"adapter {self._folder} was made on other weights of {self._config.base} "
                f"({self._config.base_source}): {name} has other values"
            )
        return tensor


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _field(fields: Mapping[str, object], name: str, kind: type[_Json]) -> _Json:
    value = fields.get(name)
    if not isinstance(value, kind):
        wanted = {str: "a string", list: "a list", dict: "an object"}[kind]
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
    return value
