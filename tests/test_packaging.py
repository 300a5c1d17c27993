"""The wheel and the sdist: what is inside, and that each runs where no checkout is."""

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"zoo", "flasheva", "layers", "recipes", "tools"}
HYBRID = "smollm2-135m-instruct-eva-hybrid"

WHERE = f"""
import flasheva, layers, recipes, tools, zoo
assert recipes.find_recipe({HYBRID!r}) is not None
for package in (flasheva, layers, recipes, tools, zoo):
    print(package.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command that must succeed, without a package index and without the checkout."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**env, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


def only(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


def wheel_names(dist: Path) -> set[str]:
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        return set(wheel.namelist())


def sdist_names(dist: Path) -> set[str]:
    """The files of the sdist, relative to its one folder."""
    with tarfile.open(only(dist, "*.tar.gz")) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


def metadata(dist: Path) -> Message:
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def sources(*suffixes: str) -> set[str]:
    """The files of our packages in the checkout, as names relative to it."""
    return {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in suffixes
    }


def test_the_wheel_holds_the_packages_and_nothing_else(dist: Path) -> None:
    names = wheel_names(dist)
    (info,) = {name.partition("/")[0] for name in names} - PACKAGES
    assert info.endswith(".dist-info")
    assert sources(".py", ".toml") == {name for name in names if name.endswith((".py", ".toml"))}
    assert f"recipes/{HYBRID}.toml" in names
    assert "zoo/embedded/README.md" in names  # data, as the adapters beside it
    assert {"zoo/embedded/tiny/model.safetensors", "zoo/embedded/tiny/tokenizer.json"} <= names
    for name in (HYBRID, "tiny-eva", "tiny-eva-hybrid"):
        assert f"zoo/embedded/{name}/adapter.safetensors" in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert not [name for name in names if "test" in name or "__pycache__" in name]


def test_the_metadata_says_what_is_needed(dist: Path) -> None:
    fields = metadata(dist)
    assert (fields["Name"], fields["Version"]) == ("flasheva-zoo", "0.1.0")
    assert fields["Requires-Python"] == ">=3.11"
    assert (fields["License-Expression"], fields["License-File"]) == ("Apache-2.0", "LICENSE")
    assert fields.get_all("Provides-Extra") == ["eval", "plot", "test", "train"]
    required = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert "torch<2.14,>=2.11" in required
    assert not [line for line in required if line.startswith("triton")]


def test_the_sdist_can_be_built_and_tested(dist: Path) -> None:
    names = sdist_names(dist)
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/run", ".ci/run"} <= names
    assert sources(".py", ".toml") <= names
    tests = [file for suffix in ("py", "xz") for file in (ROOT / "tests").rglob(f"*.{suffix}")]
    assert {str(file.relative_to(ROOT)) for file in tests} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("*.whl", id="wheel"),
        pytest.param("*.tar.gz", id="sdist", marks=pytest.mark.slow),
    ],
)
def test_it_runs_in_a_clean_environment(dist: Path, tmp_path: Path, pattern: str) -> None:
    clean, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(clean, symlinks=True)
    paths = {"base": str(clean), "platbase": str(clean)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    bin_folder = Path(sysconfig.get_path("scripts", "venv", vars=paths))
    # What we depend on, torch above all, comes from here. A path in a .pth file runs no .pth
    # files of its own, so an editable install of the checkout stays out of sight.
    host = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "host.pth").write_text("\n".join(sorted(host)))

    python = bin_folder / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    file = only(dist, pattern)
    run(*pip, "install", "--no-deps", "--no-build-isolation", file, cwd=elsewhere)

    locations = run(python, "-c", WHERE, cwd=elsewhere).split()
    assert {Path(file).parents[1] for file in locations} == {site}
    assert HYBRID in run(bin_folder / "zoo", "list", cwd=elsewhere)
    assert HYBRID in run(python, "-m", "tools.list", cwd=elsewhere)
    assert not list(elsewhere.iterdir())
