"""Where the folder of a real data set is: the caller or an environment variable names it, or a folder around it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pairdiff_core.errors import DataError


def find_folder(
    data: str | Path | None, variables: Sequence[str], names: Sequence[str], contents: Sequence[str], how_to: str
) -> Path:
    """The folder of a data set: what ``data`` or else the first set environment variable names, or a folder in it.

    It is called one of ``names`` if it is inside, and holds at least one of ``contents``.

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
    held, inside = ", ".join(contents), "/ or ".join(names)
    raise DataError(f"{folder} (from {origin}) holds none of {held}, nor does {inside}/ in it. {how_to}")
