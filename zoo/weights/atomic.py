"""Files and folders that appear whole or not at all.

`replacing_folder` and `write_text` write under a temporary sibling name and rename, so whoever is
killed half-way leaves the previous file or folder as it was.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, replacing a previous file in one step."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        fresh.write_text(text, encoding="utf-8", newline="\n")
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(target: Path, *, owned: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty sibling folder, which takes the place of `target` when the block succeeds.

    Entries of the previous folder whose names are not `owned` move over into the new one. If
    the block raises, `target` stays as it was. Only a kill between two renames can leave the
    previous folder under the name that `set_aside` finds.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    run = uuid.uuid4().hex[:8]
    fresh = target.with_name(f".{target.name}.{run}.new")
    aside = target.with_name(f".{target.name}.{run}.old")
    fresh.mkdir()
    try:
        yield fresh
        _flush(fresh)
        if target.exists():
            os.rename(target, aside)
        os.rename(fresh, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if aside.exists():
        for entry in sorted(aside.iterdir()):
            if not owned(entry.name) and not (target / entry.name).exists():
                os.rename(entry, target / entry.name)
        shutil.rmtree(aside, ignore_errors=True)


def set_aside(target: Path) -> list[Path]:
    """Previous versions of a missing `target` that a killed `replacing_folder` left behind."""
    target = target.resolve()
    if target.exists() or not target.parent.is_dir():
        return []
    pattern = f".{target.name}."
    names = (p for p in target.parent.iterdir() if p.name.startswith(pattern))
    return sorted(path for path in names if path.suffix == ".old" and path.is_dir())


def _flush(folder: Path) -> None:
    """Ask the disk to hold the new files before the old ones go, for the sake of power cuts."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
