"""Lung vessels in the layouts of Lung250M-4B: pairs of one person's lungs, breathed in and breathed out.

One folder holds either layout, or both, with any number of cases:

- the published, dilated vessels (github.com/multimodallearning/UnleashingRegistration): ``dilated_vessels_10/`` (or
  ``dilated_vessels/``, all of them) for training and ``dilated_vessels_ts/`` for validation and test, with
  ``case_NNN_1.nii.gz`` (fixed, mostly breathed in: the larger lung) and ``case_NNN_2.nii.gz`` (moving).
- the label volumes of the full data set: ``segTr/`` and ``segTs/`` with ``case_NNN_1.nii.gz`` or, according to its
  page, ``NNN_1.nii.gz``. They are dilated here by one voxel (the maximum over 3 x 3 x 3), as the published ones were.
  Their voxel grids are assumed to be the same, and 0 to be background. Source:
  github.com/multimodallearning/Lung250M-4B, "Dataset structure".

In both, labels 1 and 2 are the two vessel trees; the method uses ``> 0``.

Every volume is padded or cropped to one frame of 256 x 208 x 256 voxels. Axis 0 runs to the patient's left, axis 1 to
the back, axis 2 upwards, in all cases. The headers of cases 114 to 123 say otherwise although their voxels lie on the
same grid, so grids are compared, never affines.

A voxel counts as 1 mm, as in the published errors. The headers say 0.997 to 1.002 mm, so a target registration error
in mm is off by 0.3 % at most; a header more than 1 % off is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pairdiff_core import fields
from pairdiff_core.data.folders import find_folder, random_choice
from pairdiff_core.data.image_files import read_label_image
from pairdiff_core.data.lung_frame import FRAME, frame_offset, lung_pair_set, pooling_factor, to_frame
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet

LUNG_FOLDER = "lung250m"
TRAIN_FOLDERS = ("segTr", "dilated_vessels", "dilated_vessels_10")  # the first that exists is used; it has most cases
HELD_OUT_FOLDERS = ("dilated_vessels_ts", "segTs")
FOLDERS = {"train": TRAIN_FOLDERS, "validation": HELD_OUT_FOLDERS, "test": HELD_OUT_FOLDERS}
RAW_FOLDERS = ("segTr", "segTs")  # not dilated yet
VALIDATION_LANDMARKS = "lms_validation_cropped.pth"
CORRESPONDENCES = "corrfieldTr"
OFFICIAL_TEST = tuple(f"case_{number}" for number in range(104, 114))  # DIR-LAB COPDgene
LONGEST_LAST_AXIS = {"case_035": 280}  # of 451 voxels; the reference keeps the first 280, counted from below
SPACING_TOLERANCE = 0.01  # largest deviation from 1 mm, in mm


def find_lung250m(data: str | Path | None = None) -> Path:
    """The folder with the vessel volumes: the one that ``data`` or else PAIRDIFF_DATA names, or ``lung250m`` in it.

    If there is none, a DataError says how to get the data.
    """
    how_to = (
        "Fetch the vessels with `pairdiff fetch lung250m --to FOLDER` and set PAIRDIFF_DATA to that folder; "
        "'phantom3d' needs no data."
    )
    return find_folder(data, ("PAIRDIFF_DATA",), (LUNG_FOLDER,), (*TRAIN_FOLDERS, *HELD_OUT_FOLDERS), how_to)


def case_files(folder: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """The (fixed, moving) files of each case of a split, by its name ``case_NNN``, in sorted order.

    A split is "train"; "validation", the held-out cases without the ten official test cases 104 to 113 (COPDgene); or
    "test", those ten cases, which are for a final comparison only.

    Raises:
        DataError: if there is no case of the split, or a case has only one of its two files.
        KeyError: for another split.
    """
    found = _files(folder, split)
    cases = [case for case in found if split == "train" or (case in OFFICIAL_TEST) == (split == "test")]
    if not cases:
        only = ", only official test cases: the split 'test' (--split test)" if found and split == "validation" else ""
        looked = " or ".join(FOLDERS[split])
        raise DataError(f"{folder} holds no case of the split {split!r} in {looked}{only}. Fetch the data again.")
    return {case: found[case] for case in cases}


def _files(folder: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """The files of all cases in the folder of a split; validation and test share a folder."""
    inside = next((folder / name for name in FOLDERS[split] if (folder / name).is_dir()), None)
    found: dict[str, dict[str, Path]] = {}
    for path in inside.iterdir() if inside else ():
        match = re.fullmatch(r"(?:case_)?(\d{3})_([12])\.nii(?:\.gz)?", path.name)  # skips ._case_... of macOS
        if match:
            found.setdefault(f"case_{match[1]}", {})[match[2]] = path
    for case, pair in found.items():
        if len(pair) == 1:
            raise DataError(f"{inside} holds only the image _{min(pair)} of {case}. Add the other, or remove this one.")
    return {case: (found[case]["1"], found[case]["2"]) for case in sorted(found)}


def read_vessels(path: Path, case: str) -> torch.Tensor:
    """One vessel mask, uint8 (H, W, D) of 0 and 1, dilated if the file is not; case_035 is cropped along its last axis.

    Raises:
        DataError: if the file is not a readable NIfTI volume of labels, or its voxels are not of 1 mm.
    """
    values, image = read_label_image(path)
    if values.ndim != 3:
        raise DataError(f"{path} has shape {values.shape}; expected one volume, (H, W, D).")
    spacing = image.header.get_zooms()
    if any(abs(mm - 1) > SPACING_TOLERANCE for mm in spacing):
        millimetres = " x ".join(f"{mm:g}" for mm in spacing)
        raise DataError(f"{path} has voxels of {millimetres} mm. Resample it to 1 mm by nearest neighbour.")
    if values.min() < 0:
        raise DataError(f"{path} holds the value {values.min():g}; labels are 0, 1 and 2. Export it again.")
    mask = torch.from_numpy((values > 0).astype(np.uint8))
    if path.parent.name in RAW_FOLDERS:
        mask = F.max_pool3d(mask[None], 3, stride=1, padding=1)[0]
    return mask[:, :, : LONGEST_LAST_AXIS.get(case)]


def read_correspondences(path: Path) -> torch.Tensor:
    """Automatic correspondences of a training patient, float (K, 2, 3), in voxels of the whole volume.

    They were computed from the CTs, not from the vessels. The file has lines of ``fixed x, y, z, moving x, y, z``.

    Raises:
        DataError: if the file is anything but lines of six numbers.
    """
    try:
        table = np.loadtxt(path, np.float32, delimiter=",", ndmin=2, encoding="utf-8")
    except ValueError as error:  # includes UnicodeDecodeError
        raise DataError(f"{path} is not a table of numbers ({error}). Fetch it again.") from error
    if table.shape[1] != 6 or not len(table) or not np.isfinite(table).all():
        raise DataError(f"{path} must hold six numbers per line, fixed x,y,z,moving x,y,z. Fetch it again.")
    return torch.from_numpy(table).reshape(-1, 2, 3)  # (K, 6) -> (K, 2, 3)


def in_frame(points: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Correspondences (K, 2, 3) of a volume of this shape in voxels of the common frame, without those outside it."""
    framed = points + torch.tensor(frame_offset(shape))
    return framed[((framed >= -0.5) & (framed < torch.tensor(FRAME) - 0.5)).flatten(1).all(1)]


def read_validation_landmarks(path: Path, cases: Sequence[str]) -> dict[str, torch.Tensor]:
    """Landmarks of held-out cases, by case, float (K, 2, 3) in voxels of the common frame.

    The file is a list of two lists, fixed and moving, with one tensor (K, 3) per case, in the order of the sorted
    cases, but without their names. Their number determines the cases: all of ``cases``, the held-out cases whose
    volumes exist, or these without or with all of the ten official test cases.

    Raises:
        DataError: if the file has another form or number of cases.
    """
    try:
        fixed, moving = torch.load(path, weights_only=True, map_location="cpu")  # they were saved on a GPU
        points = [torch.stack(pair, 1).float() for pair in zip(fixed, moving, strict=True)]
        if not all(pair.shape[1:] == (2, 3) and pair.isfinite().all() for pair in points):
            raise ValueError("points that are not three finite numbers")
    except Exception as error:  # for a damaged file, the unpickler may raise anything
        raise DataError(
            f"{path} must be a list of two lists of tensors (K, 3), fixed and moving, of finite numbers, but is "
            f"damaged or something else ({error}). Fetch it again."
        ) from error
    present, official = set(cases), set(OFFICIAL_TEST)
    for covered in (present, present - official, present | official):
        if len(points) == len(covered):
            return dict(zip(sorted(covered), points, strict=True))
    raise DataError(
        f"{path} has landmarks of {len(points)} cases, but there are {len(present)} cases ({len(present - official)} "
        "without the official test cases). Fetch both again, so that they match."
    )


def load_lung250m_pairs(
    folder: Path,
    split: str,
    *,
    cases: Sequence[str] | None = None,
    spatial: Sequence[int] = FRAME,
    max_pairs: int | None = None,
    seed: int = 0,
) -> PairSet:
    """Vessel pairs of one split, with landmarks where the folder has them.

    Args:
        folder: one of the layouts, or both (see the module).
        split: "train", "validation" or "test", see :func:`case_files`.
        cases: only these ("case_008", "008" or "8"), in sorted order and regardless of ``max_pairs``; None takes all.
        spatial: the common frame, (256, 208, 256), or its half or quarter, pooled by maximum to keep all vessels.
        max_pairs: the most pairs to load, chosen at random by ``seed``, in their original order; None takes all.

    Returns:
        Labels 0 and 1, 27 MB per pair at full size, with names such as ``case_032_1~case_032_2``. Landmarks are those
        of ``lms_validation_cropped.pth`` for held-out cases, and the automatic correspondences in ``corrfieldTr/`` for
        training cases. A case without any has an empty tensor (0, 2, 3); ``landmarks`` is None if no case has any.

    Raises:
        DataError: for an unknown case, or if the folder does not follow the layout; the message names the file.
    """
    factor, files = pooling_factor(spatial), case_files(folder, split)
    chosen = random_choice(list(files), max_pairs, seed)
    if cases:
        chosen = sorted({f"case_{case.removeprefix('case_').zfill(3)}" for case in cases})
        unknown = ", ".join(case for case in chosen if case not in files)
        if unknown:
            raise DataError(f"the split {split!r} of {folder} has no {unknown}; there are {', '.join(files)}")
    known = {}
    if split != "train" and (folder / VALIDATION_LANDMARKS).is_file():
        known = read_validation_landmarks(folder / VALIDATION_LANDMARKS, list(_files(folder, split)))
    labels, landmarks = torch.empty((len(chosen), 2, *spatial), dtype=torch.uint8), []
    for index, case in enumerate(chosen):  # one at a time, because full-size volumes need much memory
        fixed, moving = masks = [read_vessels(path, case) for path in files[case]]
        if fixed.shape != moving.shape:
            raise DataError(
                f"{files[case][1]} has shape {tuple(moving.shape)}, but {files[case][0]} has {tuple(fixed.shape)}. The "
                "two images of a pair must be on one voxel grid: resample one of them, or remove the case."
            )
        framed = torch.stack([to_frame(mask) for mask in masks])  # 2 x (H, W, D) -> (2, 256, 208, 256)
        for path, mask in zip(files[case], framed, strict=True):
            if not mask.any():
                raise DataError(f"{path} holds no vessel in the common frame. Fetch it again.")
        points, table = known.get(case, torch.empty((0, 2, 3))), folder / CORRESPONDENCES / f"{case}.csv"
        if split == "train" and table.is_file():
            points = in_frame(read_correspondences(table), fixed.shape)
        labels[index] = F.max_pool3d(framed, factor)
        landmarks.append(points if factor == 1 else fields.resize_points(points, FRAME, spatial))
    return lung_pair_set(labels, chosen, landmarks)
