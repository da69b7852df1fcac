"""Label maps of your own: pairs in a folder that ``pairdiff prepare`` wrote.

The folder is a data set in the format of Learn2Reg, as ``pairdiff export`` also writes it: ``imagesTr`` has one NIfTI
file for each image, and ``PairDiff-own_dataset.json`` lists the pairs of each split. So any viewer can show what a
network learns from, with its position and voxel size, and other programs can train on it. One safetensors file would
load faster, but nothing else could read it. PairDiff adds four keys to the description: ``label_values``, ``affine``,
``provenance``, and a ``name`` for each pair.

All images share one grid and have the labels 0 to C - 1. Slices are stored as (X, Y, 1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pairdiff_core.data.description import DataDescription, description_from_json
from pairdiff_core.data.folders import find_folder, random_choice
from pairdiff_core.data.image_files import read_label_image
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet

DESCRIPTION = "PairDiff-own_dataset.json"
SPLIT_KEYS = {"train": "training_paired_images", "validation": "registration_val", "test": "registration_test"}


@dataclass(frozen=True, eq=False)
class OwnData:
    """The description of a prepared folder."""

    path: Path  # of the JSON file
    spatial: tuple[int, ...]  # voxels of the common grid
    described: DataDescription
    splits: Mapping[str, list[dict[str, str]]]  # each pair has "fixed" and "moving", files, and "name"


def find_own(data: str | Path | None = None) -> Path:
    """The prepared folder that ``data`` or else PAIRDIFF_DATA names; a DataError if there is none."""
    how_to = "Prepare your label maps with `pairdiff prepare FIXED MOVING --to FOLDER`, and give --data FOLDER."
    return find_folder(data, ("PAIRDIFF_DATA",), (), (DESCRIPTION,), how_to)


def read_own(data: str | Path | None = None) -> OwnData:
    """Read the description of a prepared folder, see :func:`find_own`.

    Raises:
        DataError: if the folder or its description is missing or damaged; the message names the file.
    """
    path = find_own(data) / DESCRIPTION
    try:
        content = json.loads(path.read_text())
        dims = int(content["tensorImageSize"]["0"].removesuffix("D"))
        spatial = tuple(map(int, content["tensorImageShape"]["0"][:dims]))
        splits = {split: [_entry(each) for each in content[key]] for split, key in SPLIT_KEYS.items()}
        return OwnData(path, spatial, description_from_json(content), splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged or incomplete ({error!r}). Prepare the folder again.") from error


def _entry(pair: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(pair[key]) for key in ("fixed", "moving", "name")}


def load_own_pairs(data: str | Path | None, split: str, *, max_pairs: int | None = None, seed: int = 0) -> PairSet:
    """Pairs of one split of a prepared folder; at most ``max_pairs``, chosen at random by ``seed``.

    Raises:
        DataError: if the split has no pair, or a file is missing, damaged or does not fit the description; the message
            names it.
    """
    own = read_own(data)
    if not own.splits[split]:
        raise DataError(f"{own.path} lists no pair of the split {split!r}. Prepare the data with pairs of this split.")
    chosen = random_choice(own.splits[split], max_pairs, seed)
    labels = [[_read(own, own.path.parent / pair[role]) for role in ("fixed", "moving")] for pair in chosen]
    return PairSet(
        labels=torch.from_numpy(np.array(labels)),  # (N, 2, *spatial)
        label_names=own.described.label_names,
        spacing=own.described.spacing(len(own.spatial)),
        names=tuple(pair["name"] for pair in chosen),
    )


def _read(own: OwnData, path: Path) -> np.ndarray:
    """One image, uint8 (*spatial)."""
    values, _ = read_label_image(path)
    if values.shape != (*own.spatial, 1)[:3]:
        raise DataError(f"{path} has shape {values.shape}, but {own.path} says {own.spatial}. Prepare the data again.")
    if values.min() < 0 or values.max() >= len(own.described.label_names):
        raise DataError(f"{path} holds a label that {own.path} does not list. Prepare the data again.")
    return values.reshape(own.spatial).astype(np.uint8)
