"""Small sets of label maps that nobody prepared, drawn on the fly: abdominal organs, slices, thick-slice volumes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np


def draw(random: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, ...], organs: int) -> np.ndarray:
    """Ellipsoids, uint8 of this shape, with the labels 1 to ``organs``, each at about the same place in every image."""
    size = np.multiply(shape, spacing)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * np.array(spacing)  # (*shape, D), mm
    usual, labels = np.random.default_rng(0), np.zeros(shape, np.uint8)
    for organ in range(1, organs + 1):
        centre = size * usual.uniform(0.25, 0.75, len(shape)) + random.normal(0, 0.03 * size)
        radius = size * usual.uniform(0.08, 0.16, len(shape)) * np.exp(random.normal(0, 0.1))
        labels[(((places - centre) / radius) ** 2).sum(-1) < 1] = organ
    return labels


def write_folders(
    folder: Path,
    shapes: list[tuple[int, ...]],
    spacing: tuple[float, ...],
    values: list[int],
    axes: str = "RAS",
    seed: int = 0,
) -> tuple[Path, Path]:
    """The folders ``fixed`` and ``moving`` with a pair for each shape; organ k has the label ``values[k - 1]``."""
    random, table = np.random.default_rng(seed), np.array([0, *values])
    affine = np.diag([*spacing, *[1.0] * (4 - len(spacing))])
    affine[:3, :3] *= np.array([-1 if code in "LPI" else 1 for code in axes])
    for number, shape in enumerate(shapes):
        for role in ("fixed", "moving"):
            (folder / role).mkdir(parents=True, exist_ok=True)
            labels = table[draw(random, shape, spacing, len(values))].astype(np.int16)
            labels = labels.reshape((*labels.shape, 1)[:3])
            nib.save(nib.Nifti1Image(labels, affine), folder / role / f"person{number}.nii.gz")
    return folder / "fixed", folder / "moving"


def organs(folder: Path) -> tuple[Path, Path]:
    """Six pairs of volumes of 6 mm with eleven organs, whose labels have gaps and exceed 255, on different grids."""
    shapes = [(32, 22 + person % 2, 19) for person in range(6)]
    return write_folders(folder, shapes, (6.0, 6.0, 6.0), [*range(1, 10), 17, 1001])


def slices(folder: Path) -> tuple[Path, Path]:
    """Six pairs of slices of 71 x 53 pixels, three structures."""
    return write_folders(folder, [(71, 53)] * 6, (1.5, 1.5), [10, 20, 30])


def thick_slices(folder: Path) -> tuple[Path, Path]:
    """Six pairs of volumes of 1 x 1 x 5 mm and 10 to 12 slices, four structures, axes to the left and to the back."""
    shapes = [(38, 30, 10 + person % 3) for person in range(6)]
    return write_folders(folder, shapes, (1.0, 1.0, 5.0), [1, 2, 3, 4], axes="LPS")


KINDS = {"organs": organs, "slices": slices, "thick_slices": thick_slices}
