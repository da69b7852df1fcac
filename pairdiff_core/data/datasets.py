"""One way in to all data sets: their names, their splits, and the function that loads pairs of any of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pairdiff_core.data import lung250m, oasis
from pairdiff_core.data.lung_frame import LABELS, pooling_factor
from pairdiff_core.data.phantom_brains import LABEL_TABLES, SPATIAL, brain_pairs
from pairdiff_core.data.phantom_lungs import lung_pairs
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Profile

DATASETS = {"phantom2d": 2, "oasis2d": 2, "phantom3d": 3, "lung250m": 3}  # name: spatial axes
SPLITS = ("train", "validation", "test")
FIRST_VALIDATION_PHANTOM = 5_000  # phantom subjects are numbered; training ones never get this far


def default_dataset(spatial_dims: int = 2) -> str:
    """The data set to use when none is named: real data where the environment names some, else the phantom.

    In 2D, PAIRDIFF_OASIS2D, or a PAIRDIFF_DATA that holds such a folder, means "oasis2d"; in 3D, a PAIRDIFF_DATA that
    holds lung vessels means "lung250m". A path that does not exist means the real data too, so that loading it
    reports the mistake; the phantom would only hide it.

    Raises:
        DataError: if there is no data set with that many spatial axes.
    """
    if spatial_dims not in DATASETS.values():
        raise DataError(f"no data set has {spatial_dims} spatial axes; known are {', '.join(DATASETS)}")
    phantom, real = (name for name, dims in DATASETS.items() if dims == spatial_dims)
    data = os.environ.get("PAIRDIFF_DATA")
    mistyped = data and not Path(data).expanduser().is_dir()
    if mistyped or (real == "oasis2d" and os.environ.get("PAIRDIFF_OASIS2D")):
        return real
    try:
        (oasis.find_oasis if real == "oasis2d" else lung250m.find_lung250m)()
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
        dataset: one of DATASETS.
        split: "train", or "validation" for the held-out subjects; no subject is in both. "lung250m" has a third one,
            "test", for a final comparison: its ten official test cases.
        profile: gives ``spatial``, ``num_labels``, ``max_pairs`` and ``phantom_subjects``.
        data: folder with the real data; None looks where :func:`pairdiff_core.data.oasis.find_oasis` and
            :func:`pairdiff_core.data.lung250m.find_lung250m` say.
        seed: of the phantom's subjects, and of the choice where there are more than ``max_pairs`` pairs.
        cases: of "lung250m" only these cases ("case_008", "008" or "8"), all of them; without any, all of the split.

    Returns:
        At most ``profile.max_pairs`` ordered pairs; in 3D, a pair is one subject, breathed in and out. The
        phantoms come with displacement and landmarks; their validation split has a quarter as many subjects as their
        training split, at least three.

    Raises:
        DataError: for an unknown data set, split or case, a size or number of labels that it does not have, or data
            that is missing or not as it should be.
    """
    if dataset not in DATASETS:
        raise DataError(f"there is no data set {dataset!r}; known are {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; take one of {', '.join(SPLITS)}")
    if dataset != "lung250m" and split == "test":
        raise DataError(f"{dataset} has no split 'test': its held-out subjects are the split 'validation'")
    if dataset != "lung250m" and cases:
        raise DataError(f"{dataset} has no cases to choose; only lung250m has")
    size = {"spatial": profile.spatial, "seed": seed}
    if dataset == "oasis2d":
        labels = {"num_labels": profile.num_labels, "max_pairs": profile.max_pairs}
        return oasis.load_oasis_pairs(oasis.find_oasis(data), split, **labels, **size)
    if DATASETS[dataset] == 3 and profile.num_labels != len(LABELS):
        raise DataError(f"the lungs have 2 labels (background included), not {profile.num_labels}")
    if dataset == "lung250m":
        folder = lung250m.find_lung250m(data)
        return lung250m.load_lung250m_pairs(folder, split, cases=cases, max_pairs=profile.max_pairs, **size)
    subjects, first = profile.phantom_subjects, 0
    if split == "validation":
        subjects, first = max(3, subjects // 4), FIRST_VALIDATION_PHANTOM
    if dataset == "phantom3d":
        return lung_pairs(min(subjects, profile.max_pairs), first_subject=first, **size)
    labels = {"num_labels": profile.num_labels, "subjects": subjects}
    return brain_pairs(profile.max_pairs, first_subject=first, **labels, **size)


def label_names(dataset: str, num_labels: int) -> tuple[str, ...]:
    """Names of the labels of a data set, index = label value, as far as they are known without the data.

    Raises:
        KeyError: for an unknown data set, or slices that do not have so many labels.
    """
    table = LABELS if DATASETS[dataset] == 3 else LABEL_TABLES[num_labels]
    return tuple(name for name, _ in table)


def grid_affine(dataset: str, spatial: Sequence[int]) -> np.ndarray:
    """Voxel-to-world matrix (4, 4), mm, RAS, of a data set's common field of view on a grid; no data are needed.

    Lungs: axis 0 to the patient's left, 1 to the back, 2 upwards, so that a viewer shows them as it does the original
    files. Slices, coronal: axis 0 to the right, 1 downwards, and one of 1 mm to the front. Millimetre 0 is the
    centre of the first voxel of the field of view at 1 mm, whatever the grid.

    Raises:
        DataError: for a grid of the lungs that is not one of the frame's.
        KeyError: for an unknown data set.
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
