"""What several test files need: a small folder of brain slices in the neurite-oasis layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from pairdiff_core.data import phantom
from pairdiff_core.data.oasis import find_oasis
from pairdiff_core.pairs import DataError

SUBJECTS = 5
SLICES = ("S00", "S02")


def write_slice(
    path: Path, values: np.ndarray, spacing: tuple[float, float, float] = (2.0, 2.0, 1.0)
) -> None:
    """One slice (H, W) as the data set stores it: (H, W, 1), in any number type that NIfTI has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values[:, :, None], np.eye(4))
    image.header.set_zooms(spacing)
    nib.save(image, path)


def write_table(path: Path, table: tuple[tuple[str, tuple[int, int, int]], ...]) -> None:
    lines = [f"{label} {name} {r} {g} {b} 0" for label, (name, (r, g, b)) in enumerate(table)]
    path.write_text("\n".join(lines) + "\n")


def write_oasis_folder(folder: Path, subjects: int = SUBJECTS, slices: tuple[str, ...] = SLICES) -> Path:
    """Phantoms of 80 x 96 voxels in the neurite-oasis layout; like the original it stores left last.

    Slice ``s`` of a subject is a phantom of its own; names are BRAIN_01_S00 and so on.
    """
    folder.mkdir(parents=True)
    write_table(folder / "seg4_labels.txt", phantom.TISSUES)
    write_table(folder / "seg24_labels.txt", phantom.STRUCTURES)
    names = [f"BRAIN_{subject + 1:02d}_{where}" for subject in range(subjects) for where in slices]
    people = phantom.brain_subjects(len(names), spatial=(80, 96), num_labels=25, seed=7)
    tissue = torch.tensor(phantom.TISSUE_OF_STRUCTURE, dtype=torch.uint8)
    for name, labels in zip(names, people.labels.flip(1), strict=True):
        write_slice(folder / name / "slice_seg24.nii.gz", labels.numpy())
        write_slice(folder / name / "slice_seg4.nii.gz", tissue[labels.long()].numpy())
    (folder / "subjects.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture(scope="session")
def _oasis_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_oasis_folder(tmp_path_factory.mktemp("oasis") / "slices")


@pytest.fixture
def oasis_folder(_oasis_original: Path, tmp_path: Path) -> Path:
    """A small folder in the neurite-oasis layout, 5 subjects with 2 slices each; a test may spoil it."""
    return Path(shutil.copytree(_oasis_original, tmp_path / "slices"))


@pytest.fixture
def best_oasis_folder(_oasis_original: Path) -> Path:
    """The real slices where the environment names them, else the small folder; not to be changed."""
    try:
        return find_oasis()
    except DataError:
        return _oasis_original


@pytest.fixture
def no_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the environment variables of the project away for one test."""
    for variable in ("PAIRDIFF_OASIS2D", "PAIRDIFF_DATA", "PAIRDIFF_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
