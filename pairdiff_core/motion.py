"""A model of motions: a mean displacement and the principal ways in which others differ from it."""

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
        components: float (R, D, *grid), orthonormal, those of the largest variance first.
        deviations: float (R,), standard deviation of the coefficient of each.
    """

    mean: torch.Tensor
    components: torch.Tensor
    deviations: torch.Tensor

    def motion(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The displacement (1, D, *grid) with R coefficients or fewer, in standard deviations; made not to fold."""
        number = len(coefficients)
        return unfolded(
            self.mean + torch.tensordot(coefficients * self.deviations[:number], self.components[:number], 1)
        )

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """A random displacement (1, D, *grid)."""
        return self.motion(torch.randn(len(self.deviations), generator=generator))


def motion_model(displacement: torch.Tensor, components: int = 16) -> MotionModel:
    """Mean and principal components of displacements (M, D, *grid); fewer than M components."""
    mean, number = displacement.mean(0, keepdim=True), min(components, len(displacement) - 1)
    _, values, axes = torch.linalg.svd((displacement - mean).flatten(1), full_matrices=False)
    deviations = values[:number] / (len(displacement) - 1) ** 0.5
    return MotionModel(mean, axes[:number].unflatten(1, mean.shape[1:]), deviations)


def unfolded(displacement: torch.Tensor) -> torch.Tensor:
    """A displacement (1, D, *grid), smoothed as often as it takes for its determinant to stay above 0.15 everywhere."""
    while fields.jacobian_determinant(displacement).min() < SMALLEST_DETERMINANT:
        displacement = (displacement + fields.smooth(displacement, times=1)) / 2
    return displacement
