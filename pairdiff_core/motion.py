"""A statistical model of motions: a mean displacement and principal components."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pairdiff_core import fields

SMALLEST_DETERMINANT = 0.15  # a field that comes nearer to folding is smoothed


@dataclass(frozen=True, eq=False)
class MotionModel:
    """A Gaussian over displacements on one grid.

    Attributes:
        mean: float (1, D, *grid), voxels.
        components: float (R, D, *grid), orthonormal, largest variance first.
        deviations: float (R,), the standard deviation of each component's coefficient.
    """

    mean: torch.Tensor
    components: torch.Tensor
    deviations: torch.Tensor

    def motion(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The displacement (1, D, *grid) of up to R coefficients, in standard deviations; smoothed if it would fold."""
        number = len(coefficients)
        return unfolded(
            self.mean + torch.tensordot(coefficients * self.deviations[:number], self.components[:number], 1)
        )

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """A random displacement (1, D, *grid)."""
        return self.motion(torch.randn(len(self.deviations), generator=generator))


def motion_model(displacement: torch.Tensor, components: int = 16) -> MotionModel:
    """Fit mean and principal components to displacements (M, D, *grid); at most M - 1 components."""
    mean, number = displacement.mean(0, keepdim=True), min(components, len(displacement) - 1)
    _, values, axes = torch.linalg.svd((displacement - mean).flatten(1), full_matrices=False)
    deviations = values[:number] / (len(displacement) - 1) ** 0.5
    return MotionModel(mean, axes[:number].unflatten(1, mean.shape[1:]), deviations)


def unfolded(displacement: torch.Tensor) -> torch.Tensor:
    """Smooth a displacement (1, D, *grid) until its Jacobian determinant is at least 0.15 everywhere."""
    while fields.jacobian_determinant(displacement).min() < SMALLEST_DETERMINANT:
        displacement = (displacement + fields.smooth(displacement, times=1)) / 2
    return displacement
