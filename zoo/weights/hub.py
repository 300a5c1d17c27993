"""The Hugging Face hub through its own client: safetensors only, checksums verified.

`cached` looks without a network; `fetch` downloads what `read_folder` of checkpoint.py needs into
the client's cache, where other tools find it too. Progress bars, retries, tokens and the
environment variables HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are the client's own.
"""

import glob
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import (
    HfApi,
    ResolvedRevision,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoSibling

from zoo.weights.weight_files import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    no_safetensors,
    read_index,
)

log = logging.getLogger("zoo")

# Files beside config.json and the weights that a checkpoint is read from.
_TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# The client builds on httpx or httpx2, by version; whichever it is, this is its HTTPError.
_HTTP_ERROR = cast("type[Exception]", HfHubHTTPError.__bases__[0])


class HubError(ValueError):
    """Why a repository cannot be read, and what would help, in one line."""


def cached(repo_id: str, revision: str | None = None) -> Path | None:
    """The folder of a complete snapshot in the client's cache, or None; never uses a network.

    Args:
        repo_id: "org/name".
        revision: branch, tag or commit; None is "main".
    """
    try:
        config = try_to_load_from_cache(repo_id, CONFIG_FILE, revision=revision)
    except HFValidationError:
        raise _bad_name(repo_id) from None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if (folder / WEIGHTS_FILE).is_file():
        return folder
    if not (folder / INDEX_FILE).is_file():
        return None
    shards = set(read_index(folder / INDEX_FILE).values())
    return folder if all((folder / shard).is_file() for shard in shards) else None


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """Download what is missing of a snapshot and return its folder.

    config.json comes last, when everything else has its right checksum: `cached` never takes a
    snapshot that was interrupted before that for a complete one.

    Args:
        repo_id: "org/name".
        revision: branch, tag or commit; None is "main".

    Raises:
        HubError: in one line, an unreachable hub, an unknown or gated repository, an unknown
            revision, missing files, no safetensors, a wrong checksum.
    """
    with one_line(repo_id, revision):
        api = HfApi()
        commit = api.resolve_revision(repo_id, revision=revision)
        info = api.model_info(repo_id, revision=commit.resolved, files_metadata=True)
        listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        weights = _weights(repo_id, commit, listed)
        files = [*weights, *(name for name in _TEXT_FILES if name in listed)]
        folder = Path(
            snapshot_download(
                repo_id, revision=commit, allow_patterns=[glob.escape(name) for name in files]
            )
        )
        _verify(repo_id, folder, [listed[name] for name in files])
        hf_hub_download(repo_id, CONFIG_FILE, revision=commit.resolved)
        _verify(repo_id, folder, [listed[CONFIG_FILE]])
    return folder


def _weights(
    repo_id: str, commit: ResolvedRevision, listed: Mapping[str, RepoSibling]
) -> list[str]:
    """Names of the weight files, the index included; downloads the index to know its shards."""
    where = f"{repo_id} at {commit}"
    if WEIGHTS_FILE in listed:
        names = [WEIGHTS_FILE]
    elif INDEX_FILE in listed:
        index = Path(hf_hub_download(repo_id, INDEX_FILE, revision=commit.resolved))
        _verify(repo_id, index.parent, [listed[INDEX_FILE]])
        shards = sorted(set(read_index(index).values()))
        missing = [shard for shard in shards if shard not in listed]
        if missing:
            raise HubError(f"{where} lacks {', '.join(missing)}, which its {INDEX_FILE} names")
        names = [INDEX_FILE, *shards]
    else:
        raise HubError(no_safetensors(where, listed))
    if CONFIG_FILE not in listed:
        raise HubError(f"{where} is not a model for transformers: it has no {CONFIG_FILE}")
    return names


def _verify(repo_id: str, folder: Path, files: list[RepoSibling]) -> None:
    """Compare with the hub's checksums; a wrong file is removed from the cache.

    Not `HfApi.verify_repo_checksums`: it hashes every file of the snapshot, also gigabytes that
    another tool put there, and would have to run again for config.json.
    """
    log.debug("verifying %d files of %s", len(files), repo_id)
    wrong = [file.rfilename for file in files if not _is_right(folder / file.rfilename, file)]
    for name in wrong:
        _remove(folder / name)
    if wrong:
        raise HubError(
            f"{repo_id}: {', '.join(wrong)} came with a wrong checksum and was removed from the "
            "cache; run the same command again to download it anew"
        )


def _is_right(path: Path, file: RepoSibling) -> bool:
    with path.open("rb") as stream:
        if file.lfs is not None:
            return hashlib.file_digest(stream, "sha256").hexdigest() == file.lfs.sha256
        content = stream.read()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return file.blob_id in (None, git.hexdigest())


def _remove(path: Path) -> None:
    """Remove a file of a snapshot, and the blob that its links lead to."""
    while True:
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target


@contextmanager
def one_line(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the client's errors into a HubError that says what to do."""
    page = f"{constants.ENDPOINT}/{repo_id}"
    try:
        yield
    except HubError:
        raise
    except HFValidationError:
        raise _bad_name(repo_id) from None
    except GatedRepoError:
        raise HubError(
            f"{repo_id} is gated: accept its licence at {page}, then run `hf auth login` here"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"there is no {page}: check the name, or run `hf auth login` if it is private"
        ) from None
    except RevisionNotFoundError:
        raise HubError(
            f"{repo_id} has no revision {revision!r}; those it has are listed at {page}/tree/main"
        ) from None
    except RemoteEntryNotFoundError as error:
        raise HubError(
            f"{repo_id} lists a file that the hub lacks: {error.response.url}"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise HubError(f"the hub answered {status} for {page}; try again later") from None
    except (OSError, RevisionResolutionError, _HTTP_ERROR) as error:
        raise HubError(_unreachable(repo_id, revision, error)) from None
    except ValueError as error:  # an index that is not JSON
        raise HubError(f"{repo_id}: {error}") from None


def _unreachable(repo_id: str, revision: str | None, error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        reason, remedy = "HF_HUB_OFFLINE is set", "unset it"
    else:
        reason, remedy = " ".join(str(error).split()), "try again"
    command = f"hf download {repo_id}" + (f" --revision {revision}" if revision else "")
    return (
        f"{repo_id} is not complete in the Hugging Face cache and downloading failed ({reason}); "
        f"{remedy}, or run `{command}` on a machine with a network and copy its cache to "
        f"{constants.HF_HUB_CACHE}, or pass a local folder"
    )


def _bad_name(repo_id: str) -> HubError:
    return HubError(f"{repo_id!r} is no name of a repository, expected org/name")
