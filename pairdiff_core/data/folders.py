"""Find the folder of a real data set, and choose some of its pairs at random."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from pairdiff_core.errors import DataError

Item = TypeVar("Item")


def find_folder(
    data: str | Path | None, variables: Sequence[str], names: Sequence[str], contents: Sequence[str], how_to: str
) -> Path:
    """The folder of a data set: the one that ``data`` or the first set environment variable names, or one inside it.

    A folder inside must have one of the ``names``. In either case, it must hold at least one of ``contents``.

    Raises:
        DataError: if there is none; the message ends with ``how_to``, which says how to get the data.
    """
    named = {"data": data} | {name: os.environ.get(name) for name in variables}
    origin, place = next(((origin, place) for origin, place in named.items() if place), (None, None))
    if place is None:
        raise DataError(f"No folder with this data set is named. {how_to}")
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} (from {origin}) is not a folder. {how_to}")
    for candidate in (folder, *(folder / name for name in names)):
        if any((candidate / held).exists() for held in contents):
            return candidate
    held, inside = ", ".join(contents), f", nor does {'/ or '.join(names)}/ in it" if names else ""
    raise DataError(f"{folder} (from {origin}) holds none of {held}{inside}. {how_to}")


def random_choice(items: Sequence[Item], number: int | None, seed: int) -> list[Item]:
    """At most ``number`` of the items, chosen at random by a seed, in their original order; None takes all."""
    if number is None or len(items) <= number:
        return list(items)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[index] for index in sorted(order[:number].tolist())]
