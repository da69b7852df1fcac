"""Brain slices in the layout of neurite-oasis 2D: one folder of label maps per slice, paired across subjects.

The layout: ``subjects.txt`` (one folder name per line), the FreeSurfer colour tables ``seg4_labels.txt`` and
``seg24_labels.txt`` (``id name R G B A``), and in every folder ``slice_seg4.nii.gz`` and
``slice_seg24.nii.gz``. A folder ``BRAIN_03_S08`` is slice S08 of subject BRAIN_03; any other name is a
subject with one slice. ``slice_norm.nii.gz``, the image itself, is optional. Nothing else is read.

Loaded slices have the patient's left at low indices of array axis 0, however they are stored, and the crown at low
indices of axis 1. The header does not give the direction of axis 0, but the 24 structures do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pairdiff_core.data.folders import find_folder, random_choice
from pairdiff_core.data.image_files import read_image, read_label_image
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet, resize_labels

OASIS_FOLDER = "neurite-oasis.2d.v1.0"
NAMES = (OASIS_FOLDER, "brain2d")  # the second has the same layout, made from freely usable label maps
SUBJECTS = "subjects.txt"
VALIDATION_SHARE = 0.2  # of the subjects


@dataclass(frozen=True, eq=False)
class OasisSlices:
    """Label slices of some subjects on one grid."""

    labels: torch.Tensor  # uint8 (S, *spatial)
    names: tuple[str, ...]  # the folder of each slice, S names
    label_names: tuple[str, ...]  # index = label value
    label_colours: tuple[tuple[int, int, int], ...]  # RGB, 0 to 255
    spacing: tuple[float, ...]  # mm per voxel, per array axis


def find_oasis(data: str | Path | None = None) -> Path:
    """The folder with the slices: the first that is set of ``data``, PAIRDIFF_OASIS2D and PAIRDIFF_DATA.

    Each may be the folder itself or one that holds ``neurite-oasis.2d.v1.0`` or ``brain2d``. If there is none, a
    DataError says how to get the data.
    """
    how_to = (
        "Fetch the slices with `pairdiff fetch oasis2d --to FOLDER` and set PAIRDIFF_DATA to that folder, or set "
        "PAIRDIFF_OASIS2D to a folder of the same layout; 'phantom2d' needs no data."
    )
    return find_folder(data, ("PAIRDIFF_OASIS2D", "PAIRDIFF_DATA"), NAMES, (SUBJECTS,), how_to)


def split_name(name: str) -> tuple[str, str]:
    """Split a folder name into (subject, slice): BRAIN_03_S08 gives ("BRAIN_03", "S08"), other names (name, "")."""
    match = re.fullmatch(r"(.+)_(S\d+)", name)
    return match.groups() if match else (name, "")


def read_subjects(folder: Path) -> tuple[str, ...]:
    """The folder names in ``subjects.txt``.

    Raises:
        DataError: if the list is missing or not text.
    """
    path = folder / SUBJECTS
    try:
        return tuple(dict.fromkeys(path.read_text(encoding="utf-8").split()))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must list the slice folders, one name per line ({error}).") from error


def split_subjects(names: Sequence[str], split: str) -> tuple[str, ...]:
    """The folder ``names`` that belong to a split, "train" or "validation".

    The last fifth of the subjects in alphabetical order (at least two) is the validation split. All slices of a
    subject are in the same split.

    Raises:
        DataError: if there are fewer than four subjects, too few for pairs in both splits.
        KeyError: for another split.
    """
    subjects = sorted({split_name(name)[0] for name in names})
    if len(subjects) < 4:
        raise DataError(f"{SUBJECTS} names {len(subjects)} subjects; pairs in both splits need at least 4.")
    held_out = max(2, round(VALIDATION_SHARE * len(subjects)))
    chosen = {"train": subjects[:-held_out], "validation": subjects[-held_out:]}[split]
    return tuple(sorted(name for name in names if split_name(name)[0] in chosen))


def read_label_table(path: Path, num_labels: int) -> tuple[tuple[str, ...], tuple]:
    """Names and RGB colours of the labels 0 to ``num_labels - 1`` from a FreeSurfer colour table.

    Raises:
        DataError: if the table is missing or unreadable, or does not list exactly these labels.
    """
    columns = [("label", int), ("name", "U99"), ("red", int), ("green", int), ("blue", int)]
    try:
        table = np.loadtxt(path, columns, usecols=range(5), ndmin=1, encoding="utf-8")
    except (OSError, ValueError) as error:  # the error names the file or the row
        raise DataError(f"{path} must list `id name R G B A`, one label per line ({error}).") from error
    table = np.sort(table, order="label")
    found = table["label"].tolist()
    if found != list(range(num_labels)):
        raise DataError(f"{path} lists the labels {found}, but the images have 0 to {num_labels - 1}.")
    return tuple(table["name"].tolist()), tuple(table[["red", "green", "blue"]].tolist())


def read_slice(path: Path, num_labels: int) -> tuple[torch.Tensor, tuple[float, ...]]:
    """One label slice as stored, uint8 (H, W), and its spacing in mm.

    Raises:
        DataError: if the file is not a readable NIfTI of one slice, or holds anything but whole numbers from 0 to
            ``num_labels - 1``.
    """
    values, image = read_label_image(path)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]  # (H, W, 1) -> (H, W)
    if values.ndim != 2:
        raise DataError(f"{path} has shape {values.shape}; expected one slice, (H, W) or (H, W, 1).")
    for label in np.setdiff1d(values, np.arange(num_labels)):
        raise DataError(f"{path} holds the label {label:g}, which is not in the label table (0 to {num_labels - 1}).")
    return torch.from_numpy(values.astype(np.uint8)), tuple(float(mm) for mm in image.header.get_zooms()[:2])


def _left_is_last(folder: Path, name: str) -> bool:
    """Whether the slices of this data set store the patient's left at the high indices of axis 0.

    The 24 structures of one slice determine it. Without them (or any in the slice), it is True, as in neurite-oasis.
    """
    structures = folder / name / "slice_seg24.nii.gz"
    if not structures.is_file():
        return True
    names, _ = read_label_table(folder / "seg24_labels.txt", 25)
    labels, _ = read_slice(structures, 25)
    sides = (torch.tensor([label.startswith(side) for label in names])[labels.long()] for side in ("Left", "Right"))
    left, right = (side.nonzero()[:, 0].float().mean() for side in sides)
    return not bool(left < right)


def load_t1(folder: Path, names: Sequence[str], spatial: Sequence[int]) -> torch.Tensor | None:
    """The T1 images ``slice_norm.nii.gz`` of some slices, float (S, 1, *spatial), 0 to 1, side as in the label maps.

    neurite-oasis stores them from 0 to 1; other ranges are divided by the largest value of all slices. They are resized
    by averaging or linear interpolation. None if a slice has no such file.

    Raises:
        DataError: if a file is not a readable image of one slice, or sizes differ.
    """
    files = [folder / name / "slice_norm.nii.gz" for name in names]
    if not all(file.is_file() for file in files):
        return None
    images = []
    for file in files:
        values = torch.from_numpy(np.asarray(read_image(file)[0], np.float32)).squeeze()  # (H, W, 1) -> (H, W)
        if values.dim() != 2 or (images and values.shape != images[0].shape):
            expected = tuple(images[0].shape) if images else "(H, W) or (H, W, 1)"
            raise DataError(f"{file} has shape {tuple(values.shape)}; expected one slice, {expected}. Remove it.")
        images.append(values)
    stacked = torch.stack(images)[:, None].clamp_min(0)
    if _left_is_last(folder, names[0]):
        stacked = stacked.flip(2)
    stacked = F.interpolate(stacked, size=tuple(spatial), mode="bilinear", antialias=True, align_corners=False)
    return (stacked / stacked.max().clamp_min(1)).clamp(0, 1)


def load_subjects(
    folder: Path, num_labels: int, *, names: Sequence[str] | None = None, spatial: Sequence[int] | None = None
) -> OasisSlices:
    """Label slices of a folder in the OASIS layout.

    Args:
        folder: the folder with ``subjects.txt``.
        num_labels: 5 (seg4) or 25 (seg24), background included.
        names: slice folders to read; all that ``subjects.txt`` lists if None.
        spatial: grid to resize to, by majority vote; None keeps the stored one.

    Raises:
        DataError: if the folder does not follow the layout; the message names the file.
    """
    names = tuple(names or read_subjects(folder))
    label_names, colours = read_label_table(folder / f"seg{num_labels - 1}_labels.txt", num_labels)
    files = [folder / name / f"slice_seg{num_labels - 1}.nii.gz" for name in names]
    images, (spacing, *_) = zip(*(read_slice(path, num_labels) for path in files), strict=True)
    stored = tuple(images[0].shape)
    for path, image in zip(files, images, strict=True):
        if image.shape != stored:
            differs = f"has shape {tuple(image.shape)}, but {files[0]} has {stored}"
            raise DataError(f"{path} {differs}. Resample the one that differs, or remove it from {SUBJECTS}.")
    labels = torch.stack(images)
    if _left_is_last(folder, names[0]):
        labels = labels.flip(1)
    if spatial is not None and tuple(spatial) != stored:
        labels = resize_labels(labels, spatial, num_labels)
        spacing = tuple(mm * old / new for mm, old, new in zip(spacing, stored, spatial, strict=True))
    return OasisSlices(labels, names, label_names, colours, spacing)


def make_pairs(slices: OasisSlices, *, max_pairs: int | None = None, seed: int = 0) -> PairSet:
    """Ordered pairs of two different subjects at the same slice; at most ``max_pairs``, chosen at random by ``seed``.

    Raises:
        DataError: if no two subjects share a slice.
    """
    whose = [split_name(name) for name in slices.names]  # (subject, slice) each
    numbers = permutations(range(len(whose)), 2)
    ordered = [(i, j) for i, j in numbers if whose[i][1] == whose[j][1] and whose[i][0] != whose[j][0]]
    if not ordered:
        raise DataError("no two subjects share a slice, so there is no pair")
    ordered = random_choice(ordered, max_pairs, seed)
    return PairSet(
        labels=slices.labels[torch.tensor(ordered)],  # (S, *spatial) by (N, 2) -> (N, 2, *spatial)
        label_names=slices.label_names,
        spacing=slices.spacing,
        names=tuple(f"{slices.names[i]}~{slices.names[j]}" for i, j in ordered),
        label_colours=slices.label_colours,
    )


def load_oasis_pairs(
    folder: Path,
    split: str,
    *,
    num_labels: int = 5,
    spatial: Sequence[int] | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
) -> PairSet:
    """Pairs of one split ("train" or "validation") of a folder in the OASIS layout, see :func:`split_subjects`."""
    names = split_subjects(read_subjects(folder), split)
    slices = load_subjects(folder, num_labels, names=names, spatial=spatial)
    return make_pairs(slices, max_pairs=max_pairs, seed=seed)
