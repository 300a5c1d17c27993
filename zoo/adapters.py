"""save_adapter: from a fine-tuned model to a small folder that `zoo.load` reads over its base.

EVA parameters, norms and biases are kept whole. A matrix that did not change is left to the base;
one that did is kept as its LoRA factors, or by what differs from the base's (weights/encoding.py).
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from zoo.causal_lm import CausalLM
from zoo.families import build
from zoo.opening import base_target, embedded_adapter
from zoo.target import resolve
from zoo.weights.adapter import AdapterConfig, checksum, write_adapter
from zoo.weights.encoding import (
    Encoded,
    Encoding,
    Factors,
    encode_difference,
    encode_factors,
    encode_whole,
)


def save_adapter(
    model: CausalLM,
    folder: str | Path,
    *,
    base: CausalLM,
    base_name: str,
    encode: str | Encoding | None = None,
    factors: Mapping[str, Factors] | None = None,
) -> None:
    """Writes what `model` has that `base` has not; an interrupted save destroys nothing.

    Args:
        model: of the base's family and sizes, in any dtype.
        folder: new, or of a previous adapter.
        base: as `zoo.load(base_name, dtype="float32")` gives it.
        base_name: a registered name, a local folder or .gguf file, or "org/name" on the hub.
        encode: of matrices that changed: "whole", "low_rank:RANK", "low_rank:RANK:STORED"
            (float32, bfloat16, float16, int8 or int4; float16 if left out), "int8" or "int4";
            None: there are none.
        factors: LoRA's, by the name of the weight; kept exactly where the weight itself is the
            base's.

    Raises:
        ValueError: one line: models that do not belong together, a matrix that changed although
            `encode` is None, or a folder that holds something else.
    """
    folder = Path(folder)
    if isinstance(encode, str):
        encode = Encoding.parse(encode)
    base_name = _stored_name(base_name, folder)
    encoded = encode_model(model, base, encode, factors or {})
    config = AdapterConfig(
        base=base_name,
        base_source=base.weights_source,
        base_checksums={
            base.hf_name(name): checksum(parameter)
            for name, parameter in base.named_parameters()
            if not _is_eva(name)
        },
        layer_types=model.config.layer_types,
        eva=model.config.eva,
        tensors={name: each.entry for name, each in encoded.items()},
    )
    base_target(folder, config)
    write_adapter(folder, config, encoded)


def encode_model(
    model: CausalLM,
    base: CausalLM,
    encode: Encoding | None,
    factors: Mapping[str, Factors],
) -> dict[str, Encoded]:
    """What an adapter keeps, by published name; arguments and errors as `save_adapter`."""
    _check_models(model, base)
    tensors, of_base = _parameters(model, factors), dict(base.named_parameters())
    encoded: dict[str, Encoded] = {}
    for name, tensor in tensors.items():
        lora, tensor = factors.get(name), tensor.detach().cpu()
        has_old = name in of_base and not _is_eva(name)
        old = of_base[name].detach().cpu() if has_old else None
        same = old is not None and torch.equal(tensor, old.to(tensor.dtype))
        try:
            if lora is not None and same:
                kept = encode_factors(_on_cpu(lora))
            elif same:
                continue
            elif old is None or tensor.ndim == 1:
                kept = encode_whole(tensor)
            elif encode is None:
                raise ValueError(
                    "it is a matrix that changed; say how to keep it, such as "
                    "encode='low_rank:16', or save the whole model with zoo.save"
                )
            else:
                kept = encode_difference(_merged(tensor, lora), old, encode)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        encoded[model.hf_name(name)] = kept
    return encoded


def changed_matrices(model: CausalLM, base: CausalLM) -> list[str]:
    """The names of the parameters that `encode` decides about."""
    of_base = dict(base.named_parameters())
    return [
        name
        for name, tensor in model.named_parameters()
        if tensor.ndim > 1
        and name in of_base  # not LoRA's
        and not _is_eva(name)
        and not torch.equal(tensor.detach(), of_base[name].detach().to(tensor))
    ]


def _check_models(model: CausalLM, base: CausalLM) -> None:
    if base.embed_tokens.weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the base must be loaded in float32, not {base.embed_tokens.weight.dtype}, or its "
            "checksums are those of rounded weights"
        )
    ours, theirs = model.config, base.config
    assert dataclasses.is_dataclass(theirs) and not isinstance(theirs, type)
    if ours != dataclasses.replace(theirs, layer_types=ours.layer_types, eva=ours.eva):
        raise ValueError(
            f"the model is no fine-tuned {base.weights_source}: their configurations differ in "
            "more than attention"
        )


def _parameters(model: CausalLM, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The model's parameters without LoRA's own, which must be those of `factors`."""
    with torch.device("meta"):
        names = [name for name, _ in build(model.config, "auto").named_parameters()]
    found = dict(model.named_parameters())
    for name in found.keys() - set(names):
        if name.rpartition(".")[0] + ".weight" not in factors:
            raise ValueError(
                f"{name} is no parameter of the model; merge LoRA's, or give them as factors"
            )
    unknown = factors.keys() - set(names)
    if unknown:
        raise ValueError(f"factors: the model has no parameter {min(unknown)}")
    return {name: found[name] for name in names}


def _merged(weight: Tensor, lora: Factors | None) -> Tensor:
    if lora is None:
        return weight
    lora = _on_cpu(lora)
    return weight.to(torch.promote_types(weight.dtype, lora.a.dtype)) + lora.scale * (
        lora.b @ lora.a
    )


def _on_cpu(lora: Factors) -> Factors:
    return Factors(a=lora.a.detach().cpu(), b=lora.b.detach().cpu(), scale=lora.scale)


def _is_eva(name: str) -> bool:
    return ".attend." in name


def _stored_name(base_name: str, folder: Path) -> str:
    """What adapter_config.json says: a relative path is relative to the adapter's folder.

    Raises:
        ValueError: the base is no model that can be loaded without an adapter.
    """
    target = resolve(base_name)
    if Path(base_name).suffix == ".toml":
        raise ValueError(f"the base must be a model, not the recipe {base_name}")
    if target.base is not None:
        if embedded_adapter(base_name) is not None:
            raise ValueError(f"{base_name!r} has an adapter itself; the base is {target.base!r}")
        return target.base
    if target.path is None or target.path.is_absolute() or base_name.startswith("~"):
        return base_name
    beside = Path(os.path.relpath(target.path.resolve(), folder.resolve())).as_posix()
    return beside if beside.startswith(".") else f"./{beside}"
