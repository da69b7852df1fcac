"""Training pairs with deeper breathing and landmarks, to choose settings without looking at validation pairs.

In each pair with correspondences, the motion of another patient moves the moving image and its landmarks further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pairdiff_core import fields
from pairdiff_core.data.breathing import Motions, box_of_vessels, laid
from pairdiff_core.pairs import PairSet

COARSER = 4  # voxels of the images per voxel of the grid of the motions


def moved_pairs(pairs: PairSet, motions: Motions, chosen: Sequence[int]) -> PairSet:
    """Make a pair from each pair with landmarks and each chosen motion; names are ``fixed~moving+case``."""
    labels, landmarks, names = [], [], []
    coarse = [size // COARSER for size in pairs.spatial]
    for index, points in enumerate(pairs.landmarks or ()):
        if not len(points):
            continue
        fixed, moving = pairs.labels[index]
        for number in chosen:
            along = laid(motions.displacement[number], box_of_vessels(moving), coarse)[None]
            inverse = fields.resize_field(fields.invert(along), pairs.spatial)
            labels.append(torch.stack([fixed, fields.warp_labels(moving[None], inverse)[0]]))
            moved = points[:, 1] + fields.sample_at(fields.resize_field(along, pairs.spatial)[0], points[:, 1])
            landmarks.append(torch.stack([points[:, 0], moved], 1))
            names.append(f"{pairs.names[index]}+{motions.cases[number]}")
    return replace(pairs, labels=torch.stack(labels), names=tuple(names), landmarks=tuple(landmarks), displacement=None)
