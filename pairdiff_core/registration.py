"""Stage 5: deformable registration, inverse consistent by construction.

A deformation is described by one or more stationary velocity fields (v1, v2, ...). Negating them all inverts the
deformation exactly, up to interpolation; a network whose velocities change sign when its two images are swapped
therefore gives register(B, A) = inverse of register(A, B). Background: Arsigny et al., MICCAI 2006 (scaling and
squaring); Greer et al., "Inverse Consistency by Construction for Multistep Deep Registration", MICCAI 2023.

Images come in as *maps*: float (N, M, *spatial), one channel a structure, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.networks.layers import GaussianFilter
from monai.networks.nets import BasicUNet
from torch import nn

from pairdiff_core.fields import compose, exponentiate, resize_field, smooth, warp, warp_at
from pairdiff_core.pairs import one_hot
from pairdiff_core.profiles import Level

LARGE = 2**16  # voxels of an image from which on it pays to look at a part of them alone
BLUR = 0.8  # standard deviation of the Gaussian on the maps of a level, in its voxels
FAINT = 0.05  # less of a structure than this is taken for none then
MARGIN, LOOK_AGAIN = 1, 10  # voxels around structures that count as near; steps after which to look again

# One or more float (N, D, *grid), in voxels of that grid, the outermost first.
Velocities = tuple[torch.Tensor, ...]


class Deformation(NamedTuple):
    """A displacement and its inverse, float (N, D, *spatial), in voxels."""

    displacement: torch.Tensor  # fixed to moving: warp(moving, displacement) looks like fixed
    inverse: torch.Tensor  # moving to fixed: warp(fixed, inverse) looks like moving

    def resized(self, spatial: Sequence[int]) -> Deformation:
        """The same deformation on another grid over the same field of view."""
        return Deformation(*(resize_field(field, spatial) for field in self))


def integrate(velocities: Velocities, squarings: int = 6) -> Deformation:
    """Velocities as a deformation that is inverted by negating them, on the grid of the last one.

    One velocity: exp(v1). Two: exp(v1 / 2) o exp(v2) o exp(v1 / 2), the symmetric composition of Greer et al. 2023,
    eq. 11; its inverse is the same with both signs changed, which exp(v1) o exp(v2) would not be. With more, the
    next takes the place of exp(v2) in the same way.
    """
    *outer, inner = velocities
    return _between(_halves(outer, inner.shape[2:], squarings), inner, squarings)


def _halves(
    outer: Sequence[torch.Tensor], spatial: Sequence[int], squarings: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What encloses the innermost velocity: exp(v1 / 2), exp(v2 / 2), ... in this order, and in the reverse one.

    Displacements (2N, D, *spatial), forth and back in one batch; None if there is nothing outside.
    """
    before = after = None
    for velocity in outer:
        both = resize_field(torch.cat([velocity, -velocity]), spatial)
        half = exponentiate(both / 2, squarings)
        before = half if before is None else compose(before, half)
        after = half if after is None else compose(half, after)
    return None if before is None else (before, after)


def _between(
    halves: tuple[torch.Tensor, torch.Tensor] | None, inner: torch.Tensor, squarings: int
) -> Deformation:
    middle = exponentiate(torch.cat([inner, -inner]), squarings)
    if halves is not None:
        middle = compose(compose(halves[0], middle), halves[1])
    return Deformation(*middle.chunk(2))


class RegistrationLoss(NamedTuple):
    """Terms of the loss, scalars."""

    total: torch.Tensor
    dissimilarity: (
        torch.Tensor
    )  # mean over voxels of the summed absolute difference of the maps, both directions
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
        voxels: int64 (K, D), to look at these only, as if the maps were alike everywhere else; by default at all.
        scales: compare the maps also averaged over 2, 4, ... voxels a side, so many times in all, and add up. What is
            thin and far off overlaps with nothing; only a coarse view tells which way to go.

    Raises:
        ValueError: for several scales of single voxels.
    """
    if voxels is not None and scales > 1:
        raise ValueError("images cannot be averaged where only some of their voxels are looked at")
    images, targets = torch.cat([moving, fixed]), torch.cat([fixed, moving])  # both ways at once
    if voxels is None:
        differences = warp(images, torch.cat(deformation.resized(fixed.shape[2:]))) - targets
        views = [pool(differences, 2**scale) for scale in range(scales)]
        dissimilarity = sum(view.abs().sum() / view[:, 0].numel() for view in views)
    else:
        differences = warp_at(images, torch.cat(deformation), voxels) - targets[(..., *voxels.T)]
        dissimilarity = differences.abs().sum() / targets[:, 0].numel()
    roughness = (squared_gradient(deformation.displacement) + squared_gradient(deformation.inverse)) / 2
    return RegistrationLoss(dissimilarity + smoothness * roughness, dissimilarity, roughness)


@torch.no_grad()
def voxels_in_play(
    deformation: Deformation, fixed: torch.Tensor, moving: torch.Tensor
) -> torch.Tensor | None:
    """Voxels, int64 (K, D), near which any of the maps (N, M, *spatial) shows something, as it is or warped.

    Everywhere else both images are background, and stay so as long as the displacement hardly changes. Vessels fill a
    few percent of a volume. None if these are more than half of all voxels, where leaving out the rest does not pay.
    """
    warped = warp(torch.cat([moving, fixed]), torch.cat(deformation.resized(fixed.shape[2:])))
    shown = torch.cat([fixed, moving, warped]) > FAINT  # (4N, M, *spatial)
    near = shown.flatten(0, 1).any(0)[None, None].float()  # (1, 1, *spatial)
    grow = {2: F.max_pool2d, 3: F.max_pool3d}[near.dim() - 2]
    for _ in range(MARGIN):
        near = grow(near, 3, stride=1, padding=1)
    return near[0, 0].nonzero() if near.mean() < 0.5 else None


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


def label_maps(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Label maps uint8 (N, *spatial) as float (N, C - 1, *spatial), without the background."""
    return one_hot(labels, num_labels)[:, 1:]


def pool(maps: torch.Tensor, scale: int) -> torch.Tensor:
    """Maps (N, M, *spatial) averaged over cubes of ``scale`` voxels: the share of each structure in each cube."""
    if scale == 1:
        return maps
    return F.interpolate(maps, size=[max(1, size // scale) for size in maps.shape[2:]], mode="area")


class TwoStepNetwork(nn.Module):
    """Two small U-Nets, one after the other, that give velocities of opposite sign when the images are swapped.

    Each U-Net sees (A, B) and (B, A) in one batch; the difference of its two answers, smoothed, is the velocity.
    The second step sees both images moved halfway by the first, so that swapping them swaps its inputs, too.

    Args:
        spatial_dims: 2 or 3.
        maps: M, channels of one image.
        channels: of MONAI's ``BasicUNet``, six numbers (published: 8 16 32 64 64 64).
        scale: the U-Nets see images this many times coarser (published: 2).
        squarings: of scaling and squaring.
        control: the velocities live on a grid this many times coarser still (published: 1). A smooth flow needs no
            finer one, and in 3D following it is most of the work.
        coarser: the first U-Net sees images this many times coarser than the second (published: 1), and is so many
            times wider. It finds what moves far at a fraction of the cost; both velocities are on the same grid.

    Raises:
        ValueError: if ``coarser`` does not divide ``control``.
    """

    def __init__(
        self,
        spatial_dims: int,
        maps: int,
        channels: Sequence[int],
        scale: int = 2,
        squarings: int = 6,
        control: int = 1,
        coarser: int = 1,
    ) -> None:
        super().__init__()
        if control % coarser:
            raise ValueError(f"coarser must divide control, got coarser {coarser} and control {control}")
        self.scale, self.squarings, self.control, self.coarser = scale, squarings, control, coarser
        self.steps = nn.ModuleList(
            BasicUNet(spatial_dims, 2 * maps, spatial_dims, [wider * width for width in channels])
            for wider in (coarser, 1)
        )
        for step in self.steps:  # start from the identity
            nn.init.zeros_(step.final_conv.weight)
            nn.init.zeros_(step.final_conv.bias)

    def _velocity(
        self, step: nn.Module, fixed: torch.Tensor, moving: torch.Tensor, coarser: int = 1
    ) -> torch.Tensor:
        fixed, moving = pool(fixed, coarser), pool(moving, coarser)
        both = torch.cat([torch.cat([fixed, moving], 1), torch.cat([moving, fixed], 1)])  # (2N, 2M, *grid)
        forth, back = step(both).chunk(2)
        return smooth(pool(forth - back, self.control // coarser))

    def velocities(self, fixed: torch.Tensor, moving: torch.Tensor, repeats: int = 1) -> Velocities:
        """Velocities for maps (N, M, *spatial), on the control grid and in its voxels; the outermost first.

        Args:
            repeats: how often the second step is taken, each time from where the last one led (published: 1, as in
                training). What is farther apart than in training then needs not be reached in one go.
        """
        smallest = 16 * self.scale * self.coarser  # the U-Net halves its grid four times
        if min(fixed.shape[2:]) < smallest:
            raise ValueError(f"images need at least {smallest} voxels a side, got {tuple(fixed.shape[2:])}")
        fixed, moving = pool(fixed, self.scale), pool(moving, self.scale)
        found = [self._velocity(self.steps[0], fixed, moving, self.coarser)]
        for _ in range(repeats):
            half = integrate((found[-1] / 2,), self.squarings).resized(fixed.shape[2:])
            fixed, moving = warp(fixed, half.inverse), warp(moving, half.displacement)
            found.append(self._velocity(self.steps[1], fixed, moving))
        return tuple(found)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> Deformation:
        """Register maps (N, M, *spatial); the deformation lives on the grid of the U-Nets, in its voxels."""
        coarser = [size // self.scale for size in fixed.shape[2:]]
        return integrate(self.velocities(fixed, moving), self.squarings).resized(coarser)


def optimise(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    velocities: Velocities,
    level: Level,
    *,
    smoothness: float,
    blur: float = BLUR,
    squarings: int = 6,
) -> Velocities:
    """Improve velocities for these very images (N, M, *spatial) by gradient descent; no training, no labels of others.

    A smoothed update is added to the innermost velocity; what encloses it stays, so the result is inverse consistent by
    construction like its start, and no step costs more than with one velocity alone. Velocities are integrated on a
    control grid that may be much coarser than the images: a smooth flow needs no finer one, and it is cheaper there.

    Args:
        velocities: where to start, on any grid over the same view.
        smoothness: weight of the squared gradient of the displacement.
        blur: standard deviation of a Gaussian on the pooled maps, in voxels of the level; 0 for none.

    Returns:
        Velocities, the innermost on the level's control grid, in its voxels.
    """
    fixed, moving = _seen(fixed, level, blur), _seen(moving, level, blur)
    control = [max(1, size // level.control) for size in fixed.shape[2:]]
    *outer, inner = (velocity.detach() for velocity in velocities)
    start, halves = resize_field(inner, control), _halves(outer, control, squarings)
    update = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([update], lr=level.learning_rate)
    voxels = None
    for step in range(level.steps):
        deformation = _between(halves, start + smooth(update), squarings)
        if step % LOOK_AGAIN == 0 and fixed[0, 0].numel() >= LARGE:
            voxels = voxels_in_play(deformation, fixed, moving)
        loss = _level_loss(deformation, fixed, moving, level, smoothness, voxels)
        adam.zero_grad()
        (len(fixed) * loss).backward()  # the gradient of each pair is what it would be alone
        adam.step()
    return (*outer, start + smooth(update.detach()))


def _seen(maps: torch.Tensor, level: Level, blur: float) -> torch.Tensor:
    maps = pool(maps, level.scale)
    return GaussianFilter(maps.dim() - 2, blur).to(maps.device)(maps) if blur > 0 else maps


def _level_loss(
    deformation: Deformation,
    fixed: torch.Tensor,
    moving: torch.Tensor,
    level: Level,
    smoothness: float,
    voxels: torch.Tensor | None = None,
) -> torch.Tensor:
    loss = registration_loss(deformation, fixed, moving, smoothness, voxels).total
    return loss + level.bending * bending_energy(torch.cat(deformation)) if level.bending else loss


def merged(velocities: Velocities) -> Velocities:
    """One velocity in the place of several on one grid: their sum, which to first order has the same flow.

    It leaves out the commutators of the Baker-Campbell-Hausdorff formula. But all of it can be optimised then, while
    next to the innermost of several velocities the others stay as rough as a network made them.
    """
    return (sum(velocities),)


def refine(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    velocities: Velocities,
    levels: Sequence[Level],
    *,
    smoothness: float,
    squarings: int = 6,
) -> Velocities:
    """One :func:`optimise` after the other, each from where the last one ended; without levels, nothing changes."""
    for level in levels:
        velocities = optimise(fixed, moving, velocities, level, smoothness=smoothness, squarings=squarings)
    return velocities


def refine_merged(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    velocities: Velocities,
    levels: Sequence[Level],
    *,
    smoothness: float,
    squarings: int = 6,
) -> Velocities:
    """:func:`refine` of one velocity, from the sum of these, or from nothing where its loss is lower after one level.

    A network may answer farther from the truth than no answer at all is, and descent from there ends nearby. One more
    coarse level is cheap, and its loss, smoothness and bending energy included, picks the start of each pair.
    """
    first, *others = levels
    options = {"smoothness": smoothness, "squarings": squarings}
    (start,) = merged(velocities)
    tried = [
        optimise(fixed, moving, (velocity,), first, **options)[0]
        for velocity in (start, torch.zeros_like(start))
    ]
    with torch.no_grad():
        seen = [_seen(maps, first, BLUR) for maps in (fixed, moving)]
        losses = [
            [
                _level_loss(integrate((one,), squarings), *images, first, smoothness)
                for one, *images in zip(*(batch.split(1) for batch in (velocity, *seen)), strict=True)
            ]
            for velocity in tried
        ]
        nearer = torch.tensor(losses).argmin(0)  # (N,)
    chosen = torch.stack(tried)[nearer, torch.arange(len(start))]
    return refine(fixed, moving, (chosen,), others, **options)


def register_multilevel(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    levels: Sequence[Level],
    *,
    smoothness: float,
    squarings: int = 6,
) -> Deformation:
    """The no-training baseline: from the identity, coarse to fine, one velocity; displacement on the images' grid."""
    dims = fixed.dim() - 2
    velocities: Velocities = (fixed.new_zeros((len(fixed), dims, *[1] * dims)),)
    velocities = refine(fixed, moving, velocities, levels, smoothness=smoothness, squarings=squarings)
    with torch.no_grad():
        return integrate(velocities, squarings).resized(fixed.shape[2:])


def register(
    network: TwoStepNetwork,
    fixed: torch.Tensor,
    moving: torch.Tensor,
    instance: Sequence[Level] = (),
    *,
    smoothness: float = 0.0,
    repeats: int = 1,
    merge: bool = False,
) -> Deformation:
    """Register maps (N, M, *spatial) by a trained network, then optimise for these very images, level by level.

    Args:
        smoothness: of that optimisation, as :func:`optimise` takes it.
        repeats: as :meth:`TwoStepNetwork.velocities` takes it.
        merge: whether to optimise one velocity, as :func:`refine_merged` does, and not the network's innermost.

    Returns the deformation on the images' grid, in its voxels.
    """
    network.eval()
    with torch.no_grad():
        velocities = network.velocities(fixed, moving, repeats)
    if instance:
        velocities = (refine_merged if merge else refine)(
            fixed, moving, velocities, instance, smoothness=smoothness, squarings=network.squarings
        )
    with torch.no_grad():
        return integrate(velocities, network.squarings).resized(fixed.shape[2:])
