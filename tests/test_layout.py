"""Who may import whom: tools -> zoo -> {layers, recipes}, layers -> flasheva -> torch."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "tools": {"zoo", "layers", "recipes", "flasheva"},
    "zoo": {"layers", "recipes", "flasheva"},
    "layers": {"flasheva"},
    "recipes": set(),
    "flasheva": set(),
}
PACKAGES = tuple(MAY_IMPORT)

# Imports every module of the package argv[1] but flasheva.triton, with triton not to be found.
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules["triton"] = None

def visit(name):
    module = importlib.import_module(name)
    for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if child.name != "__main__" and f"{name}.{child.name}" != "flasheva.triton":
            visit(f"{name}.{child.name}")

visit(sys.argv[1])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


class Import(NamedTuple):
    """One import statement; `deferred` when it runs in a function only."""

    module: str
    line: int
    deferred: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports(source: str) -> Iterator[Import]:
    """Every import in a source: statements at any depth, and import_module of a literal."""
    yield from _visit(ast.parse(source), deferred=False)


def _visit(node: ast.AST, *, deferred: bool) -> Iterator[Import]:
    match node:
        case ast.Import(names=names):
            for alias in names:
                yield Import(alias.name, node.lineno, deferred)
        case ast.ImportFrom(module=str(module), level=0):
            yield Import(module, node.lineno, deferred)
        case ast.Call(
            func=ast.Name(id=called) | ast.Attribute(attr=called),
            args=[ast.Constant(value=str(module)), *_],
        ) if called in ("import_module", "__import__"):
            yield Import(module, node.lineno, deferred)
    deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _visit(child, deferred=deferred)


def imports_of(package: str) -> Iterator[tuple[str, Import]]:
    """Every import in the files of a package, with "file:line"."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no Python file in {package}/"
    for file in files:
        if file.parent.name == "remote_code":  # data: what exported folders run, see zoo/export
            continue
        for found in imports(file.read_text(encoding="utf-8")):
            yield f"{file.relative_to(ROOT)}:{found.line}", found


OPTIONAL = "tools/evaluation/harness/"


def declared(*, extras: bool) -> set[str]:
    """The import names of the distributions that pyproject.toml requires."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required: list[str] = list(project["dependencies"])
    if extras:
        required += [name for extra in project["optional-dependencies"].values() for name in extra]
    return {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in required}


def test_the_scan_sees_every_kind_of_import() -> None:
    source = """
import a.b, c as d
from e.f import g
from . import same_package
if x:
    import h
class K:
    import i
def f():
    import j
    importlib.import_module("k.l")
lazy = lambda: __import__("m")
"""
    assert [(found.module, found.deferred) for found in imports(source)] == [
        ("a.b", False),
        ("c", False),
        ("e.f", False),
        ("h", False),
        ("i", False),
        ("j", True),
        ("k.l", True),
        ("m", True),
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_upwards(package: str) -> None:
    forbidden = {*PACKAGES, "tests"} - MAY_IMPORT[package] - {package}
    assert [
        f"{where}: {package} may not import {found.module}"
        for where, found in imports_of(package)
        if found.package in forbidden
    ] == []


def test_recipes_needs_the_standard_library_only() -> None:
    assert [
        f"{where}: {found.module}"
        for where, found in imports_of("recipes")
        if found.package not in sys.stdlib_module_names | {"recipes"}
    ] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_required(package: str) -> None:
    # An import in a function may come from an extra, and so may those of a folder that only
    # functions import from; one at the top of another file may not.
    ours = sys.stdlib_module_names | set(PACKAGES) | {"triton"}
    assert [
        f"{where}: pyproject.toml does not require {found.package}"
        for where, found in imports_of(package)
        if found.package
        not in ours | declared(extras=found.deferred or where.startswith(OPTIONAL))
    ] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_triton_is_imported_in_its_own_folder_or_in_a_function(package: str) -> None:
    assert [
        where
        for where, found in imports_of(package)
        if found.package == "triton"
        and not found.deferred
        and not where.startswith("flasheva/triton/")
    ] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_without_triton_and_without_a_gpu(package: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert loaded & set(PACKAGES) <= MAY_IMPORT[package] | {package}
    if package == "recipes":
        assert not loaded & {"torch", "numpy"}


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = "bash tests/run"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"exec {command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_has_no_placeholder():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"^@\w+@$|TODO|TBD", text, re.MULTILINE)
