"""Registration of pairs of any size and spacing: by a trained network, by optimisation, or by both.

Images are padded as pooling requires. A network sees them at the voxel size of its training. Optimisation works on the
images' own grid, or on a coarser one with about as many voxels as the profile's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pairdiff_core.pairs import PairSet, resize_labels
from pairdiff_core.profiles import Profile, RegistrationSettings
from pairdiff_core.registration.deformation import Deformation, Velocities, concatenated, integrate_on
from pairdiff_core.registration.losses import label_maps
from pairdiff_core.registration.network import RegistrationNetwork, smallest_side
from pairdiff_core.registration.optimise import Watch, brings_closer, merged, refine, refine_network
from pairdiff_core.training import best_device

VOXELS_AT_ONCE = 2**18  # of the pairs that are registered together: larger tensors are slow on a CPU
NEARLY = 0.02  # a ratio of spacings this close to a whole number is rounded: headers say 0.998 mm for 1 mm
FINEST = 0.25  # voxels of an image per voxel of the network's grid along each axis, at least
LARGEST = 8  # times the voxels of training, at most


def register(
    pairs: PairSet,
    profile: Profile,
    network: RegistrationNetwork | None = None,
    *,
    instance: bool = True,
    trained_spacing: Sequence[float] | None = None,
    watch: Watch = iter,
) -> Deformation:
    """Register every pair.

    Args:
        pairs: on any grid; with a network, with as many labels as in its training.
        profile: has the levels of optimisation: ``baseline``, from the identity, or with a network ``instance``.
        network: trained at this profile; None: optimisation only.
        instance: whether to optimise the network's result.
        trained_spacing: voxel size of the network's training, in millimetres; None: that of the pairs.
        watch: iterates over the steps of each level of optimisation; ``tqdm`` shows a bar for each level.

    Returns:
        Deformations on the grid of the pairs, in its voxels, on the CPU.
    """
    batch = max(1, VOXELS_AT_ONCE // math.prod(pairs.spatial))
    if network is not None:
        network.eval()
        seen = sampling(pairs.spatial, pairs.spacing, profile, trained_spacing or pairs.spacing)
    found = []
    for labels in pairs.labels.split(batch):
        if network is None:
            found.append(_optimised(labels, pairs.num_labels, profile, watch))
        else:
            found.append(_by_network(labels, pairs.num_labels, profile, network, instance, seen, watch))
    return concatenated(found)


def _optimised(labels: torch.Tensor, num_labels: int, profile: Profile, watch: Watch) -> Deformation:
    settings, spatial = profile.registration, labels.shape[2:]
    coarser = coarsening(spatial, profile.spatial)
    block = coarser * math.lcm(*(level.scale * level.control for level in settings.baseline))
    padded = [_up(size, block) for size in spatial]
    fixed, moving = _maps(labels, padded, num_labels, coarser)
    dims = len(spatial)
    zero = fixed.new_zeros((len(fixed), dims, *[1] * dims))
    velocities = refine(fixed, moving, (zero,), settings.baseline, settings, watch)
    return _on_grid(velocities, settings.squarings, padded, spatial, fixed.shape[2:])


@torch.no_grad()
def _by_network(
    labels: torch.Tensor,
    num_labels: int,
    profile: Profile,
    network: RegistrationNetwork,
    instance: bool,
    seen: Sampling,
    watch: Watch,
) -> Deformation:
    settings = profile.registration
    velocities, grid = _velocities(labels, num_labels, settings, network, seen), seen.grid
    if instance and settings.instance:
        maps = _maps(labels, seen.padded, num_labels, coarsening(seen.padded, profile.spatial))
        with torch.enable_grad():
            velocities, grid = refine_network(*maps, velocities, settings, watch), maps[0].shape[2:]
    return _on_grid(velocities, settings.squarings, seen.padded, labels.shape[2:], grid)


def _velocities(
    labels: torch.Tensor, num_labels: int, settings: RegistrationSettings, network: RegistrationNetwork, seen: Sampling
) -> Velocities:
    sampled = [_resampled(image, seen.grid, num_labels) for image in _padded(labels, seen.padded).unbind(1)]
    fixed, moving = (label_maps(image.to(best_device()), num_labels) for image in sampled)
    return network.velocities(fixed, moving, settings.repeats)


@torch.no_grad()
def used_as_start(pairs: PairSet, profile: Profile, network: RegistrationNetwork) -> list[bool]:
    """For each pair, whether :func:`register` optimises the network's result (True) or starts from zero (False).

    The latter occurs only with ``registration.merge``. The pairs must have the spacing of the network's training.
    """
    settings, seen = profile.registration, sampling(pairs.spatial, pairs.spacing, profile, pairs.spacing)
    if not settings.merge or not settings.instance:
        return [True] * len(pairs)
    network.eval()
    used = []
    for labels in pairs.labels.split(1):
        velocity = merged(_velocities(labels, pairs.num_labels, settings, network, seen))
        maps = _maps(labels, seen.padded, pairs.num_labels, coarsening(seen.padded, profile.spatial))
        used += brings_closer(*maps, velocity, settings).tolist()
    return used


@torch.no_grad()
def _on_grid(
    velocities: Velocities, squarings: int, padded: Sequence[int], spatial: Sequence[int], registered_on: Sequence[int]
) -> Deformation:
    return integrate_on(velocities, padded, squarings, registered_on).cropped(spatial).cpu()


def _padded(labels: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """Pad labels (N, 2, *old) with zeros after the last voxel of each axis, so that voxels keep their indices."""
    pads = [(0, new - old) for old, new in zip(labels.shape[2:], spatial, strict=True)]
    return F.pad(labels, [pad for axis in reversed(pads) for pad in axis])  # the last axis comes first


def _maps(labels: torch.Tensor, padded: Sequence[int], num_labels: int, coarser: int) -> tuple[torch.Tensor, ...]:
    """Fixed and moving maps (N, C - 1, *padded / coarser) on the device that computes."""
    images = _padded(labels, padded).unbind(1)
    return tuple(label_maps(image.to(best_device()), num_labels, coarser) for image in images)


def _resampled(labels: torch.Tensor, spatial: Sequence[int], num_labels: int) -> torch.Tensor:
    """Resample labels uint8 (N, *old) to a network's grid in the same way as its training data.

    Slices are resampled by majority vote, volumes by maximum, so that no thin vessel is lost.
    """
    if tuple(spatial) == tuple(labels.shape[1:]):
        return labels
    if len(spatial) == 2:
        return resize_labels(labels, spatial, num_labels)
    return F.adaptive_max_pool3d(labels.float(), tuple(spatial)).to(torch.uint8)


class Sampling(NamedTuple):
    """How a network sees an image."""

    grid: tuple[int, ...]  # voxels of the network's images
    padded: tuple[int, ...]  # voxels of the image over the same field of view
    as_trained: bool  # whether that grid has the voxel size of training


def sampling(
    spatial: Sequence[int], spacing: Sequence[float], profile: Profile, trained_spacing: Sequence[float]
) -> Sampling:
    """The grid on which a network sees an image: at the voxel size of its training, where this fits.

    It does not fit if a side would have less than half the voxels that the network needs, the image over eight times
    those of training, or a voxel be split into over four along an axis. Then it sees the image's own or coarser voxels.
    """
    settings = profile.registration
    smallest = smallest_side(settings)
    ratio = [_nearly_whole(mm / own) for mm, own in zip(trained_spacing, spacing, strict=True)]
    wanted = [size / times for size, times in zip(spatial, ratio, strict=True)]
    voxels = math.prod(profile.spatial)
    fits = min(wanted) >= smallest / 2 and math.prod(wanted) <= LARGEST * voxels and min(ratio) >= FINEST
    if not fits:
        ratio = [float(coarsening(spatial, profile.spatial))] * len(spatial)
    multiple = math.lcm(settings.control, settings.correlation.control if settings.correlation else 1)
    grid = [max(_up(size / times, multiple), smallest) for size, times in zip(spatial, ratio, strict=True)]
    if max(grid) < 2 * smallest:  # one voxel at the U-Net's coarsest level, which it cannot normalise
        grid[grid.index(max(grid))] = 2 * smallest
    padded = [max(size, round(new * times)) for size, new, times in zip(spatial, grid, ratio, strict=True)]
    return Sampling(tuple(grid), tuple(padded), fits)


def coarsening(spatial: Sequence[int], usual: Sequence[int]) -> int:
    """How many times coarser an image has to be to have about as many voxels as the ``usual`` grid; at least 1."""
    return max(1, math.floor((math.prod(spatial) / math.prod(usual)) ** (1 / len(usual)) + 1e-6))


def _nearly_whole(ratio: float) -> float:
    whole = max(1, round(ratio))
    return float(whole) if abs(ratio - whole) <= NEARLY * whole else ratio


def _up(size: float, multiple: int) -> int:
    """Round up to a multiple, but ignore a rounding error above one."""
    return multiple * math.ceil(size / multiple - 1e-6)
