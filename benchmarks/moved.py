"""Training pairs that breathe deeper, with landmarks: what choices are made on, so that validation pairs stay unseen.

The moving image of each pair with correspondences goes along the motion of another patient; its landmarks go with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pairdiff_core import fields
from pairdiff_core.data.breathing import Motions, box_of_vessels, laid
from pairdiff_core.pairs import PairSet

COARSER = 4  # voxels of the images to one of the grid that motions are laid on


def moved_pairs(pairs: PairSet, motions: Motions, chosen: Sequence[int]) -> PairSet:
    """Each pair that has landmarks, once for each of the chosen motions: names are ``fixed~moving+case``."""
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
