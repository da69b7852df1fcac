"""Bring pairs of label images, or of probability maps, onto one grid with one set of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import from_matvec, voxel_sizes
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from pairdiff_cli.pair_files import PairFiles
from pairdiff_cli.volume_files import MAX_LABELS, VolumePair, read_pair
from pairdiff_core.data.image_files import read_image
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import resize_labels

SAME_SPACING = 0.01  # largest relative difference between voxel sizes that count as equal
TOLERANCE = 0.01  # by which probabilities may miss 0, 1, and their sum of 1


class Image(NamedTuple):
    """Both images of a pair on the grid that they share, a slice as (X, Y, 1)."""

    files: PairFiles
    labels: np.ndarray  # uint8 (2, X, Y, Z), index into the values of all pairs
    affine: np.ndarray  # (4, 4), voxel to world, mm, RAS

    @property
    def shape(self) -> tuple[int, ...]:
        return self.labels.shape[1:]

    @property
    def axes(self) -> str:
        """Where the axes run, such as "RAS"."""
        return "".join(nib.aff2axcodes(self.affine))


class Found(NamedTuple):
    """Pairs as they are in their files."""

    images: list[Image]
    spatial_dims: int
    values: np.ndarray  # uint64 (C,), the label values of all pairs, 0 first
    notes: list[str]


def read_probabilities(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """The most likely label of each voxel, uint8 (X, Y, Z), from probabilities (X, Y, Z, M), and the image.

    If the M maps add up to 1, the first one is the background. Otherwise they are the labels 1 to M, and the background
    has the rest.

    Raises:
        DataError: if the file is missing or damaged, or does not hold probabilities; the message names it.
    """
    values, image = read_image(path)
    if values.ndim == 5 and values.shape[3] == 1:
        values = values[..., 0, :]  # (X, Y, Z, 1, M) -> (X, Y, Z, M)
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim != 4 or not values.size or values.shape[3] >= MAX_LABELS:
        raise DataError(f"{path} has shape {values.shape}; probabilities are (X, Y, Z, M), with M below {MAX_LABELS}.")
    if not np.isfinite(values).all() or values.min() < -TOLERANCE or values.max() > 1 + TOLERANCE:
        raise DataError(
            f"{path} holds values from {values.min():.4g} to {values.max():.4g}, not probabilities from 0 to 1. Save "
            "probabilities, or omit --probabilities if these are labels."
        )
    total = values.sum(3, keepdims=True)
    if total.max() > 1 + TOLERANCE:
        raise DataError(f"{path}: the probabilities of a voxel add up to {total.max():.4g}. They must not exceed 1.")
    if values.shape[3] == 1 or np.abs(total - 1).max() > TOLERANCE:
        values = np.concatenate([1 - total, values], 3)
    labels = values.argmax(3).astype(np.uint8)
    if not labels.any():
        raise DataError(f"{path}: the background is most likely everywhere. Check the order of the maps.")
    return labels, image


def read_pairs(files: Sequence[PairFiles], probabilities: bool = False, resample: bool = False) -> Found:
    """Read all pairs and give equal labels equal numbers.

    Raises:
        DataError: as :func:`pairdiff_cli.volume_files.read_pair`; or if slices and volumes, or slices of different
            planes, are mixed; the message names the file.
    """
    read = read_probabilities if probabilities else None
    volumes = [read_pair(pair.fixed, pair.moving, resample, read) for pair in files]
    notes = [note for volume in volumes for note in volume.notes]
    dims = len(volumes[0].spacing)
    for volume in volumes:
        if len(volume.spacing) != dims:
            raise DataError(
                f"{volume.paths[0]} has {len(volume.spacing)} axes, but {volumes[0].paths[0]} has {dims}. Prepare "
                "slices and volumes separately."
            )
    values = np.unique(np.concatenate([volume.values for volume in volumes]))
    if len(values) > MAX_LABELS:
        raise DataError(f"all images together hold {len(values)} labels. At most {MAX_LABELS} are possible.")
    indices = [np.searchsorted(values, volume.values).astype(np.uint8) for volume in volumes]
    if len(values) > 2 and all(len(volume.values) == 2 for volume in volumes):
        notes.append("each pair holds masks of one value, but these values differ: non-zero is taken as 1.")
        values, indices = np.arange(2, dtype=np.uint64), [np.arange(2, dtype=np.uint8)] * len(volumes)
    images = [_image(*each) for each in zip(files, volumes, indices, strict=True)]
    across = [int(io_orientation(image.affine)[2, 0]) for image in images]
    for image, axis in zip(images, across, strict=True):
        if dims == 2 and axis != across[0]:
            raise DataError(f"{image.files.fixed} is a slice in another plane than {files[0].fixed}. Separate them.")
    return Found(images, dims, values, notes)


def _image(files: PairFiles, volume: VolumePair, index: np.ndarray) -> Image:
    labels = index[volume.labels.numpy()]  # (2, *spatial)
    order = [*volume.spatial_axes, *sorted({0, 1, 2} - set(volume.spatial_axes)), 3]  # across a slice comes last
    return Image(files, labels.reshape((*labels.shape, 1)[:4]), volume.affine[:, order])


def most_common_axes(found: Found) -> str:
    """The orientation that most pairs have, such as "RAS"."""
    return Counter(image.axes for image in found.images).most_common(1)[0][0]


def turned(image: Image, axes: str) -> Image:
    """The same pair with its axes in the order and direction of ``axes``, such as "RAS"; no voxel is changed."""
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(axes))
    both = [nib.Nifti1Image(labels, image.affine).as_reoriented(turn) for labels in image.labels]
    return image._replace(labels=np.stack([np.asarray(each.dataobj) for each in both]), affine=both[0].affine)


def spacing_of(image: Image, dims: int) -> np.ndarray:
    """Millimetres between voxel centres along the axes of the image."""
    return voxel_sizes(image.affine)[:dims]


def same_spacing(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two voxel sizes are equal within ``SAME_SPACING``."""
    return bool(np.allclose(one, other, rtol=SAME_SPACING, atol=0))


def at_spacing(image: Image, spacing: Sequence[float], num_labels: int) -> Image:
    """The same pair and field of view with other voxels, by majority vote.

    The number of voxels is rounded, so the new voxels differ from ``spacing`` by at most half a voxel over the image.
    """
    dims, old = len(spacing), np.array(image.shape)
    own = spacing_of(image, dims)
    if same_spacing(own, spacing):
        return image
    new = old.copy()
    new[:dims] = np.maximum(1, np.round(old[:dims] * own / spacing))
    labels = torch.from_numpy(image.labels.reshape(2, *old[:dims]))  # (2, *spatial)
    labels = resize_labels(labels, tuple(new[:dims].tolist()), num_labels).numpy()
    affine = image.affine @ from_matvec(np.diag(old / new), (old / new - 1) / 2)  # the centre of voxel 0 moves
    return image._replace(labels=labels.reshape(2, *new), affine=affine)


def on_grid(image: Image, spatial: Sequence[int]) -> Image:
    """The same pair, padded with background or cropped about its centre to a grid of this many voxels.

    Raises:
        DataError: if no structure is left in one of the images.
    """
    from monai.data import MetaTensor  # here, because importing MONAI takes seconds
    from monai.transforms import ResizeWithPadOrCrop

    fit = ResizeWithPadOrCrop((*spatial, 1)[:3])
    moved = fit(MetaTensor(torch.from_numpy(image.labels.astype(np.float32)), affine=torch.from_numpy(image.affine)))
    labels = moved.numpy().astype(np.uint8)
    for path, own in zip(image.files[:2], labels, strict=True):
        if not own.any():
            raise DataError(f"{path} has no structure within {spatial} voxels about its centre. Give a larger --size.")
    return image._replace(labels=labels, affine=moved.affine.numpy())
