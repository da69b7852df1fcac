"""Shared fixtures: small folders in the layouts of neurite-oasis 2D and of Lung250M-4B, and small trained runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from pairdiff_core.data import lung_frame, phantom_brains
from pairdiff_core.data.oasis import find_oasis
from pairdiff_core.errors import DataError

SUBJECTS = 5
SLICES = ("S00", "S02")


def write_slice(path: Path, values: np.ndarray, spacing: tuple[float, float, float] = (2.0, 2.0, 1.0)) -> None:
    """One slice (H, W) as the data set stores it: (H, W, 1), in any number type that NIfTI has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values[:, :, None], np.eye(4))
    image.header.set_zooms(spacing)
    nib.save(image, path)


def write_table(path: Path, table: tuple[tuple[str, tuple[int, int, int]], ...]) -> None:
    lines = [f"{label} {name} {r} {g} {b} 0" for label, (name, (r, g, b)) in enumerate(table)]
    path.write_text("\n".join(lines) + "\n")


def write_oasis_folder(folder: Path, subjects: int = SUBJECTS, slices: tuple[str, ...] = SLICES) -> Path:
    """Phantoms of 80 x 96 voxels in the neurite-oasis layout, which stores the left side last.

    Each slice ``s`` of a subject is a different phantom; names are BRAIN_01_S00 and so on.
    """
    folder.mkdir(parents=True)
    write_table(folder / "seg4_labels.txt", phantom_brains.TISSUES)
    write_table(folder / "seg24_labels.txt", phantom_brains.STRUCTURES)
    names = [f"BRAIN_{subject + 1:02d}_{where}" for subject in range(subjects) for where in slices]
    people = phantom_brains.brain_subjects(len(names), spatial=(80, 96), num_labels=25, seed=7)
    tissue = torch.tensor(phantom_brains.TISSUE_OF_STRUCTURE, dtype=torch.uint8)
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
    """A small folder in the neurite-oasis layout, 5 subjects with 2 slices each; a test may damage it."""
    return Path(shutil.copytree(_oasis_original, tmp_path / "slices"))


@pytest.fixture
def best_oasis_folder(_oasis_original: Path) -> Path:
    """The real slices if the environment names them, otherwise the small folder; tests must not change it."""
    try:
        return find_oasis()
    except DataError:
        return _oasis_original


LUNG_SHAPES = {  # small, so that they fit into the middle of the common frame; all sizes differ
    "dilated_vessels_10": {"case_032": (40, 31, 36), "case_035": (20, 22, 300), "case_036": (33, 30, 41)},
    "dilated_vessels_ts": {
        "case_002": (36, 30, 34),
        "case_054": (38, 35, 40),
        "case_104": (30, 36, 38),
        "case_114": (35, 32, 37),
    },
}


def write_vessels(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine), path)


def write_lung_folder(folder: Path) -> Path:
    """Two crossing vessels, labelled 1 and 2, in each of three training, three validation and one test case.

    The moving image is the fixed one, shifted by two voxels along axis 2. Landmarks: the crossing in all held-out
    cases, and twenty points around it in the training case 036. Case 114 has a header of another orientation.
    """
    generator = torch.Generator().manual_seed(0)
    fixed, moving = [], []
    for name, shapes in LUNG_SHAPES.items():
        for case, shape in shapes.items():
            values = np.zeros(shape, np.uint8)
            middle = np.array(shape) // 2
            values[4:-4, middle[1], middle[2] - 1 : middle[2] + 2] = 1
            values[middle[0], 4:-4, middle[2] - 1 : middle[2] + 2] = 2
            affine = np.eye(4) if case == "case_114" else None
            write_vessels(folder / name / f"{case}_1.nii.gz", values, affine)
            write_vessels(folder / name / f"{case}_2.nii.gz", np.roll(values, 2, axis=2), affine)
            crossing = torch.from_numpy(middle).float()
            if name == "dilated_vessels_ts":
                framed = crossing + torch.tensor(lung_frame.frame_offset(shape))
                fixed.append(framed[None])
                moving.append(framed[None] + torch.tensor([0.0, 0.0, 2.0]))
            elif case == "case_036":
                points = crossing + torch.randint(-3, 4, (20, 3), generator=generator)
                rows = torch.cat([points, points + torch.tensor([0.0, 0.0, 2.0])], 1).tolist()
                (folder / "corrfieldTr").mkdir()
                lines = [",".join(f"{number:.3f}" for number in row) for row in rows]
                (folder / "corrfieldTr" / "case_036.csv").write_text("\n".join(lines) + "\n")
    torch.save([fixed, moving], folder / "lms_validation_cropped.pth")
    return folder


@pytest.fixture(scope="session")
def _lung_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lung_folder(tmp_path_factory.mktemp("lungs") / "lung250m")


@pytest.fixture
def lung_folder(_lung_original: Path, tmp_path: Path) -> Path:
    """A small folder in the published layout of the lung vessels; a test may damage it."""
    return Path(shutil.copytree(_lung_original, tmp_path / "lung250m"))


@pytest.fixture
def no_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the project's environment variables for one test."""
    for variable in ("PAIRDIFF_OASIS2D", "PAIRDIFF_DATA", "PAIRDIFF_PROFILE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The small run after all its stages, and their results: (Run, StageResults). Tests must not change it."""
    from small_run import small_run  # here, because most test files do not need the pipeline

    from pairdiff_core import pipeline

    run = small_run(tmp_path_factory.mktemp("trained"))
    return run, pipeline.run_stages(run)


@pytest.fixture(scope="session")
def measured(trained: tuple) -> dict:
    """The measurements of that run."""
    from pairdiff_core import pipeline

    return pipeline.measure(*trained)


@pytest.fixture(scope="session")
def images_made(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A small run after all stages of images, and their results: (Run, ImageStageResults). Tests must not change it."""
    from small_run import small_image_run

    from pairdiff_core import pipeline

    run = small_image_run(tmp_path_factory.mktemp("images"))
    return run, pipeline.run_image_stages(run)


@pytest.fixture(scope="session")
def trained_3d(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The small run on phantom lungs with one registration network, "synthetic": (Run, Trained); read only."""
    from small_run import small_run_3d

    from pairdiff_core import pipeline

    run = small_run_3d(tmp_path_factory.mktemp("trained_3d"))
    return run, pipeline.train_registration(run, run.train, "synthetic")
