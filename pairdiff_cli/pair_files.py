"""Which files form pairs, and which pairs are held out: from two folders or from a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pairdiff_core.errors import DataError
from pairdiff_core.profiles import SPLITS

ENDINGS = (".nii", ".nii.gz", ".hdr", ".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd")  # one file for each image
VALIDATION_SHARE = 0.2  # of the pairs, or of the groups of pairs that share images


class PairFiles(NamedTuple):
    """The files of one pair."""

    fixed: Path
    moving: Path
    split: str = ""  # one of SPLITS; empty if it has not been decided


def pairs_of_folders(fixed: Path, moving: Path) -> list[PairFiles]:
    """Match the images of two folders: the first of each by name, the second of each, and so on.

    Raises:
        DataError: if a folder is missing or has no image, if the numbers of images differ, or if only some of the names
            occur in both folders.
    """
    found = [_images(folder) for folder in (fixed, moving)]
    names = [{_stem(path) for path in paths} for paths in found]
    alone = sorted(names[0] ^ names[1])
    where = fixed if alone and alone[0] in names[0] else moving
    hint = f" {alone[0]} is in {where} only." if names[0] & names[1] and alone else ""
    if len(found[0]) != len(found[1]):
        raise DataError(
            f"{fixed} has {len(found[0])} images, but {moving} has {len(found[1])}.{hint} Images are matched in the "
            "order of their names: remove those without a partner, or list the pairs in a CSV file and give --csv."
        )
    if hint:
        raise DataError(
            f"{fixed} and {moving} share only some of their names.{hint} Give partners the same name, or list the "
            "pairs in a CSV file and give --csv."
        )
    return [PairFiles(*pair) for pair in zip(*found, strict=True)]


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give a folder of label images, or --csv.")
    found = sorted(path for path in folder.iterdir() if path.name.lower().endswith(ENDINGS) and path.name[0] != ".")
    if not found:
        raise DataError(f"{folder} has no image. Images end in {', '.join(ENDINGS)}.")
    return found


def _stem(path: Path) -> str:
    ending = max((each for each in ENDINGS if path.name.lower().endswith(each)), key=len, default="")
    return path.name[: len(path.name) - len(ending)]


def pairs_of_csv(path: Path) -> list[PairFiles]:
    """Read pairs from a CSV file with the columns ``fixed``, ``moving`` and, if wanted, ``split``.

    Paths may be relative to the folder of the CSV file.

    Raises:
        DataError: if the file is missing or damaged, lacks a column or rows, or has a split in some rows only.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV ({error}). Save it as UTF-8 text.") from error
    if not rows or not {"fixed", "moving"} <= set(rows[0]):
        raise DataError(f"{path} needs the columns fixed and moving, in a header line, and at least one pair.")
    pairs = []
    for number, row in enumerate(rows, 2):
        files, split = [(row[key] or "").strip() for key in ("fixed", "moving")], (row.get("split") or "").strip()
        if not all(files):
            raise DataError(f"{path}, line {number}: a fixed or moving file is missing. Name both.")
        if split not in ("", *SPLITS):
            raise DataError(f"{path}, line {number}: there is no split {split!r}. Choose one of {', '.join(SPLITS)}.")
        pairs.append(PairFiles(*(path.parent / file for file in files), split))
    if len({bool(pair.split) for pair in pairs}) == 2:
        raise DataError(f"{path} has a split in some rows only. Fill in the column split, or remove it.")
    return pairs


def with_splits(pairs: Sequence[PairFiles]) -> list[PairFiles]:
    """Hold out the last fifth of the pairs, at least one, for validation; pairs that share an image stay together.

    Splits that are given are kept.

    Raises:
        DataError: if there is no pair to train on or none to validate with, or if all pairs are connected by images
            that they share.
    """
    if pairs[0].split:
        for split in SPLITS[:2]:
            if not any(pair.split == split for pair in pairs):
                raise DataError(
                    f"no pair has the split {split!r}. Training needs pairs of both splits: {' and '.join(SPLITS[:2])}."
                )
        return list(pairs)
    files = {file: index for index, file in enumerate(dict.fromkeys(_real(f) for pair in pairs for f in pair[:2]))}
    ends = np.array([[files[_real(file)] for file in pair[:2]] for pair in pairs]).T
    linked = coo_array((np.ones(len(pairs)), ends), shape=(len(files), len(files)))
    group = connected_components(linked, directed=False)[1][ends[0]]
    groups = list(dict.fromkeys(group.tolist()))
    if len(groups) < 2:
        why = "there is only one pair" if len(pairs) == 1 else "all pairs are connected by images that they share"
        raise DataError(
            f"{why}, so none can be held out to validate with. Add pairs of other people, or list the pairs in a CSV "
            "file with a column split (train or validation)."
        )
    held_out = groups[-max(1, round(VALIDATION_SHARE * len(groups))) :]
    return [pair._replace(split=SPLITS[each in held_out]) for pair, each in zip(pairs, group, strict=True)]


def in_both_splits(pairs: Sequence[PairFiles]) -> list[Path]:
    """Images that pairs of training and other pairs share."""
    training, other = ({file for pair in pairs if (pair.split == "train") == same for file in map(_real, pair[:2])}
                       for same in (True, False))  # fmt: skip
    return sorted(training & other)


def names_of_pairs(pairs: Sequence[PairFiles]) -> list[str]:
    """A name ``fixed~moving`` for each pair: paths below the folder that holds all images, without endings."""
    above = Path(os.path.commonpath([_real(file).parent for pair in pairs for file in pair[:2]]))
    return ["~".join(_name(_real(file), above) for file in pair[:2]) for pair in pairs]


def _name(file: Path, above: Path) -> str:
    return (file.parent.relative_to(above) / _stem(file)).as_posix().replace("~", "-")


def _real(file: Path) -> Path:
    return Path(os.path.abspath(file))
