"""Registration of two label volumes of any size and spacing, by a trained network or without training.

The stages register images on the grid of their profile. Here a volume is padded to what pooling needs, a network sees
it at the millimetres a voxel that it was trained at, and optimisation works on the volume's own grid, or on one so
much coarser that it has about as many voxels as the profile's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from pairdiff_core import pipeline, provided
from pairdiff_core.checkpoints import CheckpointError
from pairdiff_core.data import grid_affine
from pairdiff_core.pairs import DataError, resize_labels
from pairdiff_core.profiles import Level, Profile
from pairdiff_core.registration import (
    Deformation,
    integrate,
    pool,
    refine,
    refine_merged,
    register_multilevel,
)
from pairdiff_core.runs import Run, Stage, open_run
from pairdiff_core.training import best_device
from pairdiff_core.volumes import VolumePair, crop_to, pad_to

NEARLY = 0.02  # a ratio of spacings so close to a whole number is one: headers say 0.998 mm for 1 mm
FINEST = 0.25  # voxels of a volume to one of the network's, at least
LARGEST = 8  # times the voxels trained on


@dataclass(frozen=True, eq=False)
class Trained:
    """A registration network and what it was trained with."""

    run: Run
    profile: Profile  # with the registration settings of the network itself
    stage: Stage

    @property
    def affine(self) -> np.ndarray:
        """Voxel-to-world matrix (4, 4) of the grid that it was trained on."""
        return grid_affine(self.run.dataset, self.profile.spatial)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Millimetres a voxel of that grid, along each axis."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0)[: len(self.profile.spatial)].tolist())


def load_trained(run: str | Path, network: str = "synthetic") -> Trained:
    """A registration network of a run folder, or of a provided model by folder or name; no data are needed.

    Raises:
        CheckpointError: if there is none such, or it is damaged; the message says which networks there are.
    """
    folder = provided.find(run)
    opened, name = open_run(folder), f"registration-{network}"
    there = sorted(
        path.stem.removeprefix("registration-") for path in folder.glob("registration-*.safetensors")
    )
    if network not in there:
        raise CheckpointError(
            f"{folder} holds no network {network!r}; it holds: {', '.join(there) or 'none'}. Choose by --network, or "
            "train it."
        )
    return Trained(opened, *provided.load_stage(folder, name, pipeline.new_registration))


# --------------------------------------------------------------------------------------------- the labels


def network_labels(pair: VolumePair, trained: Trained) -> torch.Tensor:
    """The labels of a pair as a network knows them, uint8 (2, *spatial), 0 to C - 1.

    A network of two labels, as that of the vessels, takes all above 0 for the structure, as its data were read.

    Raises:
        DataError: for slices where it knows volumes or the reverse, or a label that it does not know.
    """
    dims, labels = len(trained.profile.spatial), trained.profile.num_labels
    if len(pair.spatial) != dims:
        kinds = {2: "slices", 3: "volumes"}
        raise DataError(
            f"{pair.paths[0]} is one of {kinds[len(pair.spatial)]}, but {trained.run.path} was trained on "
            f"{kinds[dims]}. Take another run, or none."
        )
    known = pair.values >= 0 if labels == 2 else np.isin(pair.values, np.arange(labels))
    if not known.all():
        value = int(np.flatnonzero(~known)[0])
        path = pair.paths[0] if (pair.labels[0] == value).any() else pair.paths[1]
        raise DataError(
            f"{path} holds the label {pair.values[value]:g}; {trained.run.path} knows "
            f"{'0 and above' if labels == 2 else f'0 to {labels - 1}'}. Change the labels, or take no run."
        )
    table = torch.from_numpy(np.minimum(pair.values, labels - 1).astype(np.uint8))
    return table[pair.labels.long()]


def label_maps(labels: torch.Tensor, num_labels: int, coarser: int) -> torch.Tensor:
    """Labels uint8 (N, *spatial) as maps (N, C - 1, *coarser grid), without the background.

    As ``registration.pool`` of ``registration.label_maps``, but one label at a time: all of them at full size may not
    fit into memory.
    """
    return torch.cat([pool((labels == c)[:, None].float(), coarser) for c in range(1, num_labels)], 1)


def at_sampling(labels: torch.Tensor, spatial: Sequence[int], num_labels: int) -> torch.Tensor:
    """Labels uint8 (N, *old) on the grid that a network takes, as its training data were put on theirs.

    Slices by majority vote; volumes by maximum, so that no thin vessel is lost.
    """
    if tuple(spatial) == tuple(labels.shape[1:]):
        return labels
    if len(spatial) == 2:
        return resize_labels(labels, spatial, num_labels)
    return F.adaptive_max_pool3d(labels.float(), tuple(spatial)).to(torch.uint8)


# ---------------------------------------------------------------------------------------------- the grids


class Sampling(NamedTuple):
    """How a network sees a volume."""

    grid: tuple[int, ...]  # voxels of the network's images
    padded: tuple[int, ...]  # voxels of the volume over the same field of view
    as_trained: bool  # whether a voxel of that grid has the millimetres of training


def coarsening(spatial: Sequence[int], usual: Sequence[int]) -> int:
    """How many times coarser a volume has to be to have about as many voxels as the ``usual`` grid; 1 at least."""
    return max(1, math.floor((math.prod(spatial) / math.prod(usual)) ** (1 / len(usual)) + 1e-6))


def sampling(spatial: Sequence[int], spacing: Sequence[float], trained: Trained) -> Sampling:
    """The grid on which a network sees a volume: in the millimetres it was trained at, where these fit.

    They do not where the volume would have less than half the voxels that the network needs, or eight times those of
    its training: then it sees the volume's own voxels, or so many times coarser ones.
    """
    settings = trained.profile.registration
    smallest = 16 * settings.scale * (settings.coarser or 1)
    multiple = settings.scale * (settings.control or 1)
    ratio = [_nearly_whole(mm / own) for mm, own in zip(trained.spacing, spacing, strict=True)]
    wanted = [size / times for size, times in zip(spatial, ratio, strict=True)]
    voxels = math.prod(trained.profile.spatial)
    fits = min(wanted) >= smallest / 2 and math.prod(wanted) <= LARGEST * voxels and min(ratio) >= FINEST
    if not fits:
        ratio = [float(coarsening(spatial, trained.profile.spatial))] * len(spatial)
    grid = [max(_up(size / times, multiple), smallest) for size, times in zip(spatial, ratio, strict=True)]
    if max(grid) < 2 * smallest:  # one voxel at the U-Net's coarsest level, which it cannot normalise
        grid[grid.index(max(grid))] = 2 * smallest
    padded = [max(size, round(new * times)) for size, new, times in zip(spatial, grid, ratio, strict=True)]
    return Sampling(tuple(grid), tuple(padded), fits)


def _nearly_whole(ratio: float) -> float:
    whole = max(1, round(ratio))
    return float(whole) if abs(ratio - whole) <= NEARLY * whole else ratio


def _up(size: float, multiple: int) -> int:
    """The next multiple; a rounding error above one is none."""
    return multiple * math.ceil(size / multiple - 1e-6)


def differences(pair: VolumePair, trained: Trained) -> list[str]:
    """What differs between a volume and a network's training, a sentence each; the network then does less well."""
    told = []
    if not sampling(pair.spatial, pair.spacing, trained).as_trained:
        trained_at, here = (
            " x ".join(f"{mm:.3g}" for mm in spacing) for spacing in (trained.spacing, pair.spacing)
        )
        told.append(f"the network was trained at {trained_at} mm; these voxels of {here} mm do not fit that.")
    axes, expected = ("".join(nib.aff2axcodes(affine)) for affine in (pair.affine, trained.affine))
    if len(pair.spatial) == 3 and axes != expected:
        told.append(
            f"the network was trained on axes that run to {expected}; by the header, these run to {axes}."
        )
    return told


# ------------------------------------------------------------------------------------------- registration


def with_levels(profile: Profile, levels: int | None = None, steps: int | None = None) -> Profile:
    """The profile with the first so many levels of its optimisers, and so many steps at each; None changes nothing."""
    settings, changed = profile.registration, {}
    for name in ("baseline", "instance"):
        kept = getattr(settings, name)[:levels]
        changed[name] = kept if steps is None else tuple(level._replace(steps=steps) for level in kept)
    return replace(profile, registration=replace(settings, **changed))


def register_without_training(labels: torch.Tensor, num_labels: int, profile: Profile) -> Deformation:
    """The no-training optimiser of a profile on labels uint8 (2, *spatial), fixed and moving, of any size.

    Returns:
        Deformation (1, D, *spatial) in voxels, on the CPU. On the profile's own grid it is that of
        ``pipeline.register_pairs``.
    """
    settings, spatial = profile.registration, tuple(labels.shape[1:])
    coarser = coarsening(spatial, profile.spatial)
    block = coarser * math.lcm(*(level.scale * level.control for level in settings.baseline))
    padded = [_up(size, block) for size in spatial]
    fixed, moving = _maps(labels, padded, num_labels, coarser)
    found = register_multilevel(
        fixed, moving, settings.baseline, smoothness=settings.smoothness, squarings=settings.squarings
    )
    return _cropped(found, padded, spatial)


def register_by_network(
    labels: torch.Tensor, spacing: Sequence[float], trained: Trained, instance: Sequence[Level] = ()
) -> Deformation:
    """A network on labels uint8 (2, *spatial) that it knows, of any size, then levels of instance optimisation.

    Args:
        spacing: of the labels, mm.

    Returns:
        As :func:`register_without_training`.
    """
    settings, spatial, num_labels = (
        trained.profile.registration,
        tuple(labels.shape[1:]),
        trained.profile.num_labels,
    )
    network, seen = trained.stage.model, sampling(spatial, spacing, trained)
    whole = pad_to(labels, seen.padded)
    fixed, moving = (
        label_maps(at_sampling(whole, seen.grid, num_labels), num_labels, 1).to(best_device()).split(1)
    )
    with torch.no_grad():
        velocities = network.velocities(fixed, moving, settings.repeats or 1)
    if instance:
        coarser = coarsening(seen.padded, trained.profile.spatial)
        fixed, moving = _maps(labels, seen.padded, num_labels, coarser)
        velocities = (refine_merged if settings.merge else refine)(
            fixed, moving, velocities, instance, smoothness=settings.smoothness, squarings=network.squarings
        )
    with torch.no_grad():
        return _cropped(integrate(velocities, network.squarings), seen.padded, spatial)


def _maps(
    labels: torch.Tensor, padded: Sequence[int], num_labels: int, coarser: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed and moving maps (1, C - 1, *padded / coarser) on the device that computes."""
    fixed, moving = label_maps(pad_to(labels, padded), num_labels, coarser).to(best_device()).split(1)
    return fixed, moving


def _cropped(found: Deformation, padded: Sequence[int], spatial: Sequence[int]) -> Deformation:
    return Deformation(*(crop_to(field, spatial).cpu() for field in found.resized(padded)))
