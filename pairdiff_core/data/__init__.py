"""Data sets: one function, :func:`load_pairs`, for all of them.

``phantom2d`` are drawn brains that need no download and have a known displacement; ``oasis2d`` are real label
slices from a folder in the neurite-oasis layout. ``phantom3d`` are drawn lungs, with displacement and landmarks;
``lung250m`` are real lung vessels from a folder in the layouts of Lung250M-4B.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pairdiff_core.data.lung250m import (
    LABELS,
    find_lung250m,
    load_lung250m_pairs,
    lungs_below,
    pooling_factor,
)
from pairdiff_core.data.oasis import find_oasis, load_oasis_pairs, slices_below
from pairdiff_core.data.phantom import LABEL_TABLES, SPATIAL, brain_pairs
from pairdiff_core.data.phantom_lungs import lung_pairs
from pairdiff_core.pairs import DataError, PairSet

DATASETS = {"phantom2d": 2, "oasis2d": 2, "phantom3d": 3, "lung250m": 3}  # name: spatial axes
SPLITS = ("train", "test")
FIRST_TEST_PHANTOM = 5_000  # phantom subjects are numbered; training ones never get this far

__all__ = ["DATASETS", "SPLITS", "default_dataset", "grid_affine", "label_names", "load_pairs"]


class DataSizes(Protocol):
    """What :func:`load_pairs` asks of a profile."""

    spatial: tuple[int, ...]  # voxels
    num_labels: int  # background included
    max_pairs: int  # pairs of a split at most
    phantom_subjects: int  # training subjects of the phantom


def default_dataset(spatial_dims: int = 2) -> str:
    """The data set to use when none is named: real data where the environment names some, else the phantom.

    In 2D, PAIRDIFF_OASIS2D, or a PAIRDIFF_DATA that holds such a folder, means "oasis2d"; in 3D, a PAIRDIFF_DATA that
    holds lung vessels means "lung250m". A path that does not exist means the real data too, so that loading it
    reports the mistake; the phantom would only hide it.

    Raises:
        DataError: if there is no data set with that many spatial axes.
    """
    if spatial_dims not in DATASETS.values():
        raise DataError(
            f"there is no data set with {spatial_dims} spatial axes; known are {', '.join(DATASETS)}"
        )
    phantom, real, below = (
        ("phantom2d", "oasis2d", slices_below)
        if spatial_dims == 2
        else ("phantom3d", "lung250m", lungs_below)
    )
    if spatial_dims == 2 and os.environ.get("PAIRDIFF_OASIS2D"):
        return real
    data = os.environ.get("PAIRDIFF_DATA")
    if data:
        folder = Path(data).expanduser()
        if not folder.is_dir() or below(folder):
            return real
    return phantom


def load_pairs(
    dataset: str, split: str, profile: DataSizes, *, data: str | Path | None = None, seed: int = 0
) -> PairSet:
    """Pairs of a data set at the size that a profile asks for.

    Args:
        dataset: one of DATASETS.
        split: "train" or "test"; no subject is in both. The test pairs of "lung250m" are its validation cases, see
            :func:`pairdiff_core.data.lung250m.case_files`.
        profile: gives ``spatial``, ``num_labels``, ``max_pairs`` and ``phantom_subjects``.
        data: folder with the real data; None looks where :func:`pairdiff_core.data.oasis.find_oasis` and
            :func:`pairdiff_core.data.lung250m.find_lung250m` say.
        seed: of the phantom's subjects, and of the choice where there are more than ``max_pairs`` pairs.

    Returns:
        At most ``profile.max_pairs`` ordered pairs; in 3D, a pair is one subject, breathed in and out. The
        phantoms come with displacement and landmarks; their test split has a quarter as many subjects as their
        training split, at least three.

    Raises:
        DataError: for an unknown data set or split, a size or number of labels that it does not have, or data that is
            missing or not as it should be.
    """
    if dataset not in DATASETS:
        raise DataError(f"there is no data set {dataset!r}; known are {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}; take one of {', '.join(SPLITS)}")
    if dataset == "oasis2d":
        return load_oasis_pairs(
            find_oasis(data),
            split,
            num_labels=profile.num_labels,
            spatial=profile.spatial,
            max_pairs=profile.max_pairs,
            seed=seed,
        )
    if DATASETS[dataset] == 3 and profile.num_labels != len(LABELS):
        raise DataError(
            f"the lungs have {len(LABELS)} labels (background included), not {profile.num_labels}"
        )
    if dataset == "lung250m":
        return load_lung250m_pairs(
            find_lung250m(data), split, spatial=profile.spatial, max_pairs=profile.max_pairs, seed=seed
        )
    test = split == "test"
    subjects = max(3, profile.phantom_subjects // 4) if test else profile.phantom_subjects
    first = FIRST_TEST_PHANTOM if test else 0
    if dataset == "phantom3d":
        number = min(subjects, profile.max_pairs)
        return lung_pairs(number, spatial=profile.spatial, seed=seed, first_subject=first)
    return brain_pairs(
        profile.max_pairs,
        spatial=profile.spatial,
        num_labels=profile.num_labels,
        seed=seed,
        subjects=subjects,
        first_subject=first,
    )


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
