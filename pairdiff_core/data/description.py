"""What is known of a data set without its images: the labels, and the place of its grid in the world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class DataDescription(NamedTuple):
    """The labels and the common grid of a data set."""

    label_names: tuple[str, ...]  # C names, index = label value, the background first
    label_values: tuple[int, ...]  # the value of each label in the files of a user, ascending, 0 first
    affine: tuple[tuple[float, ...], ...]  # (4, 4), voxel to world, mm, RAS; a slice has a third axis
    label_colours: tuple[tuple[int, int, int], ...] | None = None  # RGB, 0 to 255; None: the figure chooses

    @property
    def directions(self) -> np.ndarray:
        """The affine as float64 (4, 4)."""
        return np.array(self.affine)

    def spacing(self, spatial_dims: int) -> tuple[float, ...]:
        """Millimetres between voxel centres along each array axis."""
        return tuple(np.linalg.norm(self.directions[:3, :spatial_dims], axis=0).tolist())

    def to_json(self) -> dict[str, Any]:
        """Names, values and affine, as the description of a data set has them."""
        return {
            "labels": {"0": {str(index): name for index, name in enumerate(self.label_names)}},
            "label_values": list(self.label_values),
            "affine": [list(row) for row in self.affine],
        }


def description_from_json(content: Mapping[str, Any]) -> DataDescription:
    """Rebuild a description from :meth:`DataDescription.to_json`.

    Raises:
        KeyError, TypeError, ValueError: if something is missing or wrong.
    """
    names = content["labels"]["0"]
    values, affine = content["label_values"], np.array(content["affine"], np.float64)
    if affine.shape != (4, 4) or list(names) != [str(index) for index in range(len(values))] or len(values) < 2:
        raise ValueError("labels, label_values or affine do not fit together")
    return DataDescription(tuple(map(str, names.values())), tuple(map(int, values)), tuple(map(tuple, affine.tolist())))
