"""Pairs of label volumes from files, and displacement fields and warped labels back into files.

What is read is checked before anything is computed; what is written appears whole or not at all.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from pairdiff_core.checkpoints import write_file
from pairdiff_core.data.nifti import read_label_image
from pairdiff_core.fields import to_itk, to_learn2reg, warp_labels
from pairdiff_core.pairs import DataError

SUFFIXES = (".nii.gz", ".nii")
MAX_LABELS = 256  # more values than that are intensities, not labels
SAME_PLACE = 0.01  # voxels by which the corners of two grids may lie apart
FORMATS = ("itk", "l2r")


@dataclass(frozen=True, eq=False)
class VolumePair:
    """A fixed and a moving label volume on one grid, as their files have them.

    Attributes:
        labels: uint8 (2, *spatial): index into ``values`` of the fixed and of the moving image. An axis of one voxel
            is left out, so that a slice has two spatial axes.
        values: (C,), the label values of both images, sorted.
        spacing: millimetres between voxel centres along each spatial axis.
        shape: of the files, (X, Y, Z), or (X, Y) of a plain slice.
        affine: (4, 4) voxel-to-world matrix of the common grid, mm, RAS.
        moving_dtype: number type of the moving image.
        paths: of the fixed and the moving file.
    """

    labels: torch.Tensor
    values: np.ndarray
    spacing: tuple[float, ...]
    shape: tuple[int, ...]
    affine: np.ndarray
    moving_dtype: np.dtype
    paths: tuple[Path, Path]

    @property
    def spatial(self) -> tuple[int, ...]:
        """Size of the common grid in voxels, 2 or 3 numbers."""
        return tuple(self.labels.shape[1:])

    @property
    def slice_axis(self) -> int | None:
        """The axis of one voxel that was left out; None for a volume."""
        return _slice_axis(self.shape)


def _slice_axis(shape: Sequence[int]) -> int | None:
    if len(shape) == 2:
        return 2
    single = [axis for axis, size in enumerate(shape) if size == 1]
    return single[0] if len(single) == 1 else None  # of two such axes none is more the slice's than the other


# ----------------------------------------------------------------------------------------------- reading


def read_pair(fixed: str | Path, moving: str | Path) -> VolumePair:
    """Two label volumes on one grid; a file of one slice gives two spatial axes.

    Raises:
        DataError: if a file is missing, damaged, no NIfTI, or no label volume with something in it; or if the two lie
            on different grids. The message names the file.
    """
    paths = (Path(fixed), Path(moving))
    (fixed_values, image), (moving_values, other) = (_read_volume(path) for path in paths)
    if fixed_values.shape != moving_values.shape:
        raise DataError(
            f"{paths[1]} has shape {moving_values.shape}, but {paths[0]} has {fixed_values.shape}. The two images of "
            "a pair lie on one grid: resample one of them by nearest neighbour."
        )
    apart = _corners_apart(image, other)
    if apart > SAME_PLACE:
        raise DataError(
            f"{paths[1]} lies elsewhere than {paths[0]}: by their headers, corners of the two grids are up to "
            f"{apart:.3g} voxels apart. Resample one onto the other's grid by nearest neighbour."
        )
    values = np.union1d(np.unique(fixed_values), np.unique(moving_values))
    _check_values(values, paths)
    labels = np.stack(
        [np.searchsorted(values, part).astype(np.uint8) for part in (fixed_values, moving_values)]
    )
    spacing, axis = np.linalg.norm(image.affine[:3, :3], axis=0), _slice_axis(fixed_values.shape)
    if axis is not None:
        spacing = np.delete(spacing, axis)
        labels = labels.squeeze(axis + 1) if labels.ndim == 4 else labels
    return VolumePair(
        torch.from_numpy(labels),
        values,
        tuple(spacing.tolist()),
        fixed_values.shape,
        image.affine,
        moving_values.dtype,
        paths,
    )


def _read_volume(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Label values (X, Y, Z), or (X, Y) of a plain slice, that are not all 0, and the image for its affine."""
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file. Give a NIfTI file, .nii or .nii.gz.")
    values, image = read_label_image(path)
    shape = values.shape
    while values.ndim > 3 and values.shape[-1] == 1:  # some programs write (X, Y, Z, 1)
        values = values[..., 0]
    if values.ndim not in (2, 3) or not values.size:
        raise DataError(
            f"{path} has shape {shape}; expected one volume (X, Y, Z) or slice. Take one time point of it."
        )
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine)) < 1e-12:
        raise DataError(
            f"{path} has an affine that places no voxels: {image.affine.tolist()}. Export it again."
        )
    if not values.any():
        raise DataError(f"{path} is empty: all its voxels are 0. Give a segmentation with something in it.")
    return values, image


def _corners_apart(image: nib.Nifti1Image, other: nib.Nifti1Image) -> float:
    """The largest distance between where two affines put the corners of the grid, in voxels of the first."""
    last = [size - 1 for size in (*image.shape, 1, 1)[:3]]
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*last, 1]  # (8, 4)
    there = np.linalg.inv(image.affine) @ (other.affine - image.affine) @ corners.T  # (4, 8)
    return float(np.linalg.norm(there[:3], axis=0).max()) if np.isfinite(there).all() else np.inf


def _check_values(values: np.ndarray, paths: tuple[Path, Path]) -> None:
    both = f"{paths[0]} and {paths[1]}"
    if len(values) > MAX_LABELS:
        raise DataError(
            f"{both} hold {len(values)} different values, at most {MAX_LABELS} are labels: these are intensity images. "
            "Give segmentations."
        )
    if len(values) == 1:
        raise DataError(f"{both} hold nothing but the value {values[0]}: there is nothing to register by.")


# --------------------------------------------------------------------------------------------- grid sizes


def pad_to(labels: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """Labels (..., *old) with zeros behind the last voxel of each axis, up to a grid (..., *spatial) at least as large.

    Voxels keep their indices, so that a displacement on the padded grid holds for the old one: see :func:`crop_to`.
    """
    old = labels.shape[labels.dim() - len(spatial) :]
    pads = [(0, new - was) for was, new in zip(old, spatial, strict=True)]
    return F.pad(labels, [pad for axis in reversed(pads) for pad in axis])  # the last axis comes first


def crop_to(field: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """What :func:`pad_to` added, taken off again: (..., *padded) to (..., *spatial)."""
    return field[(..., *(slice(size) for size in spatial))]


# ----------------------------------------------------------------------------------------------- writing


def check_writable(path: str | Path) -> None:
    """Find out before a long computation whether a file can be written; nothing that is there changes.

    Raises:
        DataError: if the folder is missing or takes no file, or ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder. Give the name of a file to write.")
    if not path.parent.is_dir():
        raise DataError(f"{path} cannot be written: there is no folder {path.parent}. Make it first.")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}). Is the folder read-only?") from error


def write_nifti(path: str | Path, values: np.ndarray, affine: np.ndarray, intent: str = "none") -> None:
    """Write values (X, Y, Z, ...) with their voxel-to-world matrix (4, 4), mm, RAS; compressed for ``.nii.gz``.

    Raises:
        CheckpointError: if it cannot be written; an older file then is still there.
    """
    image = nib.Nifti1Image(values, affine, dtype=values.dtype)  # named, else nibabel refuses 64-bit integers
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    if not np.allclose(image.get_qform(), affine, atol=1e-3):  # sheared: a qform cannot say so
        image.set_qform(None, code="unknown")
    content = image.to_bytes()
    write_file(Path(path), gzip.compress(content, 1, mtime=0) if str(path).endswith(".gz") else content)


def write_field(path: str | Path, pair: VolumePair, displacement: torch.Tensor, form: str = "itk") -> None:
    """Write a displacement (D, *spatial), in voxels of the pair's grid, fixed to moving.

    Args:
        form: "itk", float32 (X, Y, Z, 1, 3) with the intent "vector": millimetres along LPS axes, which ITK, SimpleITK
            and ANTs read as a displacement field; "l2r", float32 (X, Y, Z, 3) in voxels along the array's axes, as in
            Learn2Reg. A slice gets an axis of one voxel and a third component 0; SimpleITK reads the field
            of an (X, Y, 1) as flat, until ``sitk.JoinSeries(field)`` and ``CopyInformation(fixed)``.

    Raises:
        CheckpointError: as :func:`write_nifti`.
        ValueError: for another ``form``.
    """
    if form not in FORMATS:
        raise ValueError(f"there is no format {form!r}; take one of {', '.join(FORMATS)}")
    axis = pair.slice_axis
    if axis is not None:  # (2, *spatial) -> (3, X, Y, Z)
        first, second = displacement
        still = torch.zeros_like(first)
        displacement = torch.stack([*(first, second)[:axis], still, *(first, second)[axis:]]).unsqueeze(
            axis + 1
        )
    if form == "itk":
        vectors = to_itk(displacement, pair.affine).astype(np.float32)[:, :, :, None]  # (X, Y, Z, 1, 3)
        write_nifti(path, vectors, pair.affine, "vector")
    else:
        write_nifti(path, to_learn2reg(displacement), pair.affine)


def warp_moving(pair: VolumePair, displacement: torch.Tensor) -> np.ndarray:
    """The moving image at x + u(x), by nearest neighbour: its own label values and number type, (X, Y, Z).

    Args:
        displacement: u, float (D, *spatial), voxels.
    """
    warped = warp_labels(pair.labels[1:], displacement[None])[0]
    return pair.values[warped.numpy()].astype(pair.moving_dtype).reshape(pair.shape)
