"""The common frame of all lungs, real and phantom: 256 x 208 x 256 voxels of 1 mm, and its half and quarter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet

FRAME = (256, 208, 256)  # voxels
CANVAS, BORDER = ((352, 256, 352), (48, 32, 48))  # the frame is cut from a centred canvas, not quite in the middle
FACTORS = (1, 2, 4)  # how many times coarser a grid may be
LABELS = (("Background", (0, 0, 0)), ("Vessel", (205, 62, 78)))


def frame_offset(shape: Sequence[int]) -> tuple[int, ...]:
    """Position of voxel 0 of a volume of this shape in the common frame; negative where the frame crops the volume.

    Add it to voxel coordinates of the volume to get those of the frame.
    """
    sizes = zip(CANVAS, shape, BORDER, strict=True)
    return tuple((canvas - size) // 2 - border for canvas, size, border in sizes)


def to_frame(volume: torch.Tensor) -> torch.Tensor:
    """A volume (H, W, D), padded with zeros or cropped to the common frame (256, 208, 256)."""
    before = frame_offset(volume.shape)
    after = [frame - size - pad for frame, size, pad in zip(FRAME, volume.shape, before, strict=True)]
    pads = [pad for axis in (2, 1, 0) for pad in (before[axis], after[axis])]  # F.pad takes the last axis first
    return F.pad(volume, pads)


def pooling_factor(spatial: Sequence[int]) -> int:
    """How many times coarser than the common frame a grid is: 1, 2 or 4.

    Raises:
        DataError: for any other grid, because its voxels would not be blocks of the frame's.
    """
    grids = {tuple(size // factor for size in FRAME): factor for factor in FACTORS}
    if tuple(spatial) not in grids:
        raise DataError(f"the lungs are available on the grids {', '.join(map(str, grids))}, not on {tuple(spatial)}")
    return grids[tuple(spatial)]


def lung_pair_set(
    labels: torch.Tensor,
    subjects: Sequence[str],
    landmarks: Sequence[torch.Tensor],
    displacement: torch.Tensor | None = None,
) -> PairSet:
    """Pairs of lungs on a grid of the frame: labels uint8 (N, 2, *spatial), fixed and moving of each of N subjects.

    Landmarks (K, 2, 3), one tensor per subject, and displacement (N, 3, *spatial) are in voxels of that grid.
    """
    names, colours = zip(*LABELS, strict=True)
    return PairSet(
        labels=labels,
        label_names=names,
        spacing=(float(pooling_factor(labels.shape[2:])),) * 3,
        names=tuple(f"{subject}_1~{subject}_2" for subject in subjects),
        displacement=displacement,
        landmarks=tuple(landmarks) if any(len(points) for points in landmarks) else None,
        label_colours=colours,
    )
