"""Data sets: one function, :func:`load_pairs`, for all of them.

``phantom2d`` are drawn brains that need no download and have a known displacement; ``oasis2d`` are real label
slices from a folder in the neurite-oasis layout.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from pairdiff_core.data.oasis import find_oasis, load_oasis_pairs, slices_below
from pairdiff_core.data.phantom import brain_pairs
from pairdiff_core.pairs import DataError, PairSet

DATASETS = ("phantom2d", "oasis2d")
SPLITS = ("train", "test")
FIRST_TEST_PHANTOM = 5_000  # phantom subjects are numbered; training ones never get this far

__all__ = ["DATASETS", "SPLITS", "default_dataset", "load_pairs"]


class DataSizes(Protocol):
    """What :func:`load_pairs` asks of a profile."""

    spatial: tuple[int, ...]  # voxels
    num_labels: int  # background included
    max_pairs: int  # pairs of a split at most
    phantom_subjects: int  # training subjects of the phantom


def default_dataset(spatial_dims: int = 2) -> str:
    """The data set to use when none is named: real data where the environment names some, else the phantom.

    PAIRDIFF_OASIS2D, or a PAIRDIFF_DATA that holds such a folder, means "oasis2d". A path that does not exist
    means "oasis2d" too, so that loading it reports the mistake; the phantom would only hide it.

    Raises:
        DataError: if there is no data set with that many spatial axes.
    """
    if spatial_dims != 2:
        raise DataError(
            f"there is no data set with {spatial_dims} spatial axes; known are {', '.join(DATASETS)}"
        )
    if os.environ.get("PAIRDIFF_OASIS2D"):
        return "oasis2d"
    data = os.environ.get("PAIRDIFF_DATA")
    if data:
        folder = Path(data).expanduser()
        if not folder.is_dir() or slices_below(folder):
            return "oasis2d"
    return "phantom2d"


def load_pairs(
    dataset: str, split: str, profile: DataSizes, *, data: str | Path | None = None, seed: int = 0
) -> PairSet:
    """Pairs of a data set at the size that a profile asks for.

    Args:
        dataset: one of DATASETS.
        split: "train" or "test"; no subject is in both.
        profile: gives ``spatial``, ``num_labels``, ``max_pairs`` and ``phantom_subjects``.
        data: folder with the real data; None looks where :func:`pairdiff_core.data.oasis.find_oasis` says.
        seed: of the phantom's subjects, and of the choice where there are more than ``max_pairs`` pairs.

    Returns:
        At most ``profile.max_pairs`` ordered pairs. The phantom's come with displacement and landmarks; its
        test split has a quarter as many subjects as its training split, at least three.

    Raises:
        DataError: for an unknown data set or split, or data that is missing or not as it should be.
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
    test = split == "test"
    return brain_pairs(
        profile.max_pairs,
        spatial=profile.spatial,
        num_labels=profile.num_labels,
        seed=seed,
        subjects=max(3, profile.phantom_subjects // 4) if test else profile.phantom_subjects,
        first_subject=FIRST_TEST_PHANTOM if test else 0,
    )
