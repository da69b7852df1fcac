"""Optimisation for the very images at hand: without training, or from where a network led."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

from pairdiff_core.fields import resize_field, smooth, warp
from pairdiff_core.profiles import Level, RegistrationSettings
from pairdiff_core.registration.deformation import Deformation, Velocities, enclosed, enclosing, integrate
from pairdiff_core.registration.losses import bending_energy, pool, registration_loss

BLUR = 0.8  # standard deviation of the Gaussian on the maps of a level, in its voxels
LARGE = 2**16  # voxels of an image from which on it pays to compare only those near a structure
FAINT = 0.05  # less of a structure than this counts as none then
Watch = Callable[[range], Iterable[int]]  # goes through the steps of a level, and may show them, as tqdm does
MARGIN, LOOK_AGAIN = 1, 10  # voxels around structures that count as near; steps after which to look again


def optimise(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    velocities: Velocities,
    level: Level,
    *,
    smoothness: float,
    squarings: int = 6,
    blur: float = BLUR,
    only_near: bool | None = None,
    watch: Watch = iter,
) -> Velocities:
    """Improve velocities for these very images (N, M, *spatial) by gradient descent.

    A smoothed update is added to the innermost velocity; what encloses it stays, so the result is inverse consistent by
    construction like its start, and no step costs more than with one velocity alone. Velocities are integrated on a
    control grid that may be much coarser than the images: a smooth flow needs no finer one, and it is cheaper there.

    Args:
        velocities: where to start, on any grid over the same field of view.
        smoothness: weight of the squared gradient of the displacement.
        blur: standard deviation of a Gaussian on the pooled maps, in voxels of the level; 0 for none.
        only_near: compare only voxels near a structure, see :func:`voxels_near`; None: where images are large.

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
        (len(fixed) * loss).backward()  # the gradient of each pair is what it would be alone
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
    """:func:`optimise` level by level, each from where the one before ended; without levels, nothing changes.

    With ``settings.merge``, one velocity is optimised: the sum of these, or zero for each pair whose loss is lower from
    there after one level. The sum leaves out the commutators of the Baker-Campbell-Hausdorff formula, but all of it can
    be optimised then, while next to the innermost of several velocities the others stay as rough as a network made
    them. And a network may answer farther from the truth than no answer at all is; descent from there ends nearby.
    """
    weights = {"smoothness": settings.smoothness, "squarings": settings.squarings, "watch": watch}
    if settings.merge and levels and len(velocities) > 1:
        first, *levels = levels
        merged = sum(velocities)
        tried = [optimise(fixed, moving, (start,), first, **weights)[0] for start in (merged, torch.zeros_like(merged))]
        losses = [_loss_of_each(fixed, moving, velocity, first, settings) for velocity in tried]
        better = torch.stack(losses).argmin(0)  # (N,)
        velocities = (torch.stack(tried)[better, torch.arange(len(fixed))],)
    for level in levels:
        velocities = optimise(fixed, moving, velocities, level, **weights)
    return velocities


@torch.no_grad()
def _loss_of_each(
    fixed: torch.Tensor, moving: torch.Tensor, velocity: torch.Tensor, level: Level, settings: RegistrationSettings
) -> torch.Tensor:
    """The loss of each pair at a level, (N,)."""
    images = zip(
        velocity.split(1), _blurred(fixed, level, BLUR).split(1), _blurred(moving, level, BLUR).split(1), strict=True
    )
    losses = [_loss(integrate((one,), settings.squarings), *pair, level, settings.smoothness) for one, *pair in images]
    return torch.stack(losses)


@torch.no_grad()
def voxels_near(deformation: Deformation, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor | None:
    """Voxels, int64 (K, D), near which any of the maps (N, M, *spatial) shows a structure, as it is or warped.

    Everywhere else both images are background, and stay so as long as the displacement hardly changes. Vessels fill a
    few percent of a volume. None if these are more than half of all voxels, where leaving out the rest does not pay.
    """
    warped = warp(torch.cat([moving, fixed]), deformation.resized(fixed.shape[2:]).both)
    shown = torch.cat([fixed, moving, warped]) > FAINT  # (4N, M, *spatial)
    near = shown.flatten(0, 1).any(0)[None, None].float()  # (1, 1, *spatial)
    grow = {2: F.max_pool2d, 3: F.max_pool3d}[near.dim() - 2]
    for _ in range(MARGIN):
        near = grow(near, 3, stride=1, padding=1)
    return near[0, 0].nonzero() if near.mean() < 0.5 else None


def _blurred(maps: torch.Tensor, level: Level, blur: float) -> torch.Tensor:
    from monai.networks.layers import GaussianFilter  # here: its import takes seconds

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
