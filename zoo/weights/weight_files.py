"""Which files of a folder or repository hold a model's weights, and which we refuse to read.

Hugging Face's layout: `model.safetensors`, or `model.safetensors.index.json` and the shards it
names. Pickled weights are never opened, because reading a pickle can run code.
"""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file; ValueError, in one line, if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_index(path: Path) -> dict[str, str]:
    """The tensor name -> shard file name map of a safetensors index; ValueError if malformed."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map from tensor names to shard files")
    shards: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_shard_name(shard):
            raise ValueError(
                f"{path} places {name} in {shard!r}, expected a .safetensors file beside the index"
            )
        shards[name] = shard
    return shards


def no_safetensors(where: str, files: Iterable[str]) -> str:
    """One line for `where` (a folder or repository) that has no safetensors: why, what to do."""
    names = sorted(files)
    pickled = [name for name in names if name.lower().endswith(_PICKLED)]
    if pickled:
        return (
            f"{where} has only pickled weights ({_some(pickled)}), which can run code when read; "
            "where you trust them, convert them with transformers: "
            'AutoModelForCausalLM.from_pretrained("OLD").save_pretrained("NEW"), then load NEW'
        )
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf:
        return f"{where} has no {WEIGHTS_FILE}, but {_some(gguf)}; pass the path of that file"
    return f"{where} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; it holds {_some(names)}"


def _is_shard_name(name: str) -> bool:
    """Whether an index may name it: a path inside the folder, never an absolute or parent one."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name
    return inside and path.suffix == ".safetensors"


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit]) or "no files"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
