"""Imports: the core and the other two packages import from lower layers only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pairdiff_core

ROOT = Path(pairdiff_core.__file__).parent.parent
LAYERS = (
    {"__init__", "errors", "fields"},
    {"motion", "pairs", "profiles", "storage"},
    {"metrics", "training"},
    {"vqae", "absorbing", "images", "registration", "augmentation", "data", "pairdiff_figures"},
    {"pipeline"},
    {"pairdiff_cli"},
    {"__main__"},
)
METHOD = {"fields", "motion", "pairs", "profiles", "vqae", "absorbing", "registration", "augmentation", "metrics"}
METHOD |= {"images"}
LAYER = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
PACKAGES = ("pairdiff_core", "pairdiff_figures", "pairdiff_cli")
FILES = {
    path.relative_to(ROOT).with_suffix("").parts: path for name in PACKAGES for path in (ROOT / name).rglob("*.py")
}


def package_of(module: tuple[str, ...]) -> str:
    """The file or folder of the core, or the other package, that a module belongs to."""
    return module[1] if module[0] == "pairdiff_core" else module[0]


def imported(path: Path) -> set[tuple[str, ...]]:
    """The modules of these packages that a file imports anywhere, such as ("pairdiff_core", "storage", "files")."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            start = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {module_of(tuple(name.split("."))) for name in names if name.split(".")[0] in PACKAGES}
    return found


def module_of(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The longest part of a dotted name that is a module."""
    for end in range(len(parts), 0, -1):
        for module in (parts[:end], (*parts[:end], "__init__")):
            if module in FILES:
                return module
    raise AssertionError("unreachable: each package has an __init__")


IMPORTS = {module: imported(path) for module, path in FILES.items()}


def test_every_package_has_a_layer():
    assert {package_of(module) for module in FILES} == set(LAYER)


@pytest.mark.parametrize("package", sorted(LAYER))
def test_imports_point_to_lower_layers_or_stay_in_their_package(package):
    wrong = {
        f"{'.'.join(module)} imports {'.'.join(target)}"
        for module, targets in IMPORTS.items()
        for target in targets
        if package_of(module) == package != package_of(target) and LAYER[package_of(target)] >= LAYER[package]
    }
    assert not wrong


def test_the_method_does_not_depend_on_files():
    """The method can be used in other projects without run folders, pipeline and figures."""
    wrong = {(module, target) for module in FILES if package_of(module) in METHOD for target in IMPORTS[module]
             if package_of(target) in {"storage", "pipeline", "pairdiff_cli", "pairdiff_figures"}}  # fmt: skip
    assert not wrong


def test_no_import_cycles():
    """This includes modules of the same folder."""
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"a cycle: {[*open_[open_.index(module) :], module]}"
        if module not in done:
            open_.append(module)
            for target in IMPORTS[module]:
                visit(target)
            done.add(open_.pop())

    for module in IMPORTS:
        visit(module)


def test_each_module_has_a_docstring():
    assert all((path.parent / "__init__.py").exists() for path in FILES.values())
    silent = [path.name for path in FILES.values() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_slow_imports_are_deferred():
    """So that a finished run, `pairdiff info` and wrong data get a quick answer."""
    code = "import sys, pairdiff_core.pipeline; print({'monai', 'lightning_fabric', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
