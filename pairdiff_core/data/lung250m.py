"""Lung vessels in the layouts of Lung250M-4B: pairs of one person's lungs, breathed in and breathed out.

One folder holds either layout, or both:

- the published, dilated vessels (github.com/multimodallearning/UnleashingRegistration): ``dilated_vessels_10/`` (or
  ``dilated_vessels/``, all of them) for training and ``dilated_vessels_ts/`` for validation and test, with
  ``case_NNN_1.nii.gz`` (fixed, mostly breathed in: the larger lung) and ``case_NNN_2.nii.gz`` (moving).
- the label volumes of the full data set: ``segTr/`` and ``segTs/`` with ``case_NNN_1.nii.gz`` or, as its page
  has it, ``NNN_1.nii.gz``; dilated here by one voxel (the maximum over 3 x 3 x 3), as the published ones were. Assumed:
  the same voxel grids, and 0 is background. Source: github.com/multimodallearning/Lung250M-4B, "Dataset structure".

In both, labels 1 and 2 are the two vessel trees; the method keeps ``> 0``. ``segTr/`` goes before ``dilated_vessels/``
before ``dilated_vessels_10/``, so that the full data set gives all 97 training pairs; ``dilated_vessels_ts/`` goes
before ``segTs/``. Any number of cases may be there.

Every volume is padded or cropped to one frame of 256 x 208 x 256 voxels. Axis 0 runs to the patient's left, axis 1 to
the back, axis 2 upwards, in all cases. The headers of cases 114 to 123 say otherwise although their voxels lie on the
same grid, so grids are compared, never affines. :func:`case_affine` gives a case's header affine in the frame.

A voxel counts as 1 mm, as in the published errors. The headers say 0.997 to 1.002 mm, so a target registration error
in mm is off by 0.3 % at most (0.04 mm of 13.9 mm); a header more than 1 % off is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pairdiff_core.data.folders import find_folder
from pairdiff_core.data.lung_frame import FRAME, LABELS, frame_offset, pooling_factor, to_frame
from pairdiff_core.data.nifti import read_label_image
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet

LUNG_FOLDER = "lung250m"
HELD_OUT_FOLDERS = ("dilated_vessels_ts", "segTs")
TRAIN_FOLDERS = ("segTr", "dilated_vessels", "dilated_vessels_10")
FOLDERS = {"train": TRAIN_FOLDERS, "validation": HELD_OUT_FOLDERS, "test": HELD_OUT_FOLDERS}  # the first that is there
RAW_FOLDERS = ("segTr", "segTs")  # not dilated yet
VALIDATION_LANDMARKS = "lms_validation_cropped.pth"
CORRESPONDENCES = "corrfieldTr"
OFFICIAL_TEST = tuple(f"case_{number}" for number in range(104, 114))  # DIR-LAB COPDgene
LONGEST_LAST_AXIS = {"case_035": 280}  # of 451 voxels; the reference keeps the first 280, counted from below
SPACING_TOLERANCE = 0.01  # mm off 1 mm


def find_lung250m(data: str | Path | None = None) -> Path:
    """The folder with the vessel volumes: ``data`` or else PAIRDIFF_DATA, itself or ``lung250m`` in it.

    If there is none, a DataError says how to get the data.
    """
    how_to = (
        "Fetch the vessels with `pairdiff fetch lung250m --to FOLDER` and set PAIRDIFF_DATA to that folder; "
        "'phantom3d' needs no data."
    )
    return find_folder(data, ("PAIRDIFF_DATA",), (LUNG_FOLDER,), (*TRAIN_FOLDERS, *HELD_OUT_FOLDERS), how_to)


def case_files(folder: str | Path, split: str) -> dict[str, tuple[Path, Path]]:
    """The (fixed, moving) files of each case of a split, by its name ``case_NNN``, in sorted order.

    Args:
        folder: one of the layouts.
        split: "train"; "validation", the held-out cases but for the ten official test cases 104 to 113 (COPDgene); or
            "test", just those ten. The public download has them; they are for a final comparison, not for choices.

    Raises:
        DataError: if there is no such split, no case of it, or a case has only one of its two files.
    """
    if split not in FOLDERS:
        raise DataError(f"there is no split {split!r}; take one of {', '.join(FOLDERS)}")
    found = _files(Path(folder).expanduser(), split)
    cases = [case for case in found if split == "train" or (case in OFFICIAL_TEST) == (split == "test")]
    if not cases:
        only = ", only official test cases: the split 'test'" if found and split == "validation" else ""
        looked = " or ".join(FOLDERS[split])
        raise DataError(f"{folder} holds no case of the split {split!r} in {looked}{only}. Fetch the data again.")
    return {case: found[case] for case in cases}


def _files(folder: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """The files of all cases in the folder of a split, whichever of the held-out cases the split takes."""
    inside = next((folder / name for name in FOLDERS[split] if (folder / name).is_dir()), None)
    if inside is None:
        return {}
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(inside.iterdir()):
        match = re.fullmatch(r"(?:case_)?(\d{3})_([12])\.nii(?:\.gz)?", path.name)  # not ._case_..., of macOS
        if match:
            found.setdefault(f"case_{match[1]}", {})[match[2]] = path
    for case, pair in found.items():
        if len(pair) == 1:
            (number, path), partner = next(iter(pair.items())), {"1": "2 (moving)", "2": "1 (fixed)"}
            raise DataError(f"{path} has no partner _{partner[number]}. Add it, or take {case} out.")
    return {case: (found[case]["1"], found[case]["2"]) for case in sorted(found)}


def read_vessels(path: str | Path, case: str) -> torch.Tensor:
    """One vessel mask, uint8 (H, W, D) of 0 and 1, dilated if the file is not; the last axis of case_035 is cut.

    Raises:
        DataError: if the file is no readable NIfTI of labels, is no volume, or has voxels that are not of 1 mm.
    """
    path = Path(path)
    values, image = read_label_image(path)
    if values.ndim != 3:
        raise DataError(f"{path} has shape {values.shape}; expected one volume, (H, W, D).")
    spacing = [float(mm) for mm in image.header.get_zooms()]
    if any(abs(mm - 1) > SPACING_TOLERANCE for mm in spacing):
        millimetres = " x ".join(f"{mm:g}" for mm in spacing)
        raise DataError(f"{path} has voxels of {millimetres} mm. Resample it to 1 mm by nearest neighbour.")
    if values.min() < 0:
        raise DataError(f"{path} holds the value {values.min():g}; labels are 0, 1 and 2. Export it again.")
    mask = torch.from_numpy((values > 0).astype(np.uint8))
    if path.parent.name in RAW_FOLDERS:
        mask = F.max_pool3d(mask[None], 3, stride=1, padding=1)[0]
    return mask[:, :, : LONGEST_LAST_AXIS.get(case)]


def case_affine(folder: str | Path, case: str, spatial: Sequence[int] = FRAME) -> np.ndarray:
    """Voxel-to-world matrix (4, 4) in mm, RAS, of a case ("case_032") on a grid of the common frame.

    It is the header of the fixed image, moved by the crop and scaled by the pooling: an image saved with it overlays
    the original file in a viewer. The headers of cases 114 to 123 confuse left with right and front with back.

    Raises:
        DataError: for a case that is not there, or a grid that is not one of the frame's.
    """
    folder, factor = Path(folder).expanduser(), pooling_factor(spatial)
    files = _files(folder, "train") | _files(folder, "validation")
    if case not in files:
        raise DataError(f"{folder} holds no {case}; there are {', '.join(files) or 'no cases'}.")
    values, image = read_label_image(files[case][0])
    shape = values[:, :, : LONGEST_LAST_AXIS.get(case)].shape
    to_volume = np.diag([float(factor)] * 3 + [1.0])  # from voxels of the grid to voxels of the file
    to_volume[:3, 3] = (factor - 1) / 2 - np.array(frame_offset(shape))
    return image.affine @ to_volume


def read_correspondences(path: str | Path, offset: Sequence[int]) -> torch.Tensor:
    """Automatic correspondences of a training pair, float (K, 2, 3), in voxels of the common frame.

    They were computed from the CTs, not from the vessels. Those with a point outside the frame are left out: there
    is no vessel to find them by.

    Args:
        path: lines of ``fixed x, y, z, moving x, y, z`` in voxels of the whole volume.
        offset: of that volume, see :func:`pairdiff_core.data.lung_frame.frame_offset`.

    Raises:
        DataError: if the file is anything but lines of six numbers.
    """
    try:
        table = np.loadtxt(path, np.float32, delimiter=",", ndmin=2, encoding="utf-8")
    except ValueError as error:  # a UnicodeDecodeError is one, too
        raise DataError(f"{path} is not a table of numbers ({error}). Fetch it again.") from error
    if table.shape[1] != 6 or not np.isfinite(table).all():
        raise DataError(f"{path} must hold six numbers a line, fixed x,y,z,moving x,y,z. Fetch it again.")
    points = torch.from_numpy(table).reshape(-1, 2, 3) + torch.tensor(offset)  # (K, 6) -> (K, 2, 3)
    inside = ((points >= -0.5) & (points < torch.tensor(FRAME) - 0.5)).flatten(1).all(1)
    return points[inside]


def read_validation_landmarks(path: str | Path, cases: Sequence[str]) -> dict[str, torch.Tensor]:
    """Landmarks of held-out cases, by case, float (K, 2, 3) in voxels of the common frame.

    The file is a list of two lists, fixed and moving, of one tensor (K, 3) a case, in the order of the sorted cases
    but without their names. Which cases these are follows from their number: all of ``cases``; ``cases`` without the
    ten official test cases; or ``cases`` and those ten, as in the public file, when only the volumes of the others
    are there.

    Args:
        path: ``lms_validation_cropped.pth``.
        cases: names of all held-out cases whose volumes are there.

    Raises:
        DataError: if the file is not of that form, or has landmarks of another number of cases.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")  # they were saved on a GPU
    except Exception as error:  # the unpickler raises whatever a damaged file happens to lead to
        raise DataError(f"{path} is damaged or holds more than tensors ({error}). Fetch it again.") from error
    try:
        points = [torch.stack(pair, 1).float() for pair in zip(*content, strict=True)]
        valid = len(content) == 2 and all(p.shape[1:] == (2, 3) and p.isfinite().all() for p in points)
    except (TypeError, ValueError, IndexError, RuntimeError):
        valid = False
    if not valid:
        raise DataError(
            f"{path} must be a list of two lists, fixed and moving, of one tensor (K, 3) a case, of finite numbers "
            "and as many in both. Fetch it again."
        )
    present, official = set(cases), set(OFFICIAL_TEST)
    for covered in (present, present - official, present | official):
        if len(points) == len(covered):
            return dict(zip(sorted(covered), points, strict=True))
    raise DataError(
        f"{path} has landmarks of {len(points)} cases, but there are {len(present)} cases ({len(present - official)} "
        "without the official test cases). Fetch both again, so that they belong together."
    )


def load_lung250m_pairs(
    folder: str | Path,
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
        cases: only these ("case_008", "008" or "8"), in sorted order and whatever ``max_pairs`` is; without any, all.
        spatial: the common frame, (256, 208, 256), or its half or quarter. Coarser grids by maximum, so that no vessel
            is lost; for vessel *fractions* load the frame and average it with ``registration.pool``.
        max_pairs: of more pairs than this a random choice is taken, in their order; None takes all.
        seed: of that choice.

    Returns:
        Labels 0 and 1, 27 MB a pair at full size, named ``case_032_1~case_032_2``. Landmarks: of held-out cases those
        of ``lms_validation_cropped.pth``, of training cases the automatic correspondences in ``corrfieldTr/``; a case
        that has none has an empty (0, 2, 3), and ``landmarks`` is None if no case has any.

    Raises:
        DataError: for an unknown case, and for anything in the folder that is not as the layout says; the message
            names the file.
    """
    folder, factor = Path(folder).expanduser(), pooling_factor(spatial)
    files = case_files(folder, split)
    chosen = list(files)
    if cases:
        chosen = sorted({f"case_{case.removeprefix('case_').zfill(3)}" for case in cases})
        unknown = [case for case in chosen if case not in files]
        if unknown:
            there = ", ".join(files)
            raise DataError(f"the split {split!r} of {folder} has no {', '.join(unknown)}; there are {there}")
    elif max_pairs is not None and len(chosen) > max_pairs:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = [chosen[index] for index in order[:max_pairs].sort().values.tolist()]
    landmark_file, known = folder / VALIDATION_LANDMARKS, {}
    if split != "train" and landmark_file.is_file():
        known = read_validation_landmarks(landmark_file, list(_files(folder, split)))
    names, colours = zip(*LABELS, strict=True)
    labels = torch.empty((len(chosen), 2, *spatial), dtype=torch.uint8)
    landmarks = []
    for index, case in enumerate(chosen):  # one at a time, pooled at once: full-size volumes add up
        fixed, moving = masks = [read_vessels(path, case) for path in files[case]]
        if fixed.shape != moving.shape:
            raise DataError(
                f"{files[case][1]} has shape {tuple(moving.shape)}, but {files[case][0]} has {tuple(fixed.shape)}. The "
                "two images of a pair lie on one voxel grid: resample one of them, or take the case out."
            )
        points, table = known.get(case, torch.empty((0, 2, 3))), folder / CORRESPONDENCES / f"{case}.csv"
        if split == "train" and table.is_file():
            points = read_correspondences(table, frame_offset(fixed.shape))
        framed = torch.stack([to_frame(mask) for mask in masks])  # 2 x (H, W, D) -> (2, 256, 208, 256)
        for path, mask in zip(files[case], framed, strict=True):
            if not mask.any():
                raise DataError(f"{path} holds no vessel in the common frame. Fetch it again.")
        pair = PairSet(framed[None], names, (1.0,) * 3, (case,), landmarks=(points,)).pooled(factor)
        labels[index] = pair.labels[0]
        landmarks += pair.landmarks or ()
    return PairSet(
        labels=labels,
        label_names=names,
        spacing=(float(factor),) * 3,
        names=tuple(f"{case}_1~{case}_2" for case in chosen),
        landmarks=tuple(landmarks) if any(len(points) for points in landmarks) else None,
        label_colours=colours,
    )
