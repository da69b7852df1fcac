"""Lung vessels in the layouts of Lung250M-4B: pairs of one person's lungs, breathed in and breathed out.

Two layouts, both in one folder if need be:

- the published, dilated vessels: ``dilated_vessels_10/`` (or ``dilated_vessels/``, all of them) for training and
  ``dilated_vessels_ts/`` for tests, with ``case_NNN_1.nii.gz`` (fixed, mostly breathed in: the larger lung) and
  ``case_NNN_2.nii.gz`` (moving, mostly breathed out). Source: github.com/multimodallearning/UnleashingRegistration.
- the label volumes of the full data set: ``segTr/`` and ``segTs/`` with ``case_NNN_1.nii.gz`` or, as its page
  has it, ``NNN_1.nii.gz``; dilated here by one voxel (the maximum over 3 x 3 x 3), as the published ones were. Assumed:
  the same voxel grids, and 0 is background. Source: github.com/multimodallearning/Lung250M-4B, "Dataset structure".

In both, labels 1 and 2 are the two vessel trees; the method keeps ``> 0``. ``segTr/`` goes before ``dilated_vessels/``
before ``dilated_vessels_10/``, so that the full data set gives all 97 training pairs; ``dilated_vessels_ts/`` goes
before ``segTs/``. Any number of cases may be there.

Every volume is padded or cropped to one frame of 256 x 208 x 256 voxels. Axis 0 runs to the patient's left, axis 1 to
the back, axis 2 upwards, in all cases: those whose header says otherwise (114 to 123) lie on the same grid all the
same, so grids are compared, never affines. :func:`case_affine` gives a case's header affine in the frame.

A voxel counts as 1 mm, as in the published errors. The headers say 0.997 to 1.002 mm, so a target registration error
in mm is off by 0.3 % at most (0.04 mm of 13.9 mm); a header more than 1 % off is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pairdiff_core.data.nifti import read_label_image
from pairdiff_core.pairs import DataError, PairSet

LUNG_FOLDER = "lung250m"
FOLDERS = {
    "train": ("segTr", "dilated_vessels", "dilated_vessels_10"),
    "test": ("dilated_vessels_ts", "segTs"),
}
RAW_FOLDERS = ("segTr", "segTs")  # not dilated yet
VALIDATION_LANDMARKS = "lms_validation_cropped.pth"
CORRESPONDENCES = "corrfieldTr"
OFFICIAL_TEST = tuple(f"case_{number}" for number in range(104, 114))  # DIR-LAB COPDgene
SPLITS = ("train", "test", "official_test")
FRAME = (256, 208, 256)  # voxels of the common frame
CANVAS, BORDER = (
    (352, 256, 352),
    (48, 32, 48),
)  # it is cut from a larger, centred one, not quite in the middle
LONGEST_LAST_AXIS = {
    "case_035": 280
}  # 451 voxels long; the reference keeps the first 280, counted from below
FACTORS = (1, 2, 4)  # coarser grids
SPACING_TOLERANCE = 0.01  # mm off 1 mm
LABELS = (("Background", (0, 0, 0)), ("Vessel", (205, 62, 78)))


def lungs_below(folder: Path) -> Path | None:
    """``folder``, or ``lung250m`` in it, if that holds one of the folders of the layouts."""
    for candidate in (folder / LUNG_FOLDER, folder):
        if any((candidate / name).is_dir() for names in FOLDERS.values() for name in names):
            return candidate
    return None


def find_lung250m(data: str | Path | None = None) -> Path:
    """The folder with the vessel volumes: ``data`` or else PAIRDIFF_DATA, itself or ``lung250m`` in it.

    Raises:
        DataError: if there is none; the message says how to get the data.
    """
    how_to = (
        "Fetch the vessels with `pairdiff fetch lung250m --to FOLDER` and set PAIRDIFF_DATA to that "
        "folder; 'phantom3d' needs no data."
    )
    places = {"data": data, "PAIRDIFF_DATA": os.environ.get("PAIRDIFF_DATA")}
    origin, place = next(((origin, place) for origin, place in places.items() if place), (None, None))
    if place is None:
        raise DataError(f"No folder with lung vessels is set. {how_to}")
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} (from {origin}) is not a folder. {how_to}")
    found = lungs_below(folder)
    if found is None:
        names = ", ".join(name for names in FOLDERS.values() for name in names)
        raise DataError(
            f"{folder} (from {origin}) holds none of {names}, nor does {LUNG_FOLDER}/ in it. {how_to}"
        )
    return found


def case_files(folder: str | Path, split: str) -> dict[str, tuple[Path, Path]]:
    """The (fixed, moving) files of each case of a split, by its name ``case_NNN``, in sorted order.

    Args:
        folder: one of the layouts.
        split: "train"; "test", the validation cases, which are all of the test folder but "official_test", the ten
            COPDgene cases 104 to 113. The public download has those; they are for a final comparison, not for choices.

    Raises:
        DataError: if there is no such split, no case of it, or a case has only one of its two files.
    """
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; take one of {', '.join(SPLITS)}")
    files = _files(Path(folder).expanduser(), "train" if split == "train" else "test")
    if split != "train":
        files = {
            case: pair
            for case, pair in files.items()
            if (case in OFFICIAL_TEST) == (split == "official_test")
        }
    if not files:
        raise DataError(
            f"{folder} holds no case of the split {split!r}. Fetch the data again, or take another split."
        )
    return files


def _files(folder: Path, kind: str) -> dict[str, tuple[Path, Path]]:
    """The files of all cases of the first folder of that kind that is there."""
    names = FOLDERS[kind]
    inside = next((folder / name for name in names if (folder / name).is_dir()), None)
    if inside is None:
        raise DataError(
            f"{folder} holds none of {', '.join(names)}. Fetch the data again, or take another folder."
        )
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(inside.iterdir()):
        match = re.fullmatch(r"(?:case_)?(\d{3})_([12])\.nii(?:\.gz)?", path.name)  # not ._case_..., of macOS
        if match:
            found.setdefault(f"case_{match[1]}", {})[match[2]] = path
    for case, pair in found.items():
        if len(pair) == 1:
            (number, path), missing = next(iter(pair.items())), {"1": "2", "2": "1"}
            raise DataError(
                f"{path} has no partner {path.name.replace(f'_{number}.nii', f'_{missing[number]}.nii')} beside it: "
                f"a pair is _1 (fixed) and _2 (moving). Add it, or take {case} out."
            )
    return {case: (found[case]["1"], found[case]["2"]) for case in sorted(found)}


def frame_offset(shape: Sequence[int]) -> tuple[int, ...]:
    """Where voxel 0 of a volume of this shape lies in the common frame; negative where the frame crops it.

    Add it to voxel coordinates of the volume to get those of the frame.
    """
    return tuple(
        (canvas - size) // 2 - border for canvas, size, border in zip(CANVAS, shape, BORDER, strict=True)
    )


def to_frame(volume: torch.Tensor) -> torch.Tensor:
    """A volume (H, W, D), padded with zeros or cropped to the common frame (256, 208, 256)."""
    before = frame_offset(volume.shape)
    after = [frame - size - pad for frame, size, pad in zip(FRAME, volume.shape, before, strict=True)]
    pads = [pad for axis in (2, 1, 0) for pad in (before[axis], after[axis])]  # the last axis comes first
    return F.pad(volume, pads)


def pooling_factor(spatial: Sequence[int]) -> int:
    """How many times coarser than the common frame a grid is: 1, 2 or 4.

    Raises:
        DataError: for another grid; its voxels would not be blocks of those of the frame.
    """
    grids = {tuple(size // factor for size in FRAME): factor for factor in FACTORS}
    if tuple(spatial) not in grids:
        raise DataError(f"the lungs come on the grids {', '.join(map(str, grids))}, not on {tuple(spatial)}")
    return grids[tuple(spatial)]


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
        raise DataError(
            f"{path} has voxels of {' x '.join(f'{mm:g}' for mm in spacing)} mm; all of this data set has 1 mm. "
            "Resample it to 1 mm by nearest neighbour."
        )
    if values.min() < 0:
        raise DataError(f"{path} holds the value {values.min():g}; labels are 0, 1 and 2. Export it again.")
    mask = torch.from_numpy((values > 0).astype(np.uint8))
    if path.parent.name in RAW_FOLDERS:
        mask = F.max_pool3d(mask[None], 3, stride=1, padding=1)[0]
    return mask[:, :, : LONGEST_LAST_AXIS.get(case)]


def case_affine(folder: str | Path, case: str, spatial: Sequence[int] = FRAME) -> np.ndarray:
    """Voxel-to-world matrix (4, 4) in mm, RAS, of a case ("case_032") on a grid of the common frame.

    What the header of the fixed image says, moved by the crop and scaled by the pooling: an image saved with it
    overlays the original file in a viewer. For cases 114 to 123 the header does not tell left from right nor front
    from back correctly.

    Raises:
        DataError: for a case that is not there, or a grid that is not one of the frame's.
    """
    folder, factor = Path(folder).expanduser(), pooling_factor(spatial)
    kinds = [kind for kind, names in FOLDERS.items() if any((folder / name).is_dir() for name in names)]
    files = {case: pair for kind in kinds for case, pair in _files(folder, kind).items()}
    if case not in files:
        raise DataError(f"{folder} holds no {case}; there are {', '.join(files) or 'no cases'}.")
    values, image = read_label_image(files[case][0])
    shape = values[:, :, : LONGEST_LAST_AXIS.get(case)].shape
    to_volume = np.diag([float(factor)] * 3 + [1.0])  # from voxels of the grid to voxels of the file
    to_volume[:3, 3] = (factor - 1) / 2 - np.array(frame_offset(shape))
    return image.affine @ to_volume


def read_correspondences(path: str | Path, offset: Sequence[int]) -> torch.Tensor:
    """Automatic correspondences of a training pair, float (K, 2, 3), in voxels of the common frame.

    Args:
        path: a line ``fixed x, y, z, moving x, y, z`` each, in voxels of the whole volume.
        offset: of that volume, see :func:`frame_offset`.

    Those with a point outside the frame are left out: there is no vessel to find them by.

    Raises:
        DataError: if the file is anything but lines of six numbers.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").strip().splitlines()
        values = torch.tensor([[float(word) for word in line.split(",")] for line in lines])
    except ValueError as error:  # a UnicodeDecodeError is one, too
        raise DataError(f"{path} is not a table of numbers ({error}). Fetch it again.") from error
    if values.dim() != 2 or values.shape[1] != 6 or not values.isfinite().all():
        raise DataError(f"{path} must hold six numbers a line, fixed x,y,z,moving x,y,z. Fetch it again.")
    points = values.reshape(-1, 2, 3) + torch.tensor(offset)  # (K, 6) -> (K, 2, 3)
    inside = ((points >= -0.5) & (points < torch.tensor(FRAME) - 0.5)).flatten(1).all(1)
    return points[inside]


def read_validation_landmarks(path: str | Path, cases: Sequence[str]) -> dict[str, torch.Tensor]:
    """Landmarks of test cases, by case, float (K, 2, 3) in voxels of the common frame.

    The file is a list of two lists, fixed and moving, of one tensor (K, 3) a case, in the order of the sorted cases
    but without their names. Which cases these are follows from how many there are: all of ``cases``; ``cases``
    without the ten official test cases; or ``cases`` and those ten, as in the public file, when only the volumes of
    the others are there.

    Args:
        path: ``lms_validation_cropped.pth``.
        cases: names of all cases in the test folder.

    Raises:
        DataError: if the file is not of that form, or has landmarks of another number of cases.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")  # they were saved on a GPU
    except Exception as error:  # the unpickler raises whatever a damaged file happens to lead to
        raise DataError(f"{path} is damaged or holds more than tensors ({error}). Fetch it again.") from error
    if not _is_landmarks(content):
        raise DataError(
            f"{path} must be a list of two lists, fixed and moving, of one tensor (K, 3) a case, of finite numbers "
            "and as many in both. Fetch it again."
        )
    points = [torch.stack([fixed, moving], 1).float() for fixed, moving in zip(*content, strict=True)]
    present, official = set(cases), set(OFFICIAL_TEST)
    for covered in (present, present - official, present | official):
        if len(points) == len(covered):
            return dict(zip(sorted(covered), points, strict=True))
    raise DataError(
        f"{path} has landmarks of {len(points)} cases, but there are {len(present)} cases ({len(present - official)} "
        "without the official test cases). Fetch both again, so that they belong together."
    )


def _is_landmarks(content: object) -> bool:
    if not (isinstance(content, (list, tuple)) and len(content) == 2):
        return False
    if not all(isinstance(part, (list, tuple)) for part in content) or len(content[0]) != len(content[1]):
        return False
    return all(
        isinstance(fixed, torch.Tensor)
        and isinstance(moving, torch.Tensor)
        and fixed.shape == moving.shape == (fixed.numel() // 3, 3)
        and bool(fixed.isfinite().all() and moving.isfinite().all())
        for fixed, moving in zip(*content, strict=True)
    )


def load_lung250m_pairs(
    folder: str | Path,
    split: str,
    *,
    spatial: Sequence[int] = FRAME,
    max_pairs: int | None = None,
    seed: int = 0,
) -> PairSet:
    """Vessel pairs of one split, with landmarks where the folder has them.

    Args:
        folder: one of the layouts, or both (see the module).
        split: "train", "test" (the validation cases) or "official_test".
        spatial: the common frame, (256, 208, 256), or its half or quarter. Coarser grids by maximum, so that no vessel
            is lost; for vessel *fractions* load the frame and average it with ``registration.pool``.
        max_pairs: of more pairs than this a random choice is taken, in their order; None takes all.
        seed: of that choice.

    Returns:
        Labels 0 and 1, 27 MB a pair at full size, named ``case_032_1~case_032_2``. Landmarks: of test cases those of
        ``lms_validation_cropped.pth``, of training cases the automatic correspondences in ``corrfieldTr/``; a case
        that has none has an empty (0, 2, 3), and ``landmarks`` is None if no case has any.

    Raises:
        DataError: for anything in the folder that is not as the layout says; the message names the file.
    """
    folder, factor = Path(folder).expanduser(), pooling_factor(spatial)
    files = case_files(folder, split)
    chosen = list(files)
    if max_pairs is not None and len(chosen) > max_pairs:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = [chosen[index] for index in order[:max_pairs].sort().values.tolist()]
    known: dict[str, torch.Tensor] = {}
    if split != "train" and (folder / VALIDATION_LANDMARKS).is_file():
        known = read_validation_landmarks(folder / VALIDATION_LANDMARKS, list(_files(folder, "test")))
    names, colours = zip(*LABELS, strict=True)
    labels = torch.empty((len(chosen), 2, *spatial), dtype=torch.uint8)
    landmarks = []
    for index, case in enumerate(chosen):  # one at a time, pooled at once: full-size volumes add up
        masks, points = _read_pair(case, files[case]), known.get(case)
        if split == "train" and (folder / CORRESPONDENCES / f"{case}.csv").is_file():
            path = folder / CORRESPONDENCES / f"{case}.csv"
            points = read_correspondences(path, frame_offset(masks[0].shape))
        points = torch.empty((0, 2, 3)) if points is None else points
        framed = torch.stack([to_frame(mask) for mask in masks])[
            None
        ]  # 2 x (H, W, D) -> (1, 2, 256, 208, 256)
        for path, mask in zip(files[case], framed[0], strict=True):
            if not mask.any():
                raise DataError(
                    f"{path} holds no vessel (a value above 0) in the common frame. Fetch it again."
                )
        pair = PairSet(framed, names, (1.0,) * 3, (case,), landmarks=(points,)).pooled(factor)
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


def _read_pair(case: str, paths: tuple[Path, Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """The fixed and the moving mask of a case, each uint8 (H, W, D), on one grid."""
    fixed, moving = (read_vessels(path, case) for path in paths)
    if fixed.shape != moving.shape:
        raise DataError(
            f"{paths[1]} has shape {tuple(moving.shape)}, but {paths[0]} has {tuple(fixed.shape)}. The two images of a "
            "pair lie on one voxel grid: resample one of them, or take the case out."
        )
    return fixed, moving
