"""Deformations: stationary velocities, and the displacement and its inverse that they integrate to.

A deformation is described by one or more stationary velocity fields (v1, v2, ...). In theory, negating them all inverts
the deformation exactly; a network whose velocities change sign when its two images are swapped therefore gives
register(B, A) = inverse of register(A, B). The stored fields have this property, too: swapping the images swaps them.

Both fields are interpolated linearly between voxels, so they undo each other only approximately. In measurements, the
mean round-trip error of :func:`integrate` was at most 0.2 voxels for smooth velocities, but several voxels for rough
ones; :func:`integrate_on` limits the roughness first. Background: Arsigny et al., MICCAI 2006 (scaling and squaring);
Greer et al., "Inverse Consistency by Construction for Multistep Deep Registration", MICCAI 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pairdiff_core import fields

# One or more float (N, D, *grid), in voxels of that grid, the outermost first.
Velocities = tuple[torch.Tensor, ...]

ROUGH = 9.0  # voxels of the image by which velocities may differ from one node of their grid to the next
FINER = 2  # rough velocities are integrated on a grid at most this many times finer than their own
CLOSE = 0.06  # voxels of the image: the largest mean round-trip error of rough velocities
SMOOTHINGS = 50  # at most, of rough places


@dataclass(eq=False)  # not frozen: Fabric takes apart what a network returns
class Deformation:
    """A displacement and its inverse, float (N, D, *spatial), in voxels.

    Attributes:
        displacement: fixed to moving: ``warp(moving, displacement)`` looks like fixed.
        inverse: moving to fixed: ``warp(fixed, inverse)`` looks like moving.
    """

    displacement: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def from_both(cls, both: torch.Tensor) -> Deformation:
        """Make a deformation from its fields as in :attr:`both`."""
        return cls(*both.chunk(2))

    @property
    def both(self) -> torch.Tensor:
        """Displacement and inverse in one batch, (2N, D, *spatial)."""
        return torch.cat([self.displacement, self.inverse])

    @property
    def spatial(self) -> tuple[int, ...]:
        """Size of the grid in voxels."""
        return tuple(self.displacement.shape[2:])

    def __len__(self) -> int:
        return len(self.displacement)

    def __getitem__(self, index: slice) -> Deformation:
        return Deformation(self.displacement[index], self.inverse[index])

    def inverted(self) -> Deformation:
        """The deformation from moving to fixed."""
        return Deformation(self.inverse, self.displacement)

    def resized(self, spatial: Sequence[int]) -> Deformation:
        """The same deformation on another grid over the same field of view."""
        return Deformation.from_both(fields.resize_field(self.both, spatial))

    def cropped(self, spatial: Sequence[int]) -> Deformation:
        """Keep the first voxels along each axis of a deformation on a padded grid."""
        return Deformation.from_both(self.both[(..., *(slice(size) for size in spatial))])

    def cpu(self) -> Deformation:
        return Deformation(self.displacement.cpu(), self.inverse.cpu())

    def warp(self, moving: torch.Tensor) -> torch.Tensor:
        """Warp maps of the moving image (N, M, *spatial) to look like the fixed one."""
        return fields.warp(moving, self.displacement)

    def warp_labels(self, moving: torch.Tensor) -> torch.Tensor:
        """Warp label maps of the moving image (N, *spatial) by nearest neighbour."""
        return fields.warp_labels(moving, self.displacement)

    def jacobian_determinant(self) -> torch.Tensor:
        """The determinant at every voxel, (N, *spatial); see :func:`pairdiff_core.fields.jacobian_determinant`."""
        return fields.jacobian_determinant(self.displacement)


def concatenated(deformations: Sequence[Deformation]) -> Deformation:
    """Join the deformations of several sets of pairs."""
    return Deformation(
        torch.cat([each.displacement for each in deformations]), torch.cat([each.inverse for each in deformations])
    )


def integrate(velocities: Velocities, squarings: int = 6) -> Deformation:
    """Integrate velocities to a deformation on the grid of the last one; negating them inverts it.

    One velocity gives exp(v1). Two give exp(v1 / 2) o exp(v2) o exp(v1 / 2), the symmetric composition of Greer et al.
    2023, eq. 11: changing both signs inverts it, unlike exp(v1) o exp(v2). More velocities are nested in the same way.
    """
    *outer, inner = velocities
    return enclosed(enclosing(outer, inner.shape[2:], squarings), inner, squarings)


def enclosing(
    outer: Sequence[torch.Tensor], spatial: Sequence[int], squarings: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The outer parts of the composition: exp(v1 / 2), exp(v2 / 2), ... composed in this order, and in reverse order.

    Displacements (2N, D, *spatial), both directions in one batch; None if there are no outer velocities.
    """
    before = after = None
    for velocity in outer:
        both = fields.resize_field(torch.cat([velocity, -velocity]), spatial)
        half = fields.exponentiate(both / 2, squarings)
        before = half if before is None else fields.compose(before, half)
        after = half if after is None else fields.compose(half, after)
    return None if before is None else (before, after)


def enclosed(halves: tuple[torch.Tensor, torch.Tensor] | None, inner: torch.Tensor, squarings: int) -> Deformation:
    """The deformation of an innermost velocity between the ``halves`` of :func:`enclosing`."""
    middle = fields.exponentiate(torch.cat([inner, -inner]), squarings)
    if halves is not None:
        middle = fields.compose(fields.compose(halves[0], middle), halves[1])
    return Deformation.from_both(middle)


def integrate_on(
    velocities: Velocities, spatial: Sequence[int], squarings: int = 6, measured_on: Sequence[int] | None = None
) -> Deformation:
    """Integrate velocities to a deformation of images of this size with a small round-trip error, even if rough.

    If the :func:`roughness` of a pair is at most ``ROUGH``, this is :func:`integrate`, resized. Other velocities are
    smoothed where they are rougher, integrated on a finer grid, and smoothed further until nothing folds and the mean
    round-trip error over the voxels that stay in view is at most ``CLOSE``, both measured on the finer grid. More
    squarings hardly help: the error comes from interpolation between grid nodes, not from long steps.

    Args:
        measured_on: size of the grid in whose voxels roughness and round trips are measured, so that a finer image of
            the same pair gets the same deformation; None: that of the images.

    Returns:
        Deformation on the grid of the images, in its voxels.
    """
    grid = velocities[-1].shape[2:]
    measured_on = measured_on or spatial
    velocities = tuple(fields.resize_field(each, grid) for each in velocities)
    rough = roughness(velocities, measured_on).flatten(1).amax(1) > ROUGH  # (N,)
    if not rough.any():
        return integrate(velocities, squarings).resized(spatial)
    found = []
    for index in range(len(rough)):  # one at a time: a pair must not depend on the others
        pair = tuple(each[index : index + 1] for each in velocities)
        deformation = _bounded(pair, measured_on, squarings) if rough[index] else integrate(pair, squarings)
        found.append(deformation.resized(spatial))
    return concatenated(found)


def _bounded(velocities: Velocities, spatial: Sequence[int], squarings: int) -> Deformation:
    """:func:`integrate_on` for one rough pair, on a grid at least as fine as its own."""
    finer = [min(FINER * old, max(old, new)) for old, new in zip(velocities[-1].shape[2:], spatial, strict=True)]
    limit = ROUGH
    while True:
        velocities = smoothed_where_rough(velocities, spatial, limit)
        found = integrate(tuple(fields.resize_field(each, finer) for each in velocities), squarings)
        if limit < 1 or _undoes_itself(found, spatial):
            return found
        limit *= 0.7


def _undoes_itself(found: Deformation, spatial: Sequence[int]) -> bool:
    """Whether nothing folds and the mean round-trip error, in voxels of images of this size, is at most ``CLOSE``."""
    if min(float(each.jacobian_determinant().min()) for each in (found, found.inverted())) <= 0:
        return False
    trip = found.both
    places = fields.identity_grid(found.spatial, trip.device) + trip
    last = places.new_tensor(found.spatial).reshape(-1, *[1] * len(spatial)) - 1
    inside = ((places >= 0) & (places <= last)).all(1)  # (2, *grid)
    distance = (fields.compose(trip, found.inverted().both) * _ratio(found.displacement, spatial)).norm(dim=1)
    return all(float(far[here].mean()) <= CLOSE for far, here in zip(distance, inside, strict=True) if here.any())


def _ratio(field: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """Voxels of images of this size per voxel of a field (N, D, *grid), as (D, 1, ..., 1)."""
    sides = [new / old for new, old in zip(spatial, field.shape[2:], strict=True)]
    return field.new_tensor(sides).reshape(-1, *[1] * len(sides))


def roughness(velocities: Velocities, spatial: Sequence[int]) -> torch.Tensor:
    """How much velocities on one grid differ between neighbouring nodes, in voxels of images of this size.

    The Frobenius norm of the forward differences, summed over the velocities, (N, 1, *grid). Its maximum, divided by
    the node spacing in voxels, bounds the logarithm of the factor by which the flow stretches or shrinks anything.
    """
    total = torch.zeros_like(velocities[0][:, :1])
    for velocity in velocities:
        velocity = velocity * _ratio(velocity, spatial)
        squares = torch.zeros_like(total)
        for axis in range(2, velocity.dim()):
            squares.narrow(axis, 0, velocity.shape[axis] - 1).add_(velocity.diff(dim=axis).square().sum(1, True))
        total += squares.sqrt()
    return total


def smoothed_where_rough(velocities: Velocities, spatial: Sequence[int], limit: float = ROUGH) -> Velocities:
    """Smooth velocities on one grid around each node with a :func:`roughness` above the limit until there is none.

    They do not change elsewhere. Negated velocities give negated results, so swapping the images still inverts the
    deformation. If smoothing is not enough, a pair's velocities are scaled down.
    """
    grow = {2: F.max_pool2d, 3: F.max_pool3d}[len(spatial)]
    for _ in range(SMOOTHINGS):
        rough = roughness(velocities, spatial) > limit
        if not rough.any():
            return velocities
        near = fields.smooth(grow(rough.float(), 5, stride=1, padding=2), times=1)
        velocities = tuple(each + near * (fields.smooth(each, times=1) - each) for each in velocities)
    left = roughness(velocities, spatial).flatten(1).amax(1).clamp_min(limit)
    return tuple(each * (limit / left).reshape(-1, *[1] * (each.dim() - 1)) for each in velocities)
