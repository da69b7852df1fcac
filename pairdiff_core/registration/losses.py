"""What a registration minimises. Images are *maps*: float (N, M, *spatial), one channel a structure, 0 to 1."""

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
    dissimilarity: torch.Tensor  # mean over voxels of the absolute difference of the maps, summed, both directions
    roughness: torch.Tensor  # mean squared gradient of the displacement, voxels per voxel


def registration_loss(
    deformation: Deformation,
    fixed: torch.Tensor,
    moving: torch.Tensor,
    smoothness: float,
    voxels: torch.Tensor | None = None,
    scales: int = 1,
) -> RegistrationLoss:
    """L1 between the maps (N, M, *spatial) after warping, both ways, plus ``smoothness`` x squared gradient.

    The deformation may live on a coarser grid; its gradient is taken there, in voxels of that grid per voxel.

    Args:
        voxels: int64 (K, D), to compare these only, as if the maps were alike everywhere else; None compares all.
        scales: compare the maps also averaged over 2, 4, ... voxels a side, at this many scales in all, and add up.
            Thin structures that are far from each other overlap nowhere; only a coarse view shows which way to go.

    Raises:
        ValueError: for several scales of single voxels.
    """
    if voxels is not None and scales > 1:
        raise ValueError("images cannot be averaged where only some of their voxels are compared")
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
    """Mean squared second difference of a field (N, D, *spatial), summed over pairs of axes; affine maps have none.

    Rueckert et al., IEEE TMI 1999, eq. 6. MONAI's ``BendingEnergyLoss`` indexes tensors in a way that torch has
    deprecated, and warns at each call.
    """
    axes = range(2, field.dim())
    return sum(field.diff(dim=a).diff(dim=b).square().mean() for a in axes for b in axes)


def label_maps(labels: torch.Tensor, num_labels: int, scale: int = 1) -> torch.Tensor:
    """Label maps uint8 (N, *spatial) as float (N, C - 1, *spatial / scale), without the background.

    Pooled label by label: all of them at full size may not fit into memory.
    """
    if scale == 1:
        return one_hot(labels, num_labels)[:, 1:]
    return torch.cat([pool((labels == c)[:, None].float(), scale) for c in range(1, num_labels)], 1)


def pool(maps: torch.Tensor, scale: int) -> torch.Tensor:
    """Maps (N, M, *spatial) averaged over cubes of ``scale`` voxels: the share of each structure in each cube."""
    return averaged(maps, [max(1, size // scale) for size in maps.shape[2:]])


def averaged(maps: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """Maps (N, M, *old) averaged over equal boxes to a coarser grid."""
    return maps if tuple(spatial) == maps.shape[2:] else F.interpolate(maps, size=list(spatial), mode="area")
