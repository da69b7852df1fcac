"""Optimisation of velocities for given images, from zero or from a network's result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

from pairdiff_core.fields import resize_field, smooth, warp
from pairdiff_core.profiles import Level, RegistrationSettings
from pairdiff_core.registration.deformation import Deformation, Velocities, enclosed, enclosing, integrate
from pairdiff_core.registration.losses import bending_energy, pool, registration_loss

LARGE = 2**16  # images of at least this many voxels are compared near structures only, which is faster
FAINT = 0.05  # a smaller share of a structure than this is then ignored
Watch = Callable[[range], Iterable[int]]  # iterates over the steps of a level, and may show progress, as tqdm does
MARGIN, LOOK_AGAIN = 1, 10  # voxels around structures that count as near; steps after which these are found again


def optimise(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    velocities: Velocities,
    level: Level,
    *,
    smoothness: float,
    squarings: int = 6,
    blur: float = 0.8,
    only_near: bool | None = None,
    watch: Watch = iter,
) -> Velocities:
    """Improve velocities for given images (N, M, *spatial) by gradient descent.

    A smoothed update is added to the innermost velocity. The outer ones do not change, so the result stays inverse
    consistent by construction, and a step costs no more than with a single velocity. Velocities are integrated on a
    control grid that may be much coarser than the images: a smooth flow needs no finer grid, and this is cheaper.

    Args:
        velocities: where to start, on any grid over the same field of view.
        smoothness: weight of the squared gradient of the displacement.
        blur: standard deviation of a Gaussian on the pooled maps, in voxels of the level; 0 for none.
        only_near: compare only voxels near a structure, see :func:`voxels_near`; None: if the images are large.

    Returns:
        Velocities, the innermost on the level's control grid, in its voxels.
    """
    fixed, moving = _blurred(fixed, level, blur), _blurred(moving, level, blur)
    if only_near is None:
        only_near = fixed[0, 0].numel() >= LARGE
    control = [max(1, size // level.control) for size in fixed.shape[2:]]
    *outer, inner = (velocity.detach() for velocity in velocities)
    start, halves = resize_field(inner, control), enclosing(outer, control, squarings)
    update = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([update], lr=level.learning_rate)
    voxels = None
    for step in watch(range(level.steps)):
        deformation = enclosed(halves, start + smooth(update), squarings)
        if only_near and step % LOOK_AGAIN == 0:
            voxels = voxels_near(deformation, fixed, moving)
        loss = _loss(deformation, fixed, moving, level, smoothness, voxels)
        adam.zero_grad()
        (len(fixed) * loss).backward()  # each pair has the gradient that it would have alone
        adam.step()
    return (*outer, start + smooth(update.detach()))


def refine(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    velocities: Velocities,
    levels: Sequence[Level],
    settings: RegistrationSettings,
    watch: Watch = iter,
) -> Velocities:
    """:func:`optimise` level by level, each from the result of the one before; without levels, nothing changes."""
    smoothness = settings.smoothness if settings.optimiser_smoothness is None else settings.optimiser_smoothness
    options = {"smoothness": smoothness, "squarings": settings.squarings, "blur": settings.blur, "watch": watch}
    for level in levels:
        velocities = optimise(fixed, moving, velocities, level, **options)
    return velocities


def refine_network(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    velocities: Velocities,
    settings: RegistrationSettings,
    watch: Watch = iter,
) -> Velocities:
    """Improve a network's velocities at the levels ``settings.instance``; without levels, nothing changes.

    With ``settings.merge``, their sum is optimised as one velocity. The sum leaves out the commutators of the
    Baker-Campbell-Hausdorff formula, but all of it can be optimised; otherwise the outer velocities stay as rough as
    the network made them. A pair that the network does not bring closer (:func:`brings_closer`) starts from zero
    instead, with the levels ``settings.baseline``.
    """
    if not settings.merge or not settings.instance:
        return refine(fixed, moving, velocities, settings.instance, settings, watch)
    start = merged(velocities)
    closer = brings_closer(fixed, moving, start, settings)
    found = []
    for pair, good in enumerate(closer.tolist()):
        one, other, velocity = (each[pair : pair + 1] for each in (fixed, moving, start))
        levels = settings.instance if good else settings.baseline
        found += refine(one, other, (velocity if good else 0 * velocity,), levels, settings, watch)
    grid = max((each.shape[2:] for each in found), key=math.prod)
    return (torch.cat([resize_field(each, grid) for each in found]),)


def merged(velocities: Velocities) -> torch.Tensor:
    """The sum of velocities (N, D, *grid), on the grid of the innermost."""
    return sum(resize_field(each, velocities[-1].shape[2:]) for each in velocities)


@torch.no_grad()
def brings_closer(
    fixed: torch.Tensor, moving: torch.Tensor, velocity: torch.Tensor, settings: RegistrationSettings
) -> torch.Tensor:
    """Whether a velocity lowers each pair's dissimilarity at the first level of ``settings.instance``, bool (N,)."""
    level = settings.instance[0]
    one, other = (_blurred(each, level, settings.blur) for each in (fixed, moving))

    def dissimilarity(pair: int, share: float) -> torch.Tensor:
        found = integrate((share * velocity[pair : pair + 1],), settings.squarings)
        return registration_loss(found, one[pair : pair + 1], other[pair : pair + 1], 0.0).dissimilarity

    return torch.stack([dissimilarity(pair, 1.0) < dissimilarity(pair, 0.0) for pair in range(len(fixed))])


@torch.no_grad()
def voxels_near(deformation: Deformation, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor | None:
    """Voxels, int64 (K, D), that are near a structure in any of the maps (N, M, *spatial), warped or not.

    Everywhere else both images are background, and stay so as long as the displacement hardly changes. Vessels fill a
    few percent of a volume. None if these are more than half of all voxels: then leaving out the rest is not worth it.
    """
    warped = warp(torch.cat([moving, fixed]), deformation.resized(fixed.shape[2:]).both)
    shown = torch.cat([fixed, moving, warped]) > FAINT  # (4N, M, *spatial)
    near = shown.flatten(0, 1).any(0)[None, None].float()  # (1, 1, *spatial)
    grow = {2: F.max_pool2d, 3: F.max_pool3d}[near.dim() - 2]
    for _ in range(MARGIN):
        near = grow(near, 3, stride=1, padding=1)
    return near[0, 0].nonzero() if near.mean() < 0.5 else None


def _blurred(maps: torch.Tensor, level: Level, blur: float) -> torch.Tensor:
    from monai.networks.layers import GaussianFilter  # here, because importing it takes seconds

    maps = pool(maps, level.scale)
    return GaussianFilter(maps.dim() - 2, blur).to(maps.device)(maps) if blur > 0 else maps


def _loss(
    deformation: Deformation,
    fixed: torch.Tensor,
    moving: torch.Tensor,
    level: Level,
    smoothness: float,
    voxels: torch.Tensor | None = None,
) -> torch.Tensor:
    loss = registration_loss(deformation, fixed, moving, smoothness, voxels).total
    return loss + level.bending * bending_energy(deformation.both) if level.bending else loss
