"""Brain slices in the layout of neurite-oasis 2D: one folder of label maps a slice, pairs by subject.

The layout: ``subjects.txt`` (one folder name a line), the FreeSurfer colour tables ``seg4_labels.txt`` and
``seg24_labels.txt`` (``id name R G B A``), and in every folder ``slice_seg4.nii.gz`` and
``slice_seg24.nii.gz``. A folder ``BRAIN_03_S08`` is slice S08 of subject BRAIN_03; any other name is a
subject with one slice. Nothing else in a folder is read; ``slice_norm.nii.gz`` may be there or not.

The header does not tell whether a file stores left or right first (the affine is the identity), but the 24
structures do. Slices come out with the patient's left at low indices of array axis 0, whichever way they are
stored, and the crown at low indices of axis 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pairdiff_core.data.nifti import read_label_image
from pairdiff_core.pairs import DataError, PairSet, resize_labels

OASIS_FOLDER = "neurite-oasis.2d.v1.0"
STAND_IN_FOLDER = "brain2d"  # the same layout, made from freely usable label maps
TEST_SHARE = 0.2  # of the subjects


@dataclass(frozen=True, eq=False)
class OasisSlices:
    """Label slices of some subjects on one grid.

    Attributes:
        labels: uint8 (S, *spatial).
        subjects: the person that each slice shows, S names.
        slices: where each was cut; slices of the same name are comparable. "" where there is one a subject.
        label_names: index = label value.
        label_colours: RGB, 0 to 255.
        spacing: mm per voxel, per array axis.
    """

    labels: torch.Tensor
    subjects: tuple[str, ...]
    slices: tuple[str, ...]
    label_names: tuple[str, ...]
    label_colours: tuple[tuple[int, int, int], ...]
    spacing: tuple[float, ...]


def slices_below(folder: Path) -> Path | None:
    """``folder``, or the data set in it, if that has the layout; the original before the stand-in."""
    for candidate in (folder, folder / OASIS_FOLDER, folder / STAND_IN_FOLDER):
        if (candidate / "subjects.txt").is_file():
            return candidate
    return None


def find_oasis(data: str | Path | None = None) -> Path:
    """The folder with the slices.

    The first that is set counts: ``data``, the environment variable PAIRDIFF_OASIS2D, PAIRDIFF_DATA. Each may
    be the folder itself or one that holds ``neurite-oasis.2d.v1.0`` or ``brain2d``.

    Raises:
        DataError: if there is none; the message says how to get the data.
    """
    how_to = (
        "Fetch the slices with `pairdiff fetch oasis2d --to FOLDER` and set PAIRDIFF_DATA to "
        "that folder, or set PAIRDIFF_OASIS2D to a folder of the same layout; 'phantom2d' needs no data."
    )
    places = {"data": data} | {name: os.environ.get(name) for name in ("PAIRDIFF_OASIS2D", "PAIRDIFF_DATA")}
    origin, place = next(((origin, place) for origin, place in places.items() if place), (None, None))
    if place is None:
        raise DataError(f"No folder with brain slices is set. {how_to}")
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} (from {origin}) is not a folder. {how_to}")
    found = slices_below(folder)
    if found is None:
        inside = f"{OASIS_FOLDER}/ or {STAND_IN_FOLDER}/"
        raise DataError(f"{folder} (from {origin}) holds no subjects.txt, nor does {inside} in it. {how_to}")
    return found


def split_name(name: str) -> tuple[str, str]:
    """Folder name as (subject, slice): BRAIN_03_S08 is ("BRAIN_03", "S08"), other names are (name, "")."""
    match = re.fullmatch(r"(.+)_(S\d+)", name)
    return match.groups() if match else (name, "")


def read_subjects(folder: str | Path) -> tuple[str, ...]:
    """The folder names in ``subjects.txt``.

    Raises:
        DataError: if the list is missing, empty or not text, or names a folder that is not there.
    """
    path = Path(folder) / "subjects.txt"
    if not path.is_file():
        raise DataError(f"{path} is missing. It lists the slice folders, one name a line.")
    try:
        names = tuple(dict.fromkeys(path.read_text(encoding="utf-8").split()))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file ({error}). Fetch the data again.") from error
    if not names:
        raise DataError(
            f"{path} is empty. List the slice folders in it, one name a line, or fetch the data again."
        )
    for name in names:
        if not (path.parent / name).is_dir():
            raise DataError(
                f"{path} lists {name}, but there is no such folder beside it. Remove the line or add it."
            )
    return names


def split_subjects(names: Sequence[str], split: str) -> tuple[str, ...]:
    """Those of the folder ``names`` that belong to a split, "train" or "test".

    The last fifth of the subjects in alphabetical order (at least two) is the test split. All slices of a
    subject fall into the same split.

    Raises:
        DataError: if there are fewer than four subjects, too few for pairs in both splits.
    """
    if split not in ("train", "test"):
        raise DataError(f"there is no split {split!r}; take 'train' or 'test'")
    subjects = sorted({split_name(name)[0] for name in names})
    if len(subjects) < 4:
        raise DataError(
            f"subjects.txt names {len(subjects)} different subjects; pairs in both splits need at least 4."
        )
    number_test = max(2, round(TEST_SHARE * len(subjects)))
    chosen = set(subjects[-number_test:] if split == "test" else subjects[:-number_test])
    return tuple(sorted(name for name in names if split_name(name)[0] in chosen))


def read_label_table(
    path: str | Path, num_labels: int
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names and RGB colours of the labels 0 to ``num_labels - 1`` from a FreeSurfer colour table.

    Raises:
        DataError: if the table is missing or unreadable, or does not list exactly these labels.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is missing. It lists the labels, one `id name R G B A` a line.")
    rows: dict[int, tuple[str, tuple[int, int, int]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        words = line.split()
        if not words or line.lstrip().startswith("#"):
            continue
        try:
            label, (red, green, blue) = int(words[0]), (int(word) for word in words[2:5])
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: expected `id name R G B A`, found {line.strip()!r}."
            ) from error
        rows[label] = (words[1], (red, green, blue))
    if sorted(rows) != list(range(num_labels)):
        raise DataError(
            f"{path} lists the labels {sorted(rows)}, but these images have 0 to {num_labels - 1}. "
            "Use the table that belongs to the images."
        )
    names, colours = zip(*(rows[label] for label in range(num_labels)), strict=True)
    return names, colours


def read_slice(path: str | Path, num_labels: int) -> tuple[torch.Tensor, tuple[float, ...]]:
    """One label slice as stored, uint8 (H, W), and its spacing in mm.

    Raises:
        DataError: if the file is missing, is no readable NIfTI, is not one slice, or holds anything but whole
            numbers from 0 to ``num_labels - 1``.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} is missing: this subject has no such segmentation. Add the file, or take the subject "
            "out of subjects.txt."
        )
    values, image = read_label_image(path)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]  # (H, W, 1) -> (H, W)
    if values.ndim != 2:
        raise DataError(f"{path} has shape {values.shape}; expected one slice, (H, W) or (H, W, 1).")
    unknown = np.setdiff1d(values, np.arange(num_labels))
    if unknown.size:
        raise DataError(
            f"{path} holds the label {unknown[0]:g}, not in the label table (0 to {num_labels - 1}). "
            "Correct the image or use the table that belongs to it."
        )
    return torch.from_numpy(values.astype(np.uint8)), tuple(float(mm) for mm in image.header.get_zooms()[:2])


def segmentation_files(folder: str | Path, names: Sequence[str], num_labels: int) -> list[Path]:
    """The files that :func:`load_subjects` reads for these slices (for hashes in a results file)."""
    return [Path(folder) / name / f"slice_seg{num_labels - 1}.nii.gz" for name in names]


def _left_is_last(folder: Path, name: str) -> bool:
    """Whether the slices of this data set store the patient's left at the high indices of axis 0.

    Read off the 24 structures of one slice; where there is no such file, as in neurite-oasis.
    """
    structures, table = folder / name / "slice_seg24.nii.gz", folder / "seg24_labels.txt"
    if not structures.is_file() or not table.is_file():
        return True
    sides, _ = read_label_table(table, 25)
    labels, _ = read_slice(structures, 25)
    place = {}
    for side in ("Left", "Right"):
        of_side = torch.tensor([label.startswith(side) for label in sides])[labels.long()]
        place[side] = of_side.nonzero()[:, 0].float().mean()
    return not bool(place["Left"] < place["Right"])  # True for a slice without any structure too


def load_subjects(
    folder: str | Path,
    num_labels: int,
    *,
    names: Sequence[str] | None = None,
    spatial: Sequence[int] | None = None,
) -> OasisSlices:
    """Label slices of a folder in the OASIS layout.

    Args:
        folder: the folder with ``subjects.txt``.
        num_labels: 5 (seg4) or 25 (seg24), background included.
        names: slice folders to read; all that ``subjects.txt`` lists if None.
        spatial: grid to resize to, by majority vote; None keeps the stored one.

    Raises:
        DataError: for anything in the folder that is not as the layout says; the message names the file.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder that holds subjects.txt.")
    if num_labels not in (5, 25):
        raise DataError(f"the slices have 5 or 25 labels (background included), not {num_labels}")
    names = tuple(read_subjects(folder) if names is None else names)
    label_names, colours = read_label_table(folder / f"seg{num_labels - 1}_labels.txt", num_labels)
    files = segmentation_files(folder, names, num_labels)
    stored, spacing = read_slice(files[0], num_labels)
    images = [stored]
    for path in files[1:]:
        image, _ = read_slice(path, num_labels)
        if image.shape != stored.shape:
            raise DataError(
                f"{path} has shape {tuple(image.shape)}, but {files[0]} has {tuple(stored.shape)}. All "
                "slices lie on one grid: resample the one that differs, or take it out of subjects.txt."
            )
        images.append(image)
    labels = torch.stack(images)
    if _left_is_last(folder, names[0]):
        labels = labels.flip(1)
    if spatial is not None and tuple(spatial) != tuple(stored.shape):
        labels = resize_labels(labels, spatial, num_labels)
        spacing = tuple(mm * old / new for mm, old, new in zip(spacing, stored.shape, spatial, strict=True))
    subjects, slices = zip(*(split_name(name) for name in names), strict=True)
    return OasisSlices(labels, subjects, slices, label_names, colours, spacing)


def make_pairs(slices: OasisSlices, *, max_pairs: int | None = None, seed: int = 0) -> PairSet:
    """Pairs of two different subjects at the same slice.

    Args:
        slices: what to pair.
        max_pairs: of more ordered pairs than this a random choice is taken, in their order; None takes all.
        seed: of that choice.

    Raises:
        DataError: if no two subjects share a slice.
    """
    who, where = slices.subjects, slices.slices
    number = len(who)
    ordered = [
        (i, j) for i in range(number) for j in range(number) if where[i] == where[j] and who[i] != who[j]
    ]
    if not ordered:
        raise DataError(
            "no two subjects share a slice, so there is no pair: a pair is two people at the same place."
        )
    if max_pairs is not None and len(ordered) > max_pairs:
        chosen = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed))[:max_pairs]
        ordered = [ordered[index] for index in chosen.sort().values.tolist()]
    labels = slices.labels[torch.tensor(ordered)]  # (S, *spatial) by (N, 2) -> (N, 2, *spatial)
    full = ["_".join(part for part in parts if part) for parts in zip(who, where, strict=True)]
    return PairSet(
        labels=labels,
        label_names=slices.label_names,
        spacing=slices.spacing,
        names=tuple(f"{full[i]}~{full[j]}" for i, j in ordered),
        label_colours=slices.label_colours,
    )


def load_oasis_pairs(
    folder: str | Path,
    split: str,
    *,
    num_labels: int = 5,
    spatial: Sequence[int] | None = None,
    max_pairs: int | None = None,
    seed: int = 0,
) -> PairSet:
    """Pairs of one split ("train" or "test") of a folder in the OASIS layout, see :func:`split_subjects`."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder that holds subjects.txt.")
    names = split_subjects(read_subjects(folder), split)
    return make_pairs(
        load_subjects(folder, num_labels, names=names, spatial=spatial), max_pairs=max_pairs, seed=seed
    )
