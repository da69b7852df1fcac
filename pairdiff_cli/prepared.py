"""What ``pairdiff prepare`` makes of label images: pairs on one grid, and a table of what was found and changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pairdiff_cli import common_grid
from pairdiff_cli.common_grid import Found, Image
from pairdiff_cli.learn2reg import WrittenPair
from pairdiff_cli.pair_files import names_of_pairs
from pairdiff_core.data import DataDescription
from pairdiff_core.errors import DataError
from pairdiff_core.pipeline import trainable_grid
from pairdiff_core.profiles import SPLITS, Profile
from pairdiff_core.storage import fingerprint, provenance

MANY = 4  # times the voxels of the profile's own grid, above which a note says so


class Prepared(NamedTuple):
    """Pairs on one grid, and their description."""

    pairs: list[WrittenPair]
    described: DataDescription
    about: dict[str, Any]  # for the description of the data set
    table: str
    notes: list[str]


def read_names(path: Path) -> dict[int, str]:
    """Names of labels from a text file with a label and its name on each line, as in FreeSurfer's colour tables.

    Raises:
        DataError: if the file is missing or a line is something else; the message names both.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). Give a text file with a label and its name on each line."
        ) from error
    names = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2 or not words[0].isdecimal():
            raise DataError(f"{path}, line {number}: {line.strip()!r} is not a label and its name, such as `1 liver`.")
        names[int(words[0])] = words[1]
    return names


def fit_together(
    found: Found,
    profile: Profile,
    names: Mapping[int, str],
    spacing: Sequence[float] | None = None,
    size: Sequence[int] | None = None,
) -> Prepared:
    """Bring all pairs to one orientation, one voxel size, and one grid on which the profile's networks can be trained.

    Args:
        found: from :func:`pairdiff_cli.common_grid.read_pairs`.
        profile: whose networks the grid must fit.
        names: of label values; others are called "label 7".
        spacing: voxel size in mm; None takes the median of each axis, or the voxels as they are if all are equal.
        size: voxels of the grid, rounded up to what the networks need; None takes the largest images.

    Raises:
        DataError: if no structure of an image is left on the grid; the message names the file.
    """
    dims, num_labels = found.spatial_dims, len(found.values)
    axes = common_grid.most_common_axes(found)
    turned = [common_grid.turned(image, axes) for image in found.images]
    spacings = np.array([common_grid.spacing_of(image, dims) for image in turned])
    one = common_grid.same_spacing(spacings, spacings[:1])
    spacing = np.array(spacing) if spacing else spacings[0] if one else np.median(spacings, axis=0)
    scaled = [common_grid.at_spacing(image, spacing, num_labels) for image in turned]
    shapes = shapes_of(scaled, dims)
    wanted = tuple(size or shapes.max(0).tolist())
    grid = trainable_grid(profile, wanted)
    images = [common_grid.on_grid(image, grid) for image in scaled]
    affine = images[0].affine.copy()
    affine[:3, :dims] *= spacing / common_grid.spacing_of(images[0], dims)  # the median is that of no single image
    labels = _labels(found, images, names)
    described = DataDescription(
        tuple(label.name for label in labels), tuple(found.values.tolist()), tuple(map(tuple, affine.tolist()))
    )
    lost = max(
        1 - (after.labels > 0).sum() / (before.labels > 0).sum() for before, after in zip(scaled, images, strict=True)
    )
    rows = [
        ("", "found", "becomes"),
        ("pairs", f"{len(images)}", _splits(images)),
        *_first_and_last(images),
        ("orientation", _counted(image.axes for image in found.images), f"{axes}"),
        ("voxel size, mm", _range(spacings), _product(spacing)),
        ("grid", _range(shapes_of(turned, dims)), _product(grid)),
        ("labels", f"{num_labels}, of {found.values[0]} to {found.values[-1]}", f"0 to {num_labels - 1}"),
        *((f"  {label.name}", label.found, label.becomes) for label in labels),
    ]
    return Prepared(
        [
            WrittenPair(image.labels.reshape(2, *grid), (image.affine, image.affine), image.files.split, name)
            for image, name in zip(images, names_of_pairs([image.files for image in images]), strict=True)
        ],
        described,
        _about(images, profile),
        _aligned(rows),
        _notes(grid, wanted, shapes, lost, profile) + _unlearned(images, described),
    )


class Label(NamedTuple):
    """A label in the table."""

    name: str
    found: str
    becomes: str


def _labels(found: Found, images: Sequence[Image], names: Mapping[int, str]) -> list[Label]:
    """Each label's name, its value and how often it occurs, and its number."""
    number = len(found.values)
    counts = np.array([np.bincount(each.ravel(), minlength=number) for image in images for each in image.labels])
    labels = []
    for index, value in enumerate(found.values.tolist()):
        name = names.get(value, f"label {value}" if index else "background")
        share = 100 * counts[:, index].sum() / counts.sum()
        found_in = f"{value}, in {(counts[:, index] > 0).sum()} of {len(counts)} images, {share:.2g} % of voxels"
        labels.append(Label(name, found_in, str(index)))
    return labels


def shapes_of(images: Iterable[Image], dims: int) -> np.ndarray:
    """Voxels of each pair's grid, (N, D)."""
    return np.array([image.shape[:dims] for image in images])


def _first_and_last(images: Sequence[Image]) -> list[tuple[str, str, str]]:
    """Rows with the files of the first and the last pair, which show how the files were matched."""
    files = {"  first": images[0].files, "  last": images[-1].files}
    return [(which, f"{pair.fixed.name} with {pair.moving.name}", pair.split) for which, pair in files.items()]


def _splits(images: Sequence[Image]) -> str:
    counted = Counter(image.files.split for image in images)
    return ", ".join(f"{counted[split]} {split}" for split in SPLITS if counted[split])


def _counted(values: Iterable[str]) -> str:
    counted = Counter(values).most_common()
    return counted[0][0] if len(counted) == 1 else ", ".join(f"{value} ({number})" for value, number in counted)


def _product(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)


def _range(rows: np.ndarray) -> str:
    """The range of (N, D) numbers along each axis."""
    low, high = (_product(limit) for limit in (rows.min(0), rows.max(0)))
    return low if low == high else f"{low} to {high}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _notes(
    grid: tuple[int, ...], wanted: tuple[int, ...], shapes: np.ndarray, lost: float, profile: Profile
) -> list[str]:
    notes = []
    if (shapes < grid).any():
        why = (
            ""
            if grid == wanted
            else f" The networks of {profile.name!r} need {_product(grid)} instead of {_product(wanted)}."
        )
        notes.append(f"images are padded with background about their centre.{why}")
    if (shapes > grid).any():
        notes.append(f"images are cropped about their centre; up to {100 * lost:.2g} % of a pair's structures is lost.")
    times = math.prod(grid) / math.prod(profile.spatial)
    if times > MANY:
        notes.append(
            f"the grid has {times:.0f} times as many voxels as {profile.name!r} is made for, and training takes about "
            "that many times as long. Give a coarser --spacing or a smaller --size."
        )
    return notes


def _unlearned(images: Sequence[Image], described: DataDescription) -> list[str]:
    """A note for labels that no training image has, or no validation image."""
    notes = []
    for split, effect in (("train", "networks cannot learn them"), ("validation", "their Dice cannot be measured")):
        seen = np.unique(np.concatenate([np.unique(image.labels) for image in images if image.files.split == split]))
        missing = [name for index, name in enumerate(described.label_names) if index not in seen]
        if missing:
            notes.append(f"in no image of the split {split!r}: {', '.join(missing)}; {effect}.")
    return notes


def _about(images: Sequence[Image], profile: Profile) -> dict[str, Any]:
    hashes = {
        split: fingerprint(torch.from_numpy(np.stack(chosen)))
        for split in SPLITS
        if (chosen := [image.labels for image in images if image.files.split == split])
    }
    return {
        "description": "Pairs of label maps, brought onto one grid by `pairdiff prepare`.",
        "licence": "that of the original images",
        "reference": "",
        "provenance": provenance(profile.name, 0, "cpu", hashes),
    }
