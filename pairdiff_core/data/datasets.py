"""Access to all data sets: their names, their splits, and the function that loads pairs of any of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pairdiff_core.data import lung250m, oasis, own
from pairdiff_core.data.description import DataDescription
from pairdiff_core.data.lung_frame import LABELS, pooling_factor
from pairdiff_core.data.phantom_brains import LABEL_TABLES as BRAIN_LABELS
from pairdiff_core.data.phantom_brains import SPATIAL, brain_pairs
from pairdiff_core.data.phantom_lungs import lung_pairs
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import DATASETS, OWN, SPLITS, Profile

LABEL_TABLES = {2: BRAIN_LABELS, 3: {len(LABELS): LABELS}}  # by spatial axes and number of labels
FOLDERS = {"oasis2d": oasis.find_oasis, "lung250m": lung250m.find_lung250m, OWN: own.find_own}  # of the real data
FIRST_VALIDATION_PHANTOM = 5_000  # number of the first validation subject; training numbers are smaller


def default_dataset(spatial_dims: int = 2) -> str:
    """The data set to use when none is named: real data if the environment names some, else the phantom.

    A path that does not exist also selects the real data, so that loading them reports the mistake.

    Args:
        spatial_dims: 2, for "oasis2d" or "phantom2d", or 3, for "lung250m" or "phantom3d".
    """
    phantom, real = (name for name, dims in DATASETS.items() if dims == spatial_dims)
    data = os.environ.get("PAIRDIFF_DATA")
    mistyped = data and not Path(data).expanduser().is_dir()
    if mistyped or (real == "oasis2d" and os.environ.get("PAIRDIFF_OASIS2D")):
        return real
    try:
        FOLDERS[real]()
    except DataError:
        return phantom
    return real


def load_pairs(
    dataset: str,
    split: str,
    profile: Profile,
    *,
    data: str | Path | None = None,
    seed: int = 0,
    cases: Sequence[str] | None = None,
) -> PairSet:
    """Pairs of a data set at the size that a profile asks for.

    Args:
        dataset: one of DATASETS, or "own" for a folder that `pairdiff prepare` wrote.
        split: "train", or "validation" for the held-out subjects; no subject is in both. "lung250m" has a third one,
            "test", for a final comparison: its ten official test cases. "own" has those that were prepared.
        profile: gives ``spatial``, ``num_labels``, ``max_pairs`` and ``phantom_subjects``. For "own", the first two
            must be those of the folder, as :func:`pairdiff_core.pipeline.profile_for` makes them.
        data: folder with the real data; None takes the one that PAIRDIFF_OASIS2D or PAIRDIFF_DATA names.
        seed: of the phantom's subjects, and of the choice if there are more than ``max_pairs`` pairs.
        cases: of "lung250m", exactly these cases ("case_008", "008" or "8"); None takes the split.

    Returns:
        At most ``profile.max_pairs`` ordered pairs; in 3D, a pair is one subject, breathed in and out. Phantoms have a
        displacement and landmarks; their validation split has a quarter as many subjects as their training split, but
        at least three.

    Raises:
        DataError: for an unknown data set, split or case, a size or number of labels that it does not have, or data
            that is missing or invalid.
    """
    if dataset not in (*DATASETS, OWN):
        raise DataError(f"there is no data set {dataset!r}; choose one of {', '.join((*DATASETS, OWN))}")
    splits = SPLITS if dataset in ("lung250m", OWN) else SPLITS[:2]
    if split not in splits:
        raise DataError(f"{dataset} has no split {split!r}; choose one of {', '.join(splits)}")
    if cases and dataset != "lung250m":
        raise DataError(f"{dataset} has no cases to choose; only lung250m has")
    if dataset == OWN:
        return _own_pairs(split, profile, data, seed)
    dims, choices = DATASETS[dataset], LABEL_TABLES[DATASETS[dataset]]
    if profile.num_labels not in choices:
        known = " or ".join(map(str, choices))
        raise DataError(f"{dataset} has {known} labels (background included), not {profile.num_labels}")
    size = {"spatial": profile.spatial, "seed": seed}
    if dataset == "lung250m":
        folder = lung250m.find_lung250m(data)
        return lung250m.load_lung250m_pairs(folder, split, cases=cases, max_pairs=profile.max_pairs, **size)
    if dims == 2:
        size["num_labels"] = profile.num_labels
    if dataset == "oasis2d":
        return oasis.load_oasis_pairs(oasis.find_oasis(data), split, max_pairs=profile.max_pairs, **size)
    subjects, first = profile.phantom_subjects, 0
    if split == "validation":
        subjects, first = max(3, subjects // 4), FIRST_VALIDATION_PHANTOM
    if dataset == "phantom3d":
        return lung_pairs(min(subjects, profile.max_pairs), first_subject=first, **size)
    return brain_pairs(profile.max_pairs, subjects=subjects, first_subject=first, **size)


def _own_pairs(split: str, profile: Profile, data: str | Path | None, seed: int) -> PairSet:
    pairs = own.load_own_pairs(data, split, max_pairs=profile.max_pairs, seed=seed)
    if (pairs.spatial, pairs.num_labels) != (tuple(profile.spatial), profile.num_labels):
        raise DataError(
            f"{own.find_own(data)} has a grid of {pairs.spatial} voxels and {pairs.num_labels} labels, but the profile "
            f"has {tuple(profile.spatial)} and {profile.num_labels}. Take the profile from pipeline.profile_for."
        )
    return pairs


def data_files(dataset: str, data: str | Path | None = None) -> list[Path]:
    """The files of a real data set, sorted; an empty list for a phantom.

    Raises:
        DataError: if they are missing.
    """
    if dataset not in FOLDERS:
        return []
    return sorted(path for path in FOLDERS[dataset](data).resolve().rglob("*") if path.is_file())


def describe_data(dataset: str, profile: Profile, data: str | Path | None = None) -> DataDescription:
    """The labels of a data set and the place of its grid, at the size that a profile asks for.

    Args:
        data: folder of the data set "own"; the others need none.

    Raises:
        DataError: if that folder is missing or damaged.
        KeyError: for a number of labels that the data set does not have.
    """
    if dataset == OWN:
        return own.read_own(data).described
    names, colours = zip(*LABEL_TABLES[DATASETS[dataset]][profile.num_labels], strict=True)
    affine = tuple(map(tuple, grid_affine(dataset, profile.spatial).tolist()))
    return DataDescription(names, tuple(range(profile.num_labels)), affine, colours)


def grid_affine(dataset: str, spatial: Sequence[int]) -> np.ndarray:
    """Voxel-to-world matrix (4, 4), mm, RAS, of a data set's common field of view on a grid, for viewers.

    For lungs, axis 0 runs to the patient's left, axis 1 to the back, and axis 2 upwards, as in most original files. For
    coronal slices, axis 0 runs to the right, axis 1 downwards, and a third axis of 1 mm to the front. The origin is the
    centre of the first voxel of the field of view at 1 mm, for every grid.

    Raises:
        DataError: for a grid of lungs that is not one of the frame's.
    """
    if DATASETS[dataset] == 3:
        spacing = [float(pooling_factor(spatial))] * 3
        directions = np.diag([-1.0, -1.0, 1.0])  # a column for each array axis
    else:
        spacing = [*(mm / size for mm, size in zip(SPATIAL, spatial, strict=True)), 1.0]
        directions = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = directions @ ((np.array(spacing) - 1) / 2)
    return affine
