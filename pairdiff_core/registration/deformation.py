"""Deformations: velocities, the displacement and its inverse that they integrate to, and what can be asked of them.

A deformation is described by one or more stationary velocity fields (v1, v2, ...). Negating them all inverts the
deformation exactly, up to interpolation; a network whose velocities change sign when its two images are swapped
therefore gives register(B, A) = inverse of register(A, B). Background: Arsigny et al., MICCAI 2006 (scaling and
squaring); Greer et al., "Inverse Consistency by Construction for Multistep Deep Registration", MICCAI 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pairdiff_core import fields

# One or more float (N, D, *grid), in voxels of that grid, the outermost first.
Velocities = tuple[torch.Tensor, ...]


@dataclass(eq=False)  # not frozen: Fabric takes what a network returns to pieces
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
        """From :attr:`both`."""
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
        """The first voxels along each axis, of a deformation on a padded grid."""
        return Deformation.from_both(self.both[(..., *(slice(size) for size in spatial))])

    def cpu(self) -> Deformation:
        return Deformation(self.displacement.cpu(), self.inverse.cpu())

    def warp(self, moving: torch.Tensor) -> torch.Tensor:
        """Maps of the moving image (N, M, *spatial), warped to look like the fixed one."""
        return fields.warp(moving, self.displacement)

    def warp_labels(self, moving: torch.Tensor) -> torch.Tensor:
        """Label maps of the moving image (N, *spatial), by nearest neighbour."""
        return fields.warp_labels(moving, self.displacement)

    def jacobian_determinant(self) -> torch.Tensor:
        """At every voxel, (N, *spatial); see :func:`pairdiff_core.fields.jacobian_determinant`."""
        return fields.jacobian_determinant(self.displacement)


def concatenated(deformations: Sequence[Deformation]) -> Deformation:
    """The deformations of several sets of pairs as those of one."""
    return Deformation(
        torch.cat([each.displacement for each in deformations]), torch.cat([each.inverse for each in deformations])
    )


def integrate(velocities: Velocities, squarings: int = 6) -> Deformation:
    """Velocities as a deformation that is inverted by negating them, on the grid of the last one.

    One velocity: exp(v1). Two: exp(v1 / 2) o exp(v2) o exp(v1 / 2), the symmetric composition of Greer et al. 2023,
    eq. 11; its inverse is the same with both signs changed, which exp(v1) o exp(v2) would not be. With more, the
    next takes the place of exp(v2) in the same way.
    """
    *outer, inner = velocities
    return enclosed(enclosing(outer, inner.shape[2:], squarings), inner, squarings)


def enclosing(
    outer: Sequence[torch.Tensor], spatial: Sequence[int], squarings: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What encloses the innermost velocity: exp(v1 / 2), exp(v2 / 2), ... in this order, and in the reverse one.

    Displacements (2N, D, *spatial), forth and back in one batch; None if there is nothing outside.
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
