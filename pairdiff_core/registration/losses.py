"""Registration losses. Images are *maps*: float (N, M, *spatial), 0 to 1, one channel per structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pairdiff_core.fields import warp, warp_at
from pairdiff_core.pairs import one_hot
from pairdiff_core.registration.deformation import Deformation


class RegistrationLoss(NamedTuple):
    """Terms of the loss, scalars."""

    total: torch.Tensor
    dissimilarity: torch.Tensor  # absolute difference, mean over voxels and both directions, sum over maps and scales
    roughness: torch.Tensor  # mean squared gradient of the displacement, voxels per voxel


def registration_loss(
    deformation: Deformation,
    fixed: torch.Tensor,
    moving: torch.Tensor,
    smoothness: float,
    voxels: torch.Tensor | None = None,
    scales: int = 1,
) -> RegistrationLoss:
    """L1 between the maps (N, M, *spatial) after warping in both directions, plus ``smoothness`` x squared gradient.

    The deformation may be on a coarser grid; its gradient is taken there, in voxels of that grid per voxel.

    Args:
        voxels: int64 (K, D), to compare these only, as if the maps were equal everywhere else; None compares all.
        scales: number of scales at which maps are compared, averaged over 1, 2, 4, ... voxels a side; losses are added.
            Thin structures that are far apart do not overlap; only a coarse scale shows in which direction to move.

    Raises:
        ValueError: if there are ``voxels`` and several scales.
    """
    if voxels is not None and scales > 1:
        raise ValueError("several scales need all voxels: use voxels=None or scales=1")
    images, targets = torch.cat([moving, fixed]), torch.cat([fixed, moving])  # both ways at once
    if voxels is None:
        differences = warp(images, deformation.resized(fixed.shape[2:]).both) - targets
        views = [pool(differences, 2**scale) for scale in range(scales)]
        dissimilarity = sum(view.abs().sum() / view[:, 0].numel() for view in views)
    else:
        differences = warp_at(images, deformation.both, voxels) - targets[(..., *voxels.T)]
        dissimilarity = differences.abs().sum() / targets[:, 0].numel()
    roughness = squared_gradient(deformation.both)
    return RegistrationLoss(dissimilarity + smoothness * roughness, dissimilarity, roughness)


def squared_gradient(field: torch.Tensor) -> torch.Tensor:
    """Mean squared forward difference of a field (N, D, *spatial), summed over axes.

    MONAI's ``DiffusionLoss`` takes central differences, which do not see a field that alternates from voxel to voxel.
    """
    axes = range(2, field.dim())
    return sum(field.diff(dim=axis).square().mean() for axis in axes)


def bending_energy(field: torch.Tensor) -> torch.Tensor:
    """Mean squared second difference of a field (N, D, *spatial), summed over pairs of axes; 0 for affine maps.

    Rueckert et al., IEEE TMI 1999, eq. 6. MONAI's ``BendingEnergyLoss`` has deprecated indexing and warns at each call.
    """
    axes = range(2, field.dim())
    return sum(field.diff(dim=a).diff(dim=b).square().mean() for a in axes for b in axes)


def label_maps(labels: torch.Tensor, num_labels: int, scale: int = 1) -> torch.Tensor:
    """Convert label maps uint8 (N, *spatial) to float (N, C - 1, *spatial / scale), without the background.

    Labels are pooled one by one: all of them at full size may not fit into memory.
    """
    if scale == 1:
        return one_hot(labels, num_labels)[:, 1:]
    return torch.cat([pool((labels == c)[:, None].float(), scale) for c in range(1, num_labels)], 1)


def pool(maps: torch.Tensor, scale: int) -> torch.Tensor:
    """Average maps (N, M, *spatial) over cubes of ``scale`` voxels a side: the share of each structure in each cube."""
    return averaged(maps, [max(1, size // scale) for size in maps.shape[2:]])


def averaged(maps: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """Average maps (N, M, *old) over equal boxes to a coarser grid."""
    return maps if tuple(spatial) == maps.shape[2:] else F.interpolate(maps, size=list(spatial), mode="area")
