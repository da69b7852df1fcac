"""Fit a profile to label maps of your own: their grid and labels take the place of the profile's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pairdiff_core.data import OwnData, read_own
from pairdiff_core.errors import DataError
from pairdiff_core.pipeline.models import new_vqae
from pairdiff_core.profiles import Profile, get_profile
from pairdiff_core.registration import smallest_side


def trainable_grid(profile: Profile, spatial: Sequence[int]) -> tuple[int, ...]:
    """The smallest grid of at least this size on which all networks of a profile can be trained.

    Sides are multiples of the autoencoder's reduction and of the cells of the registration network, and none is too
    short for its U-Nets. The longest must be twice that, because one voxel at the coarsest level cannot be normalised.
    """
    with torch.device("meta"):  # only its sizes are needed
        reduction = new_vqae(profile).reduction
    settings = profile.registration
    cell = math.lcm(settings.control, settings.correlation.control if settings.correlation else 1)
    smallest, longest = smallest_side(settings), max(range(len(spatial)), key=lambda axis: spatial[axis])
    grid = []
    for axis, (size, factor) in enumerate(zip(spatial, reduction, strict=True)):
        multiple, least = math.lcm(factor, cell), smallest * (2 if axis == longest else 1)
        grid.append(multiple * math.ceil(max(size, least) / multiple))
    return tuple(grid)


def profile_for(data: str | Path | None, profile: Profile | str | None = None) -> Profile:
    """The profile for a folder that ``pairdiff prepare`` wrote: with its grid and labels, and patches that fit.

    Args:
        data: the folder; None takes the one that PAIRDIFF_DATA names.
        profile: for the folder's number of axes, or its name as in :func:`pairdiff_core.profiles.get_profile`.

    Raises:
        DataError: if the folder is missing or damaged, has another number of axes than the profile, or has a grid that
            the profile's networks cannot be trained on.
        ValueError: for an unknown name.
    """
    own = read_own(data)
    if not isinstance(profile, Profile):
        profile = get_profile(profile, len(own.spatial))
    if profile.spatial_dims != len(own.spatial):
        raise DataError(f"{own.path} has {len(own.spatial)} axes, but the profile has {profile.spatial_dims}.")
    fitted = replace(profile, spatial=own.spatial, num_labels=len(own.described.label_names))
    if profile.vqae.patches is not None:
        size = tuple(map(min, profile.vqae.patches.size, own.spatial))
        fitted = replace(fitted, vqae=replace(profile.vqae, patches=profile.vqae.patches._replace(size=size)))
    _check_grid(own, fitted)
    return fitted


def _check_grid(own: OwnData, profile: Profile) -> None:
    needed = trainable_grid(profile, own.spatial)
    if needed != own.spatial:
        grids = (" x ".join(map(str, grid)) for grid in (own.spatial, needed))
        raise DataError(
            f"{own.path} has a grid of {next(grids)} voxels, but the profile {profile.name!r} needs {next(grids)}. "
            f"Prepare the data again with --profile {profile.name}."
        )
