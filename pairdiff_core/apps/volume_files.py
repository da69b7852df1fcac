"""Pairs of label volumes from NIfTI files, and displacement fields and warped labels back into files.

What is read is checked before anything is computed; what is written appears whole or not at all.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from pairdiff_core.data.nifti import read_label_image
from pairdiff_core.errors import DataError
from pairdiff_core.fields import to_itk, to_learn2reg, warp_labels
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Profile
from pairdiff_core.storage import write_file

SUFFIXES = (".nii.gz", ".nii")
MAX_LABELS = 256  # more values than that are intensities, not labels
SAME_GRID = 0.01  # voxels by which the corners of two grids may lie apart


@dataclass(frozen=True, eq=False)
class VolumePair:
    """A fixed and a moving label volume on one grid, as their files have them; a slice has two spatial axes."""

    labels: torch.Tensor  # uint8 (2, *spatial): index into values of the fixed and of the moving image
    values: np.ndarray  # (C,), the label values of both images, sorted
    spacing: tuple[float, ...]  # millimetres between voxel centres along each spatial axis
    shape: tuple[int, ...]  # of the files, (X, Y, Z), or (X, Y) of a plain slice
    affine: np.ndarray  # (4, 4) voxel-to-world matrix of the common grid, mm, RAS
    moving_dtype: np.dtype
    paths: tuple[Path, Path]

    def pairs(self, profile: Profile | None = None) -> PairSet:
        """A set of this one pair, with labels from 0 to C - 1.

        Args:
            profile: that a network was trained at, whose labels are taken: a network of two labels, such as that of
                the vessels, takes all above 0 for the structure, as in its data. None: indices into ``values``.

        Raises:
            DataError: if the profile has other axes, or not all of the labels.
        """
        table, dims = np.arange(len(self.values)), self.labels.dim() - 1
        if profile is not None:
            if dims != profile.spatial_dims:
                knows = f"the network knows images with {profile.spatial_dims}"
                raise DataError(f"{self.paths[0]} has {dims} axes, but {knows}. Choose another run, or none.")
            last = profile.num_labels - 1
            known = self.values >= 0 if last == 1 else np.isin(self.values, np.arange(last + 1))
            for label in np.flatnonzero(~known)[:1]:
                path = self.paths[0] if (self.labels[0] == label).any() else self.paths[1]
                raise DataError(
                    f"{path} holds the label {self.values[label]:g}, but the network knows "
                    f"{'0 and above' if last == 1 else f'0 to {last}'}. Change the labels, or choose no run."
                )
            table = np.minimum(self.values, last)
        names = map(str, range(profile.num_labels if profile else len(table)))
        labels = torch.from_numpy(table.astype(np.uint8))[self.labels.long()]
        return PairSet(labels[None], tuple(names), self.spacing, ("~".join(path.name for path in self.paths),))

    def warped_moving(self, displacement: torch.Tensor) -> np.ndarray:
        """The moving image, with its own values and number type, at x + u(x), u float (D, *spatial) in voxels."""
        warped = warp_labels(self.labels[1:], displacement[None])
        return self.values[warped.numpy()].astype(self.moving_dtype).reshape(self.shape)


def _slice_axis(shape: Sequence[int]) -> int | None:
    """The axis of one voxel that makes a volume a slice; None for a volume."""
    if len(shape) == 2:
        return 2
    single = [axis for axis, size in enumerate(shape) if size == 1]
    return single[0] if len(single) == 1 else None  # of two such axes, neither is the slice's


def read_pair(fixed: str | Path, moving: str | Path) -> VolumePair:
    """Two label volumes on one grid; in a slice, the axis of one voxel is left out.

    Raises:
        DataError: if a file is missing, damaged, no NIfTI, or no label volume with something in it; or if the two lie
            on different grids. The message names the file.
    """
    paths = (Path(fixed), Path(moving))
    (fixed_values, image), (moving_values, other) = (_read_volume(path) for path in paths)
    shape = fixed_values.shape
    if shape != moving_values.shape:
        raise DataError(
            f"{paths[1]} has shape {moving_values.shape}, but {paths[0]} has {shape}. The two images of a pair lie on "
            "one grid: resample one of them by nearest neighbour."
        )
    apart = _corners_apart(image, other)
    if apart > SAME_GRID:
        raise DataError(
            f"{paths[1]} lies elsewhere than {paths[0]}: by their headers, corners of the two grids are up to "
            f"{apart:.3g} voxels apart. Resample one onto the other's grid by nearest neighbour."
        )
    values, both = np.union1d(np.unique(fixed_values), np.unique(moving_values)), f"{paths[0]} and {paths[1]} hold"
    if len(values) > MAX_LABELS:
        raise DataError(
            f"{both} {len(values)} different values, more than the {MAX_LABELS} that labels may have: these are "
            "intensity images. Give segmentations."
        )
    if len(values) == 1:
        raise DataError(f"{both} only the value {values[0]}: there is nothing to register by.")
    labels = np.stack([np.searchsorted(values, part).astype(np.uint8) for part in (fixed_values, moving_values)])
    spacing, axis = nib.affines.voxel_sizes(image.affine), _slice_axis(shape)
    if axis is not None:
        spacing, labels = np.delete(spacing, axis), labels.reshape(2, *np.delete((*shape, 1)[:3], axis))
    dtype = moving_values.dtype
    return VolumePair(torch.from_numpy(labels), values, tuple(spacing.tolist()), shape, image.affine, dtype, paths)


def _read_volume(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Label values (X, Y, Z), or (X, Y) of a plain slice, that are not all 0, and the image for its affine."""
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file. Give a NIfTI file, .nii or .nii.gz.")
    values, image = read_label_image(path)
    shape = values.shape
    while values.ndim > 3 and values.shape[-1] == 1:  # some programs write (X, Y, Z, 1)
        values = values[..., 0]
    if values.ndim not in (2, 3) or not values.size:
        raise DataError(f"{path} has shape {shape}, not that of one volume (X, Y, Z) or slice. Take one time point.")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine)) < 1e-12:
        raise DataError(f"{path} has an affine without an inverse: {image.affine.tolist()}. Export it again.")
    if not values.any():
        raise DataError(f"{path} is empty: all its voxels are 0. Give a segmentation with something in it.")
    return values, image


def _corners_apart(image: nib.Nifti1Image, other: nib.Nifti1Image) -> float:
    """The largest distance between where two affines put the corners of the grid, in voxels of the first."""
    last = [size - 1 for size in (*image.shape, 1, 1)[:3]]
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*last, 1]  # (8, 4)
    apart = np.linalg.inv(image.affine) @ (other.affine - image.affine) @ corners.T  # (4, 8)
    return float(np.linalg.norm(apart[:3], axis=0).max()) if np.isfinite(apart).all() else np.inf


def write_nifti(path: str | Path, values: np.ndarray, affine: np.ndarray, intent: str = "none") -> None:
    """Write values (X, Y, Z, ...) with their voxel-to-world matrix (4, 4), mm, RAS; compressed for ``.nii.gz``.

    By nibabel, fields too: SimpleITK would rotate a sheared grid into a straight one and only warn.

    Raises:
        CheckpointError: if it cannot be written; an older file then is still there.
    """
    image = nib.Nifti1Image(values, affine, dtype=values.dtype)  # named, else nibabel refuses 64-bit integers
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    if not np.allclose(image.get_qform(), affine, atol=1e-3):  # sheared, which a qform cannot express
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
    """
    axis = _slice_axis(pair.shape)
    if axis is not None:  # (2, *spatial) -> (3, X, Y, Z)
        components = list(displacement)
        components.insert(axis, torch.zeros_like(components[0]))
        displacement = torch.stack(components).unsqueeze(axis + 1)
    if form == "itk":
        vectors = to_itk(displacement, pair.affine).astype(np.float32)[:, :, :, None]  # (X, Y, Z, 1, 3)
        write_nifti(path, vectors, pair.affine, "vector")
    else:
        write_nifti(path, to_learn2reg(displacement), pair.affine)
