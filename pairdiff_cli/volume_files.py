"""Read pairs of label volumes from files, and write displacement fields and warped labels.

Inputs are checked before anything is computed. Outputs are written completely or not at all.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from pairdiff_cli.grids import (
    LAID_FLAT,
    SAME_GRID,
    Grid,
    corners_apart,
    laid_flat,
    parallel,
    placed,
    same_place,
    sample,
)
from pairdiff_core.data.image_files import read_label_image
from pairdiff_core.errors import DataError
from pairdiff_core.fields import to_itk, to_learn2reg
from pairdiff_core.metrics import mean_dice
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Profile
from pairdiff_core.storage import write_file

MAX_LABELS = 256  # more values than that are intensities, not labels
LISTED = 8  # labels that a message lists at most
Reader = Callable[[Path], tuple[np.ndarray, nib.Nifti1Image]]


@dataclass(frozen=True, eq=False)
class VolumePair:
    """A fixed and a moving label volume on the grid of the fixed one; a slice has two spatial axes."""

    labels: torch.Tensor  # uint8 (2, *spatial): index into values of the fixed and of the moving image
    values: np.ndarray  # uint64 (C,), 0 and the label values of both images, sorted; 0 and 1 for two masks
    spacing: tuple[float, ...]  # millimetres between voxel centres along each spatial axis
    shape: tuple[int, ...]  # of the fixed file, (X, Y, Z), or (X, Y) of a plain slice
    grids: tuple[Grid, Grid]  # of the fixed and of the moving file
    to_moving: np.ndarray  # (4, 4), from voxels of the fixed to voxels of the moving file
    moving: np.ndarray  # uint8 (X, Y, Z), index into values, on the grid of the moving file
    moving_values: np.ndarray  # (C,), the moving file's value for each index, in its own number type
    paths: tuple[Path, Path]
    notes: tuple[str, ...]  # what a user should know about the files, one line each

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel-to-world matrix of the fixed file, mm, RAS, as nibabel reads it."""
        return self.grids[0].affine

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        """The axes of the fixed file along which there is more than one voxel, all three for a volume."""
        return tuple(axis for axis in range(3) if axis != _slice_axis(self.shape))

    def pairs(self, profile: Profile | None = None, label_values: Sequence[int] | None = None) -> PairSet:
        """A set of this one pair, with labels from 0 to C - 1.

        Args:
            profile: of a trained network, whose labels are used. For a network of two labels, such as that of the
                vessels, all values above 0 are the structure, as in its data. None takes indices into ``values``.
            label_values: the C values, ascending, that the files of its training had; None for 0 to C - 1.

        Raises:
            DataError: if the profile has another number of axes, or lacks a label.
        """
        table, dims = np.arange(len(self.values)), self.labels.dim() - 1
        if profile is not None:
            if dims != profile.spatial_dims:
                knows = f"the network was trained on images with {profile.spatial_dims}"
                raise DataError(f"{self.paths[0]} has {dims} axes, but {knows}. Choose another run, or none.")
            values, last = np.array(label_values or range(profile.num_labels), np.uint64), profile.num_labels - 1
            known = np.isin(self.values, values) | (last == 1)
            for label in np.flatnonzero(~known)[:1]:
                path = self.paths[0] if (self.labels[0] == label).any() else self.paths[1]
                trained_on = f"0 to {last}" if label_values in (None, (*range(last + 1),)) else _listed(values)
                raise DataError(
                    f"{path} holds the label {self.values[label]}, but the network was trained on {trained_on}. Change "
                    "the labels, or omit --run."
                )
            table = np.minimum(self.values, 1) if last == 1 else np.searchsorted(values, self.values)
        names = map(str, range(profile.num_labels if profile else len(table)))
        labels = torch.from_numpy(table.astype(np.uint8))[self.labels.long()]
        return PairSet(labels[None], tuple(names), self.spacing, ("~".join(path.name for path in self.paths),))

    def merged_by(self, profile: Profile) -> list[str]:
        """A note if a network that was trained at this profile merges several labels into one."""
        if profile.num_labels > 2 or len(self.values) <= 2:
            return []
        return [
            f"the network was trained on one structure, so it merges the labels {_listed(self.values[1:])}. Dice is "
            "still measured for each label. To register by all of them, omit --run."
        ]

    def in_volume(self, displacement: torch.Tensor) -> np.ndarray:
        """A displacement (D, *spatial) as float32 (3, X, Y, Z), with 0 across a slice."""
        axis = _slice_axis(self.shape)
        if axis is not None:
            components = list(displacement)
            components.insert(axis, torch.zeros_like(components[0]))
            displacement = torch.stack(components).unsqueeze(axis + 1)
        return displacement.cpu().numpy()

    def warped_moving(self, displacement: torch.Tensor) -> np.ndarray:
        """The warped moving image, with its own values and number type; the displacement is (D, *spatial), in voxels.

        It is sampled by nearest neighbour, and is 0 where x + u(x) lies outside the moving image, as in ITK.
        """
        return self.moving_values[self.warped_labels(displacement)].reshape(self.shape)

    def warped_labels(self, displacement: torch.Tensor) -> torch.Tensor:
        """As :meth:`warped_moving`, but as indices into ``values``, uint8 (*spatial)."""
        warped = sample(self.moving, self.in_volume(displacement), after=self.to_moving)
        return torch.from_numpy(warped).reshape(self.labels[1].shape)

    def judged(self, displacement: torch.Tensor) -> tuple[float, float, list[str]]:
        """Mean Dice over the labels of the files before and after warping as in :meth:`warped_moving`, and warnings."""
        after = self.warped_labels(displacement)
        images = (self.labels[1], after)
        scores = [float(mean_dice(image[None], self.labels[:1], len(self.values))) for image in images]
        warnings = []
        if not after.any():
            warnings.append("the warped image is empty: the field points outside the moving image everywhere.")
        elif round(scores[1], 3) < round(scores[0], 3):
            warnings.append(
                f"Dice fell from {scores[0]:.3f} to {scores[1]:.3f}: the images overlap better without this field. "
                "Use more --steps or no --run, or inspect the images."
            )
        if scores[0] == 0:
            warnings.append(
                "Dice started at 0: no structure overlaps its counterpart, and the field may shrink structures that it "
                "cannot move far enough. Align the images first."
            )
        return *scores, warnings


def _slice_axis(shape: Sequence[int]) -> int | None:
    """The axis of one voxel that makes a volume a slice; None for a volume."""
    if len(shape) == 2:
        return 2
    single = [axis for axis, size in enumerate(shape) if size == 1]
    return single[0] if len(single) == 1 else None  # with two such axes, it is not a slice


def _listed(values: Iterable[float]) -> str:
    values = [str(int(value)) for value in values]
    return ", ".join([*values[:LISTED], *(["..."] if len(values) > LISTED else [])])


def read_pair(fixed: str | Path, moving: str | Path, resample: bool = False, read: Reader | None = None) -> VolumePair:
    """Read two label volumes, the moving one on the grid of the fixed one, without the axis of one voxel in a slice.

    The axes of the moving image may have another order and direction.

    Args:
        resample: whether a moving image on another grid is resampled, by nearest neighbour.
        read: from a path to labels, integers (X, Y, Z) or (X, Y), and the image for its header; None for label images.

    Raises:
        DataError: if a file is missing, damaged, of an unknown format, empty or not a label volume; if the two are on
            different grids without ``resample``; or if they have no label in common. The message names the file.
    """
    paths = (Path(fixed), Path(moving))
    (fixed_labels, fixed_image), (moving_labels, moving_image) = ((read or _read_volume)(path) for path in paths)
    grids = (Grid.of(fixed_image, paths[0]), Grid.of(moving_image, paths[1]))
    notes = [note for grid, path in zip(grids, paths, strict=True) if (note := grid.note(path))]
    to_moving = same_place(*grids)
    if to_moving is None:
        if not resample:
            raise DataError(_differ(grids, paths))
        across = tuple(_slice_axis(grid.shape) for grid in grids)
        if None not in across and not parallel(grids[0].world, grids[1].world, across):
            raise DataError(f"{paths[1]} is a slice in a different plane from {paths[0]}. Give slices of one plane.")
        to_moving = np.linalg.inv(grids[1].world) @ grids[0].world
        notes.append(f"{paths[1]} was resampled onto the grid of {paths[0]} by nearest neighbour.")
    elif not np.allclose(to_moving, np.eye(4)):
        axes = ["".join(nib.aff2axcodes(grid.affine)) for grid in grids]
        notes.append(
            f"{paths[1]} was reoriented from axes {axes[1]} to {axes[0]}, those of {paths[0]} and of the outputs."
        )
    held = [np.unique(labels) for labels in (fixed_labels, moving_labels)]
    found = [own.astype(np.uint64) for own in held]  # the one type that holds all labels exactly
    values = np.union1d(np.zeros(1, np.uint64), np.union1d(*found))
    both = f"{paths[0]} and {paths[1]} hold"
    if len(values) > MAX_LABELS:
        raise DataError(
            f"{both} {len(values)} different values, more than the {MAX_LABELS} that labels may have: these are "
            "intensity images. Give segmentations."
        )
    own = [labels[labels > 0] for labels in found]
    moving_values = values.astype(moving_labels.dtype)
    if not np.intersect1d(*own).size:
        if max(map(len, own)) > 1:
            raise DataError(
                f"{both} no label in common: {_listed(own[0])} and {_listed(own[1])}. Give the same structure the "
                "same label in both."
            )
        notes.append(f"the masks {paths[0]} ({own[0][0]}) and {paths[1]} ({own[1][0]}): non-zero is taken as 1.")
        moving_values = np.array([0, own[1][0]], np.uint64).astype(moving_labels.dtype)
        values, found = np.arange(2, dtype=np.uint64), [labels > 0 for labels in found]
    if len(values) == 2 and all(map(np.all, found)):
        raise DataError(f"{both} only the value {own[0][0]}: there is nothing to align.")
    for path, one, other in zip(paths, own, reversed(own), strict=True):
        alone = np.setdiff1d(one, other)
        if alone.size and len(values) > 2:
            what = "labels" if len(alone) > 1 else "label"
            notes.append(f"{path} alone holds the {what} {_listed(alone)}, without a counterpart.")
    indices = [
        np.searchsorted(values, new).astype(np.uint8)[np.searchsorted(old, labels)]
        for new, old, labels in zip(found, held, (fixed_labels, moving_labels), strict=True)
    ]
    shape, axis = indices[0].shape, _slice_axis(indices[0].shape)
    volume = indices[1].reshape(grids[1].shape)
    same = np.array_equal(to_moving, np.eye(4)) and grids[0].shape == grids[1].shape
    moved = volume if same else sample(volume, _still(grids[0]), after=to_moving)
    if not moved.any():
        raise DataError(f"{paths[1]} has no structure in the field of view of {paths[0]}. Align the two first.")
    labels, spacing = np.stack([indices[0], moved.reshape(shape)]), nib.affines.voxel_sizes(grids[0].affine)
    if axis is not None:
        spacing, labels = np.delete(spacing, axis), labels.reshape(2, *np.delete(grids[0].shape, axis))
    spacing = tuple(spacing.tolist())
    return VolumePair(
        torch.from_numpy(labels), values, spacing, shape, grids, to_moving, volume, moving_values, paths, tuple(notes)
    )


def _still(grid: Grid) -> np.ndarray:
    """A zero displacement (3, X, Y, Z) on a grid, which takes no memory."""
    return np.broadcast_to(np.float32(0), (3, *grid.shape))


def _differ(grids: tuple[Grid, Grid], paths: tuple[Path, Path]) -> str:
    """A message about why two images are not on one grid, and what to do."""
    shapes = [" x ".join(map(str, grid.shape)) for grid in grids]
    if sorted(grids[0].shape) != sorted(grids[1].shape):
        differ = f"{paths[1]} has shape {shapes[1]}, but {paths[0]} has {shapes[0]}"
    else:
        apart = corners_apart(grids[0].affine, grids[1].affine, grids[0].shape)
        differ = (
            f"{paths[1]} is not at the same position as {paths[0]}: by their headers, corners of the two grids are up "
            f"to {apart:.3g} voxels apart"
        )
    return f"{differ}. Add --resample to resample it onto the grid of {paths[0]} by nearest neighbour."


def _read_volume(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Labels (X, Y, Z), or (X, Y) of a plain slice, not all 0 and none negative, and the image for its header."""
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file. Give an image file, such as .nii.gz.")
    values, image = read_label_image(path)
    values = one_volume(values, path)
    if values.min() < 0:
        negative = np.unique(values[values < 0])
        raise DataError(f"{path} holds negative labels: {_listed(negative)}. Renumber them above 0, the background.")
    if values.dtype.kind == "f" and values.max() >= 2.0**64:
        raise DataError(f"{path} holds the label {values.max():.9g}, too large for 64 bits. Give smaller labels.")
    if not values.any():
        raise DataError(f"{path} is empty: all its voxels are 0. Give a segmentation with something in it.")
    return values, image


def one_volume(values: np.ndarray, path: Path) -> np.ndarray:
    """Values as (X, Y, Z) or (X, Y), without the extra axes of one voxel that some programs write at the end.

    Raises:
        DataError: if there are several volumes, or none; the message names the file.
    """
    shape = values.shape
    if not values.size:
        raise DataError(f"{path} has shape {shape}: there are no voxels in it. Export it again.")
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim > 3:
        raise DataError(
            f"{path} has shape {shape}: {values[0, 0, 0].size} volumes. Save one of them as a file of its own."
        )
    if values.ndim < 2:
        raise DataError(f"{path} has shape {shape}: a row of voxels. Give a volume (X, Y, Z) or a slice (X, Y).")
    return values


def write_nifti(
    path: str | Path,
    values: np.ndarray,
    affine: np.ndarray,
    intent: str = "none",
    header: nib.Nifti1Header | None = None,
    name: str = "",
) -> None:
    """Write values (X, Y, Z, ...) with their voxel-to-world matrix (4, 4), mm, RAS; compressed for ``.nii.gz``.

    nibabel writes fields, too, since SimpleITK would rotate a sheared grid into a straight one and only warn.

    Args:
        header: its forms, codes, zooms and unit are kept; then ``affine`` is ignored.
        name: of the intent.

    Raises:
        CheckpointError: if it cannot be written; an existing file is then kept.
    """
    if header is None:
        image = nib.Nifti1Image(values, affine, dtype=values.dtype)  # without dtype, nibabel refuses 64-bit integers
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        if not np.allclose(image.get_qform(), affine, atol=1e-3):  # sheared, which a qform cannot express
            image.set_qform(None, code="unknown")
    else:
        new = placed(header, values.shape, values.dtype)
        image = nib.Nifti1Image(values, None, new, dtype=values.dtype)
    if image.header.get_xyzt_units()[0] == "unknown":
        image.header.set_xyzt_units("mm")
    image.header.set_intent(intent, name=name)
    content = image.to_bytes()
    write_file(Path(path), gzip.compress(content, 1, mtime=0) if str(path).endswith(".gz") else content)


def write_field(
    path: str | Path, pair: VolumePair, displacement: torch.Tensor, form: str = "itk", inverse: bool = False
) -> None:
    """Write a displacement (D, *spatial), in voxels of the pair's grid, fixed to moving.

    The file has the forms, codes and zooms of the fixed image, except for a tilted slice: see ``laid_flat``.

    Args:
        form: "itk" is float32 (X, Y, Z, 1, 3) with the intent "vector": mm along LPS axes between the two images as
            SimpleITK reads them, which ITK, SimpleITK and ANTs read as a displacement field. For one slice, (X, Y) or
            (X, Y, 1), it is two-dimensional, (X, Y, 1, 1, 2). "l2r" is float32 (X, Y, Z, 3) in voxels along the
            array's axes, as in Learn2Reg, with component 0 along an axis of one voxel.
        inverse: whether the displacement is from moving to fixed; it is on the pair's grid as well.

    Raises:
        DataError: for "itk", if two tilted slices have the same position for nibabel, but not for ITK.
    """
    grid, vectors = pair.grids[0], torch.from_numpy(pair.in_volume(displacement))  # (3, X, Y, Z)
    if form == "l2r":
        write_nifti(path, to_learn2reg(vectors), grid.affine, header=grid.header)
        return
    other, header, name = pair.grids[1], grid.header, ""
    dims = 2 if grid.shape[2] == 1 and _slice_axis(pair.shape) == 2 else 3
    tilted = dims == 2 and (grid.tilted or other.tilted)
    if tilted:
        here = grid.field_world
        there = here @ np.linalg.inv(grid.world) @ other.world @ pair.to_moving
    elif dims == 2:
        here, there = grid.field_world, other.field_world @ pair.to_moving
    else:
        here, there = grid.world, other.world @ pair.to_moving
    if dims == 2 and other.shape[2] > 1 or corners_apart(here, there, grid.shape) <= SAME_GRID:
        there = here
    elif tilted:
        raise DataError(
            f"{pair.paths[0]} and {pair.paths[1]} are slices that are not axial and lie on one grid by sform, but not "
            "by qform. Add --format l2r, in voxels."
        )
    if inverse and there is not here:
        here, there = there, here
        header = nib.Nifti1Image(np.zeros(grid.shape, np.uint8), here).header
    elif dims == 2 and grid.tilted:
        header, name = laid_flat(grid), LAID_FLAT
    axes = [*range(dims), 3]
    millimetres = to_itk(vectors[:dims], there[np.ix_(axes, axes)])  # (X, Y, Z, dims)
    if there is not here:  # for SimpleITK, the two images are on different grids
        x, y, z = np.indices(grid.shape, sparse=True)
        for axis, shift in enumerate((there - here)[:dims]):
            sign = -1 if axis < 2 else 1  # RAS, LPS
            millimetres[..., axis] += sign * (shift[0] * x + shift[1] * y + shift[2] * z + shift[3])
    write_nifti(path, millimetres.astype(np.float32)[:, :, :, None], grid.affine, "vector", header, name)
