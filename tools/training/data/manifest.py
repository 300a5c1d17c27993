"""manifest.json: what a folder of shards was made of, with what, and what it holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from tools.training.data.sources import Input, identify
from tools.training.data.tokenizers import end_id, fingerprint, pad_id
from zoo import Tokenizer
from zoo.weights.atomic import write_text

MANIFEST_FILE = "manifest.json"
SCHEMA = 1


class TokenizerEntry(TypedDict):
    """The tokenizer, and what stands round every document.

    Attributes:
        add_bos: as `Tokenizer.encode` takes it.
        end_id: behind every document, or None.
        pad_id: what rows may be filled with.
    """

    fingerprint: str
    vocab_size: int
    add_bos: bool | None
    end_id: int | None
    pad_id: int


class ShardEntry(TypedDict):
    """One file of tokens, `<name>.tokens`."""

    name: str
    documents: int
    tokens: int


class SourceEntry(TypedDict):
    """One source; counts and shards once they are known."""

    name: str
    inputs: list[Input]
    documents: NotRequired[int]
    tokens: NotRequired[int]
    shards: NotRequired[list[ShardEntry]]


class Manifest(TypedDict):
    """See the attributes.

    Attributes:
        schema: of this file; another one is refused.
        complete: whether all shards are there.
        dtype: of the tokens, uint16 if the vocabulary fits.
        reading: how documents were cut: field, marker, characters of a shard, shares to keep.
    """

    schema: int
    complete: bool
    dtype: str
    tokenizer: TokenizerEntry
    reading: Mapping[str, str | float | None]
    sources: list[SourceEntry]


def plan(
    named: Mapping[str, list[str]],
    tokenizer: Tokenizer,
    *,
    reading: Mapping[str, str | float | None],
    add_bos: bool | None,
    end: str,
) -> Manifest:
    """The manifest of a folder that is to be made; reads every file once, for its checksum.

    Raises:
        OSError: a file cannot be read.
        ValueError: a data set cannot be had, or the tokenizer has no such bos or end.
    """
    tokenizer.encode("", add_bos=add_bos)  # refuses a bos that it does not have
    return Manifest(
        schema=SCHEMA,
        complete=False,
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        tokenizer=TokenizerEntry(
            fingerprint=fingerprint(tokenizer),
            vocab_size=tokenizer.vocab_size,
            add_bos=add_bos,
            end_id=end_id(tokenizer, end),
            pad_id=pad_id(tokenizer),
        ),
        reading=reading,
        sources=[
            SourceEntry(name=name, inputs=[identify(source) for source in inputs])
            for name, inputs in named.items()
        ],
    )


def begin(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest in the folder if it is of the same plan; writes `wanted` to an empty folder.

    Raises:
        ValueError: the folder is of another plan, or holds something else.
    """
    if not (folder / MANIFEST_FILE).exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(
                f"will not write to {folder}, which has files but no {MANIFEST_FILE}; name a new "
                "folder"
            )
        write_manifest(folder, wanted)
        return wanted
    found = read_manifest(folder)
    if found["tokenizer"] != wanted["tokenizer"] or found["dtype"] != wanted["dtype"]:
        raise ValueError(
            f"{folder} was made with another tokenizer, or another bos or end of documents; name "
            "a new folder"
        )
    if found["reading"] != wanted["reading"]:
        raise ValueError(f"{folder} was made with {_shown(found['reading'])}; name a new folder")
    if _inputs(found) != _inputs(wanted):
        raise ValueError(f"{folder} was made from {_differing(found, wanted)}; name a new folder")
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ValueError: none, a broken one, or one of another version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of tokens: it has no {MANIFEST_FILE}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not valid JSON") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not of version {SCHEMA}; tokenise into a new folder")
    missing = Manifest.__required_keys__ - found.keys()
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}")
    return cast(Manifest, found)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the manifest of a folder in one step."""
    write_text(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")


def _inputs(manifest: Manifest) -> list[tuple[str, list[Input]]]:
    return [(source["name"], source["inputs"]) for source in manifest["sources"]]


def _differing(found: Manifest, wanted: Manifest) -> str:
    """The first input of the folder that is not what is given now."""
    given = {(s["name"], i["name"]): i for s in wanted["sources"] for i in s["inputs"]}
    for source in found["sources"]:
        for entry in source["inputs"]:
            now = given.pop((source["name"], entry["name"]), None)
            if now is None:
                return f"{entry['name']} (source {source['name']}), which is not given"
            if now != entry:
                return f"another {entry['name']} ({entry['size']:,} bytes, now {now['size']:,})"
    more = ", ".join(name for _, name in given)
    return f"other files: {more} is new" if more else "the same files in another order"


def _shown(reading: Mapping[str, str | float | None]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in reading.items())
