"""Every package that the product imports is declared in pyproject.toml, in the right place."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = {
    "agent": (),
    "analysis": ("load",),
    "examples/image_server": ("load", "demo"),
    "exporters": (),
    "loadgen": ("load",),
    "middleware": (),
    "src/stagescope": (),
    "src/stagescope/cli": ("load", "demo"),
    "src/stagescope/load_run": ("load",),
    "src/stagescope/runfolder": ("load",),
}
"""What may be installed beside the dependencies of all where a folder's code runs."""
EXEMPT = {
    "middleware/hooks": "a hook is loaded after the framework, which is the served app's own",
    "middleware/bootstrap": "it calls the sitecustomize that it stands before",
    "examples/image_server/make_model.py": "run by hand, to make the file that is in the wheel",
}
NOT_IMPORTED = {
    "packaging": "Ibis's DuckDB back end imports it",
    "py-spy": "a program that the agent starts",
    "pyarrow-hotfix": "Ibis's DuckDB back end imports it",
    "stagescope": "the extra `demo` needs the extra `load`",
}
"""Declared packages that no module of ours imports, and why they are there."""
DISTRIBUTIONS = packages_distributions()


def declared(*extras: str) -> set[str]:
    """Return the distributions that are declared for all, and for *extras*."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][each] for each in extras)]
    return {canonical(re.split(r"[^\w.-]", line)[0]) for one in lists for line in one}


def canonical(name: str) -> str:
    """Return a distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def modules(folder: str) -> Iterator[Path]:
    """Yield the modules of *folder*; those of a folder inside it that has its own line left out."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        inside = max((one for one in EXTRAS if name.startswith(f"{one}/")), key=len)
        if inside == folder and not any(name.startswith(one) for one in EXEMPT):
            yield path


def imported(path: Path) -> set[str]:
    """Return the top names of what *path* imports, at its head or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    tops = {name.partition(".")[0] for name in names}
    return tops - sys.stdlib_module_names - {"stagescope"}


@pytest.mark.parametrize("folder", EXTRAS)
def test_what_is_imported_is_declared(folder: str) -> None:
    """A package that only another one brings goes when that one stops bringing it."""
    known = declared(*EXTRAS[folder])
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules(folder)
        for name in sorted(imported(path))
        if known.isdisjoint(map(canonical, DISTRIBUTIONS.get(name, [])))
    ]
    assert not missing, "undeclared in pyproject.toml, or in another extra only"


def test_what_is_declared_is_imported() -> None:
    """Nothing is installed that nobody needs."""
    used = {name for folder in EXTRAS for path in modules(folder) for name in imported(path)}
    wanted = {canonical(one) for name in used for one in DISTRIBUTIONS.get(name, [])}
    assert declared("load", "demo") <= wanted | NOT_IMPORTED.keys()
