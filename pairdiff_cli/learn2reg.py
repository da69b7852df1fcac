"""Write pairs of label maps as a data set in the format of Learn2Reg: NIfTI files and a description in JSON."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pairdiff_cli.volume_files import write_nifti
from pairdiff_core import __version__
from pairdiff_core.data import SPLIT_KEYS, DataDescription
from pairdiff_core.errors import DataError


class WrittenPair(NamedTuple):
    """One pair to write."""

    labels: np.ndarray  # uint8 (2, *spatial), fixed and moving
    affines: tuple[np.ndarray, np.ndarray]  # (4, 4) each, voxel to world, mm, RAS
    split: str = "train"
    name: str | None = None  # kept in the description, since the names of the files are numbers


def unused_folder(to: str | Path) -> Path:
    """The folder to create, checked before anything is computed.

    Raises:
        DataError: if it exists and is not an empty folder.
    """
    to = Path(to).expanduser()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise DataError(f"{to} exists and is not empty. Give a new folder, or move this one.")
    return to


def write_data_set(
    to: Path, name: str, pairs: Iterable[WrittenPair], described: DataDescription, about: Mapping[str, Any]
) -> int:
    """Write pairs into a new folder, which appears complete or not at all.

    ``imagesTr/<name>_0001_0000.nii.gz`` is the fixed label map of the first pair, ``..._0001.nii.gz`` the moving one:
    uint8 (X, Y, Z), a slice as (X, Y, 1). ``<name>_dataset.json`` has the keys of Learn2Reg's descriptions, in which
    label maps are both image and label.

    Args:
        to: from :func:`unused_folder`.
        described: labels and grid.
        about: more entries of the description, such as ``description`` and ``provenance``.

    Returns:
        The number of pairs.

    Raises:
        DataError: if the folder cannot be written; nothing is written then.
    """
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in SPLIT_KEYS}
    spatial: tuple[int, ...] = ()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as temporary:
            root = Path(temporary) / "whole"
            (root / "imagesTr").mkdir(parents=True)
            for number, pair in enumerate(pairs, 1):
                entry = {
                    role: f"./imagesTr/{name}_{number:04d}_{image:04d}.nii.gz"
                    for image, role in enumerate(("fixed", "moving"))
                }
                for file, labels, affine in zip(entry.values(), pair.labels, pair.affines, strict=True):
                    spatial = labels.shape
                    write_nifti(root / file, labels.reshape((*spatial, 1)[:3]), affine)
                splits[pair.split].append(entry | ({"name": pair.name} if pair.name else {}))
            content = _describe(name, splits, spatial) | described.to_json() | dict(about)
            (root / f"{name}_dataset.json").write_text(json.dumps(content, indent=1) + "\n")
            if to.exists():
                to.rmdir()
            root.rename(to)
    except OSError as error:
        raise DataError(f"{to} could not be written ({error.strerror}). Is the disk full or read-only?") from error
    return sum(map(len, splits.values()))


def _describe(name: str, splits: Mapping[str, list[dict[str, str]]], spatial: tuple[int, ...]) -> dict[str, Any]:
    """The description in the format of Learn2Reg, without labels."""
    images = {split: [pair[role] for pair in pairs for role in ("fixed", "moving")] for split, pairs in splits.items()}
    return {
        "name": name,
        "release": __version__,
        "pairings": "paired",
        "provided_data": {"0": ["image", "label"]},
        "registration_direction": {"fixed": 0, "moving": 1},
        "modality": {"0": "label map"},
        "img_shift": {"fixed": "0000", "moving": "0001"},
        "tensorImageSize": {"0": f"{len(spatial)}D"},
        "tensorImageShape": {"0": [*spatial, 1][:3]},
        "numTraining": len(images["train"]),
        "training": [{"image": image, "label": image} for image in images["train"]],
        "numPairedTraining": len(splits["train"]),
        "training_paired_images": splits["train"],
        "numPairedTest": 0,
        "test_paired_images": [],
        "numTest": len(images["test"]),
        "test": [{"image": image, "label": image} for image in images["test"]],
        "numRegistration_val": len(splits["validation"]),
        "registration_val": splits["validation"],
        "numRegistration_test": len(splits["test"]),
        "registration_test": splits["test"],
    }
