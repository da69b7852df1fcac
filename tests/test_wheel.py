"""The wheel: what is in it, what it says of itself, and that its command works without the packages of the book."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import nibabel as nib
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_setup import PACKAGES, PROJECT, ROOT, needed

from pairdiff_core import __version__

PIP = (sys.executable, "-m", "pip")
# Written as sitecustomize.py, which Python imports when it starts.
WITHOUT = """
import sys
from importlib.machinery import PathFinder


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names} else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def tracked() -> list[str]:
    """Return the files that git knows, less those that are deleted."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout, so a clean copy cannot be made")
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from a copy that holds what git knows and nothing else."""
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml asks; without the pins it may be older
    copy, made = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("made")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    subprocess.run([*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", made, "."], cwd=copy, check=True)
    (path,) = made.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; what the core does not depend on cannot be imported there."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "-q", "--no-deps", "--no-index", "--target", folder, wheel], check=True)
    allowed = {"pairdiff", *needed([Requirement(text) for text in PROJECT["dependencies"]])}
    owners = {name: set(map(canonicalize_name, names)) for name, names in packages_distributions().items()}
    absent = sorted(name for name, packages in owners.items() if not packages & allowed)
    (folder / "sitecustomize.py").write_text(WITHOUT.format(names=set(absent)))
    return folder


def run(installed: Path, tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run Python with the installed wheel, in a folder where nothing of the checkout is."""
    variables = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PAIRDIFF_")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, env=kept | variables, capture_output=True, text=True)


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if f"pairdiff-{__version__}.dist-info/" not in name}
    assert names == {name for name in tracked() if name.split("/")[0] in PACKAGES}


def test_the_wheel_says_of_itself_what_the_project_says(wheel: Path) -> None:
    """`test_setup` compares the version with CITATION.cff and CHANGELOG.md."""
    with ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"pairdiff-{__version__}.dist-info/METADATA").decode())
        assert f"pairdiff-{__version__}.dist-info/licenses/LICENSE" in archive.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("pairdiff", __version__)
    assert metadata["License-Expression"] == PROJECT["license"]
    assert metadata["Summary"] == PROJECT["description"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    required = {Requirement(text) for text in metadata.get_all("Requires-Dist") if "extra ==" not in text}
    assert required == set(map(Requirement, PROJECT["dependencies"]))
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()


@pytest.mark.parametrize("name", ["jupytext", "jupyter_book", "nbclient", "pytest", "hypothesis", "playwright"])
def test_the_installed_wheel_is_tried_without_the_packages_of_the_book(installed: Path, name: str) -> None:
    assert f"'{name}'" in (installed / "sitecustomize.py").read_text()


def test_the_installed_command_registers_without_the_packages_of_the_book(installed: Path, tmp_path: Path) -> None:
    without = run(installed, tmp_path, "-c", "import pytest")
    assert "No module named 'pytest'" in without.stderr
    for shift, name in enumerate(["fixed.nii", "moving.nii"]):
        values = np.zeros((24, 20, 1), np.uint8)
        values[8 + 2 * shift : 16 + 2 * shift, 6:14] = 1
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / name)
    shown = run(installed, tmp_path, "-m", "pairdiff_core", "--help")
    assert shown.returncode == 0 and "register" in shown.stdout, shown.stderr
    command = ("register", "fixed.nii", "moving.nii", "--out", "field.nii", "--steps", "15")
    done = run(installed, tmp_path, installed / "bin" / "pairdiff", *command)
    assert done.returncode == 0 and "Dice" in done.stdout, done.stderr
    assert abs(np.asarray(nib.load(tmp_path / "field.nii").dataobj)).max() > 1


def test_the_installed_command_says_where_pretrained_models_are(installed: Path, tmp_path: Path) -> None:
    command = ("run", "synthesis", "--model", "oasis2d-laptop", "--pairs", "1", "--to", "pairs")
    done = run(installed, tmp_path, "-m", "pairdiff_core", *command)
    assert done.returncode == 1
    assert "download the project's folder models and set PAIRDIFF_MODELS to it" in done.stderr
    assert done.stderr.count("\n") == 1
