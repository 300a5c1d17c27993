"""zoo.load: from a name to a model in eval mode, and zoo.save: from a model to a folder.

What a name means and which attention each layer gets (target.py), and where weights come from
(opening.py), are settled first; then the model is built without memory and filled (filling.py).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from flasheva import EvaConfig, Impl
from zoo.causal_lm import CausalLM
from zoo.config import ModelConfig, to_hf
from zoo.families import build, read_config
from zoo.opening import (
    NO_PATH,
    adapter_of,
    base_preset,
    open_target,
    refuse_other_attention,
)
from zoo.registry import BASES
from zoo.target import Target, configure, resolve, say_default_placement, say_untrained
from zoo.weights.adapter import AdapterTensors
from zoo.weights.checkpoint import Checkpoint, write_folder
from zoo.weights.filling import fill, fill_random

log = logging.getLogger("zoo")


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
        name_or_path: a registered name (see `zoo.list`), a recipe file (.toml), a local folder (of
            a model or an adapter), a .gguf file, or "org/name" on the Hugging Face hub.
        device: None: CUDA if present, else the CPU.
        dtype: such as "bfloat16" or torch.bfloat16; None: float32 on a CPU, the checkpoint's
            own on a GPU.
        eva: the EVA layers' options, in place of the recipe's or the checkpoint's.
        layer_types: one of "full_attention", "eva_attention", "window_attention" per layer, in
            place of the name's, the recipe's or the checkpoint's.
        impl: how EVA layers compute, see `flasheva.eva_attention`.
        revision: branch, tag or commit on the hub.
        weights: "auto" (the name's adapter in this package, if there is one, over what the Hugging
            Face cache, an installed weights package or the hub has), "published" (the same
            without an adapter), "random" (from torch's current random state, no tokenizer), or a
            folder or .gguf file.

    Returns:
        The model in eval mode, with `.config`, `.tokenizer` (None if the checkpoint has none) and
        `.weights_source`.

    Raises:
        ValueError: one line: what is wrong, what was given and what would work.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, not {impl!r}")
    if eva is not None and not isinstance(eva, EvaConfig):
        raise ValueError(f"eva must be an EvaConfig, not {eva!r}")
    if isinstance(layer_types, str):
        raise ValueError(f"layer_types must be a list, one type per layer, not {layer_types!r}")
    target = resolve(name_or_path)
    device = _device(device)
    checkpoint = None
    if str(weights) == "random":
        hf_config = _random_preset(target)
    else:
        adapter = adapter_of(target, weights, eva, layer_types)
        checkpoint = open_target(target, weights, revision, adapter)
        hf_config = checkpoint.config
    saved = read_config(hf_config)
    if checkpoint and target.base and saved.model_type != BASES[target.base].family:
        raise ValueError(f"{target.label} is no {saved.model_type}, as {checkpoint.source} is")
    if checkpoint and target.base and str(weights) not in NO_PATH:
        _refuse_another_model(target, saved, checkpoint.source)
    config = configure(target, saved, eva, layer_types)
    if checkpoint and isinstance(checkpoint.tensors, AdapterTensors):
        refuse_other_attention(config, saved, checkpoint.source)
    if layer_types is None:
        say_default_placement(target, config)
    with torch.device("meta"):
        model = build(config, impl)
    model.hf_config = hf_config
    wanted = _dtype(dtype, device, model, checkpoint)
    if checkpoint is None:
        fill_random(model, device, wanted)
        model.weights_source = "random weights"
    else:
        source = checkpoint.source
        untrained = fill(model, checkpoint.tensors, saved.layer_types, device, wanted, source)
        if untrained:
            say_untrained(target, len(untrained))
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


def _random_preset(target: Target) -> dict[str, object]:
    if target.base is None:
        raise ValueError(
            f"weights='random' needs a registered name, not {target.label!r}; see `zoo list`"
        )
    return base_preset(target)


def _refuse_another_model(target: Target, saved: ModelConfig, source: str) -> None:
    """Weights given for a name must be of its size: the same family is not enough."""
    published = read_config(base_preset(target))
    for size in ("hidden_size", "num_hidden_layers", "vocab_size"):
        wanted, found = getattr(published, size), getattr(saved, size)
        if wanted != found:
            raise ValueError(f"{target.label} has {size} {wanted}, but {source} has {found}")


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {device!r}; try 'cpu' or 'cuda'") from None
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers; try 'cpu'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but this torch sees no GPU")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # how depends on the kind of device
        raise ValueError(f"this torch cannot use device {str(device)!r}; try 'cpu'") from None
    return device


def _dtype(
    dtype: str | torch.dtype | None,
    device: torch.device,
    model: CausalLM,
    checkpoint: Checkpoint | None,
) -> torch.dtype:
    if dtype is None:
        if device.type == "cpu" or checkpoint is None:
            return torch.float32
        # Of the parameters only: old checkpoints hold masks and such beside them. An adapter is
        # of float32, whatever its base is.
        tensors = checkpoint.tensors
        tensors = tensors.base if isinstance(tensors, AdapterTensors) else tensors
        names = {model.hf_name(name) for name, _ in model.named_parameters()}
        dtypes = {tensors.dtype(name) for name in names.intersection(tensors.keys())}
        mixed = torch.float32 in dtypes or not dtypes
        return torch.float32 if mixed else min(dtypes, key=str)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(
            f"dtype must be one of float32, bfloat16, float16, float64, not {dtype!r}"
        )
    return found
