"""zoo.load: from a name to a model in eval mode, and zoo.save: from a model to a folder.

What a name means (registry.py), where weights come from (sources.py) and which attention each
layer gets are settled in that order; then the model is built without memory and filled.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from flasheva import EvaConfig, Impl
from recipes import Layers, Recipe, default_placement, find_recipe, read_recipe
from zoo.causal_lm import CausalLM
from zoo.checkpoint import Checkpoint, write_folder
from zoo.config import ModelConfig, to_hf
from zoo.families import build, preset, read_config
from zoo.filling import fill, fill_random
from zoo.registry import BASES, split_name, unknown_name
from zoo.sources import open_base, open_path, open_repo

log = logging.getLogger("zoo")
_said: set[str] = set()


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    eva: EvaConfig | None = None,
    layer_types: Sequence[str] | None = None,
    impl: Impl = "auto",
    revision: str | None = None,
    weights: str | Path = "auto",
) -> CausalLM:
    """Loads a model.

    Args:
        name_or_path: a registered name (see `zoo.list`), a recipe file (.toml), a local folder, a
            .gguf file, or "org/name" on the Hugging Face hub.
        device: None: CUDA if present, else the CPU.
        dtype: such as "bfloat16" or torch.bfloat16; None: float32 on a CPU, the checkpoint's
            own on a GPU.
        eva: the EVA layers' options, in place of the recipe's or the checkpoint's.
        layer_types: one of "full_attention", "eva_attention", "window_attention" per layer, in
            place of the name's, the recipe's or the checkpoint's.
        impl: how EVA layers compute, see `flasheva.eva_attention`.
        revision: branch, tag or commit on the hub.
        weights: "auto" (the Hugging Face cache, an installed weights package, the hub), "random"
            (from torch's current random state, no tokenizer), or a folder or .gguf file.

    Returns:
        The model in eval mode, with `.config`, `.tokenizer` (None if the checkpoint has none) and
        `.weights_source`.

    Raises:
        ValueError: one line: what is wrong, what was given and what would work.
    """
    target = _resolve(name_or_path)
    device = _device(device)
    checkpoint = None
    if str(weights) == "random":
        hf_config = _preset(target)
    else:
        checkpoint = _open(target, weights, revision)
        hf_config = checkpoint.config
    saved = read_config(hf_config)
    config = _configure(target, saved, eva, layer_types)
    with torch.device("meta"):
        model = build(config, impl)
    model.hf_config = hf_config
    wanted = _dtype(dtype, device, checkpoint)
    if checkpoint is None:
        fill_random(model, device, wanted)
        model.weights_source = "random weights"
    else:
        source = checkpoint.source
        untrained = fill(model, checkpoint.tensors, saved.layer_types, device, wanted, source)
        if untrained:
            _say_untrained(target, len(untrained))
        model.tokenizer = checkpoint.tokenizer
        model.weights_source = source
    log.info("%s: weights from %s", target.label, model.weights_source)
    return model.eval()


def save(model: CausalLM, folder: str | Path) -> None:
    """Writes `model` to a folder that `zoo.load` reads; an interrupted save destroys nothing.

    config.json, safetensors under the published names (EVA parameters beside them) and the
    tokenizer: an unmodified model's folder is also an ordinary `transformers` folder.

    Raises:
        ValueError: `folder` holds something that is not a saved model.
    """
    parameters = dict(model.named_parameters())
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_folder(
        Path(folder),
        config=to_hf(model.config, model.hf_config, dtype),
        tensors={model.hf_name(name): p.detach().cpu() for name, p in parameters.items()},
        tokenizer=model.tokenizer,
    )


@dataclasses.dataclass(frozen=True)
class _Target:
    """What a name means: one of base, path and repo, and what becomes of its layers."""

    label: str
    base: str | None = None
    path: Path | None = None
    repo: str | None = None
    all_eva: bool = False
    default_hybrid: bool = False
    recipe: Recipe | None = None


def _resolve(name_or_path: str | Path) -> _Target:
    name, path = str(name_or_path), Path(name_or_path)
    if found := split_name(name):
        base, variant = found
        recipe = find_recipe(name) if variant == "-eva-hybrid" else None
        return _Target(
            name,
            base=base,
            all_eva=variant == "-eva",
            default_hybrid=variant == "-eva-hybrid" and recipe is None,
            recipe=recipe,
        )
    if path.suffix == ".toml":
        recipe = read_recipe(path)
        beside = path.parent / recipe.base  # a folder may be named relative to its recipe
        base_name = str(beside) if "/" in recipe.base and beside.exists() else recipe.base
        if Path(base_name).suffix == ".toml":
            raise ValueError(f"{path}: base must be a model, not another recipe {recipe.base!r}")
        return dataclasses.replace(_resolve(base_name), label=name, recipe=recipe)
    if path.expanduser().exists():
        return _Target(name, path=path)
    looks_like_path = name.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors")
    if looks_like_path or isinstance(name_or_path, Path):
        raise ValueError(f"no such file or folder: {name}")
    if name.count("/") == 1 and all(name.split("/")):
        return _Target(name, repo=name)
    raise ValueError(unknown_name(name))


def _preset(target: _Target) -> dict[str, object]:
    if target.base is None:
        raise ValueError(
            f"weights='random' needs a registered name, not {target.label!r}; see `zoo list`"
        )
    base = BASES[target.base]
    return preset(base.family, base.preset)


def _open(target: _Target, weights: str | Path, revision: str | None) -> Checkpoint:
    path = target.path if str(weights) == "auto" else Path(weights)
    if path is not None:
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the hub, but {path} is a local path")
        return open_path(path)
    if target.repo is not None:
        return open_repo(target.repo, revision)
    assert target.base is not None
    return open_base(BASES[target.base], revision)


def _configure(
    target: _Target,
    saved: ModelConfig,
    eva: EvaConfig | None,
    layer_types: Sequence[str] | None,
) -> ModelConfig:
    depth = saved.num_hidden_layers
    types, options = saved.layer_types, saved.eva
    if target.recipe is not None:
        types = target.recipe.layer_types(depth)
        try:
            options = EvaConfig.from_dict(target.recipe.eva)
        except ValueError as error:
            raise ValueError(f"recipe {target.recipe.name!r}: {error}") from None
    elif target.all_eva:
        types = ("eva_attention",) * depth
    elif target.default_hybrid:
        layers = Layers(exact=default_placement(depth))
        types = Recipe(name=target.label, base="", eva={}, layers=layers).layer_types(depth)
        if layer_types is None:
            exact = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
            _warn_once(
                f"{target.label}: its exact layers have not been searched for; "
                f"using {len(exact)} evenly spaced ones, {exact}"
            )
    if layer_types is not None:
        types = tuple(layer_types)
    assert dataclasses.is_dataclass(saved) and not isinstance(saved, type)
    return dataclasses.replace(saved, layer_types=types, eva=eva or options)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; try 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but this torch sees no GPU")
    return device


def _dtype(
    dtype: str | torch.dtype | None, device: torch.device, checkpoint: Checkpoint | None
) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype is None:
        if device.type == "cpu" or checkpoint is None:
            return torch.float32
        dtypes = {checkpoint.tensors.dtype(name) for name in checkpoint.tensors.keys()}
        return torch.float32 if torch.float32 in dtypes else min(dtypes, key=str)
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype must be one of float32, bfloat16, float16, float64, not {dtype!r}"
        )
    return found


def _say_untrained(target: _Target, count: int) -> None:
    recipe = f"recipe {target.recipe.name!r}" if target.recipe else "no shipped recipe"
    _warn_once(
        f"{target.label}: the EVA parameters of {count} layers are untrained, at their initial "
        f"values ({recipe} trains them)"
    )


def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)
