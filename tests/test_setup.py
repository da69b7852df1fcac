"""The three files that list what is installed agree, and name everything that the code imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["dev"]]]
# The names under which a package is imported, where they differ from its own.
IMPORTED_AS = {"antspyx": "ants", "ipython": "IPython", "pillow": "PIL", "pyyaml": "yaml", "simpleitk": "SimpleITK"}


def pins(lines: list[str]) -> dict[str, Version]:
    """Return the version of each `name==version` line."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{line} is no exact version"
        found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


@cache
def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return pins([line for line in lines if line and not line.startswith("#")])


@cache
def conda() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def conda_pip_lines() -> list[str]:
    (section,) = (entry["pip"] for entry in conda()["dependencies"] if isinstance(entry, dict))
    return section


def needed(direct: list[Requirement] = DIRECT) -> dict[str, Version]:
    """Return every installed package that is needed here, directly or through another one."""
    found: dict[str, Version] = {}
    seen: set[str] = set()
    waiting = [*direct]
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            pytest.fail(f"{requirement} is not installed: run `make setup`")
        found[canonicalize_name(requirement.name)] = Version(package.version)
        extras = requirement.extras or {""}
        for text in package.requires or []:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)
    return found


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_pinned_version_is_one_that_pyproject_admits(requirement: Requirement) -> None:
    pinned = constraints().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"constraints.txt has no {requirement.name}"
    assert pinned in requirement.specifier


def test_conda_lists_the_direct_dependencies_at_the_pinned_versions() -> None:
    lines = [line for line in conda_pip_lines() if not line.startswith("-")]
    direct = {canonicalize_name(requirement.name) for requirement in DIRECT}
    assert pins(lines) == {name: constraints()[name] for name in direct}


def test_conda_installs_this_project_and_keeps_to_the_constraints() -> None:
    assert {"-c constraints.txt", "-e ."} <= set(conda_pip_lines())


with_pins = pytest.mark.skipif(
    not (Path(sys.prefix) / ".installed").exists(),  # `make setup` leaves this file, unless CONSTRAINTS is empty
    reason="made without the pins: newer versions, and what they need in addition, say nothing about this project",
)


@with_pins
def test_everything_that_is_needed_is_pinned() -> None:
    # libraries for graphics cards come with the build of PyTorch that each machine takes
    cards = {name for name in needed() if name.startswith(("nvidia-", "cuda-", "triton"))}
    unpinned = set(needed()) - set(constraints()) - cards
    assert not unpinned, f"add to constraints.txt: {sorted(unpinned)}"


@with_pins
def test_what_is_installed_is_what_is_pinned() -> None:
    """The tests run with the versions that the book promises, except for build labels."""
    wrong = {
        name: (str(here), str(constraints()[name]))
        for name, here in needed().items()
        if name in constraints() and here.public != constraints()[name].public
    }
    assert not wrong, f"installed and pinned versions differ: {wrong}"


@pytest.mark.parametrize("constraints", ["constraints.txt", ""])
def test_set_up_marks_exactly_the_environments_with_pins(constraints: str) -> None:
    command = ["make", "--dry-run", "--always-make", "setup", f"CONSTRAINTS={constraints}", "VENV=here"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ("touch here/.installed" in said) == ("-c constraints.txt" in said) == bool(constraints)


def test_the_checks_run_with_pins_whatever_the_caller_has_set() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    unset = next(line for line in lines if line.startswith("unset "))
    assert "CONSTRAINTS" in unset.split() and lines.index(unset) < lines.index("make setup")


def test_python_versions_agree() -> None:
    (conda_python,) = (e for e in conda()["dependencies"] if isinstance(e, str) and e.startswith("python="))
    assert conda_python == "python=3.11"
    assert Version("3.11.99") in Requirement(f"python{PROJECT['requires-python']}").specifier  # conda takes the latest
    assert "python3.11" in (ROOT / "Makefile").read_text()


def test_torch_is_pinned_without_a_build_label() -> None:
    """A label such as +cpu would keep a GPU workstation from taking its own build."""
    assert constraints()["torch"] == Version("2.13.0")
    assert Version("2.6") in next(r for r in DIRECT if r.name == "torch").specifier


def test_no_file_names_a_package_index() -> None:
    """The source of packages is a setting of the machine."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "environment.yml", ".ci/run"):
        assert not re.search(r"index-url|find-links|trusted-host", (ROOT / name).read_text()), name


def imported_names(folder: str) -> dict[str, str]:
    """Return the top-level names that the Python files in `folder` import, and one file that does."""
    names = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            names.update({module.split(".")[0]: str(path.relative_to(ROOT)) for module in modules})
    return names


PACKAGES = ("pairdiff_core", "pairdiff_cli", "pairdiff_figures")


@pytest.mark.parametrize(
    ("folder", "dependencies"),
    [
        *((package, PROJECT["dependencies"]) for package in PACKAGES),
        ("benchmarks", [*PROJECT["dependencies"], *EXTRAS["peers"]]),
        ("tests", [*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["dev"]]),
    ],
)
def test_imports_are_declared(folder: str, dependencies: list[str]) -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in dependencies}
    modules = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in declared}
    local = {*PACKAGES, "benchmarks", "models", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    undeclared = {
        name: where
        for name, where in imported_names(folder).items()
        if name not in sys.stdlib_module_names | modules | local
    }
    assert not undeclared, f"imported but not in pyproject.toml: {undeclared}"


@pytest.mark.parametrize(
    "target", ["help", "setup", "book", "test", "lab", "sync", "format", "clean", "results", "bench"]
)
def test_make_knows_its_commands(target: str) -> None:
    """`make help` lists each command that the documentation names."""
    listed = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert re.search(rf"make {target}\s", listed.stdout)


def test_the_licence_is_stated_alike_everywhere() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"


def test_the_version_is_stated_alike_everywhere() -> None:
    from pairdiff_core import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
