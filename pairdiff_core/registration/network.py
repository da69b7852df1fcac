"""The registration network: a sequence of small networks, inverse consistent by construction.

By construction, swapping the images swaps displacement and inverse. :mod:`pairdiff_core.registration.deformation` says
how closely these undo each other. Training and the intermediate steps of the network integrate without limiting the
roughness, which is cheap; :func:`pairdiff_core.registration.register` limits it.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from pairdiff_core.fields import smooth, warp
from pairdiff_core.profiles import CorrelationSettings, RegistrationSettings, UNetSettings
from pairdiff_core.registration.deformation import Deformation, Velocities, integrate
from pairdiff_core.registration.losses import averaged, label_maps, pool, registration_loss


class VelocityStep(nn.Module, ABC):
    """A network whose velocity changes sign when the images are swapped.

    It sees (A, B) and (B, A) in one batch; the difference of its two outputs, smoothed, is the velocity.

    Args:
        scale: it sees images averaged over this many voxels a side.
        control: its velocity is on a grid this many times coarser than the images, a multiple of ``scale``. A smooth
            flow needs no finer grid, and in 3D integrating it is most of the work.

    Raises:
        ValueError: if ``control`` is not a multiple of ``scale``.
    """

    def __init__(self, scale: int, control: int) -> None:
        super().__init__()
        if control % scale:
            raise ValueError(f"control must be a multiple of scale, got {control} and {scale}")
        self.scale, self.control = scale, control

    @abstractmethod
    def answers(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs (2N, D, *control grid) for (A, B), then (B, A), from all A, then all B, (2N, M, *grid)."""

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor, seen_at: int) -> torch.Tensor:
        """Velocity (N, D, *control grid), in voxels of that grid, for maps (N, M, *grid) pooled by ``seen_at``."""
        cells = [max(1, side * seen_at // self.control) for side in fixed.shape[2:]]
        images = averaged(torch.cat([fixed, moving]), [each * self.control // self.scale for each in cells])
        forth, back = self.answers(images).chunk(2)
        return smooth(forth - back)


class CorrelationStep(VelocityStep):
    """Compares features of both images over a distance, and turns the similarities into a velocity.

    At each cell of a coarse grid, the features of one image are multiplied with those of the other in all cells within
    reach (the correlation layer of FlowNet, Dosovitskiy et al., ICCV 2015), so the network need not learn to search.

    Args:
        settings: grid, reach and widths.
        spatial_dims: D, 2 or 3.
        maps: M, channels of one image.
    """

    def __init__(self, settings: CorrelationSettings, spatial_dims: int, maps: int) -> None:
        super().__init__(settings.scale, settings.control)
        from monai.networks.blocks import Convolution, ResidualUnit  # here, because importing it takes seconds

        patch, features, width = settings.control // settings.scale, settings.features, settings.width
        self.reach, norm = settings.reach, ("INSTANCE", {"affine": True})
        plain = {"conv_only": True, "strides": 1}
        self.features = nn.Sequential(
            Convolution(spatial_dims, maps, 2 * features, strides=patch, kernel_size=patch, padding=0, conv_only=True),
            *(Convolution(spatial_dims, 2 * features, 2 * features, norm=norm, act="LEAKYRELU") for _ in range(2)),
            Convolution(spatial_dims, 2 * features, features, **plain),
        )
        compared = (2 * settings.reach + 1) ** spatial_dims
        self.head = nn.Sequential(
            Convolution(spatial_dims, compared + 2 * features, width, **plain),
            *(
                ResidualUnit(spatial_dims, width, width, subunits=1, dilation=dilation, norm=norm, act="LEAKYRELU")
                for dilation in settings.dilations
            ),
        )
        self.final_conv = Convolution(spatial_dims, width, spatial_dims, kernel_size=1, **plain).conv
        _start_from_identity(self.final_conv)

    def answers(self, images: torch.Tensor) -> torch.Tensor:
        seen = self.features(images)  # (2N, F, *control grid)
        seen = seen / (seen.square().mean(1, keepdim=True) + 1e-3).sqrt()
        other = torch.cat(seen.chunk(2)[::-1])
        padded = F.pad(other, [self.reach] * 2 * (seen.dim() - 2))
        shifts = itertools.product(range(2 * self.reach + 1), repeat=seen.dim() - 2)
        windows = (
            padded[(..., *(slice(first, first + size) for first, size in zip(shift, seen.shape[2:], strict=True)))]
            for shift in shifts
        )
        similarities = torch.stack([(seen * window).mean(1) for window in windows], 1)  # (2N, (2 reach + 1)^D, *grid)
        return self.final_conv(self.head(torch.cat([similarities, seen, other], 1)))


class UNetStep(VelocityStep):
    """A U-Net that sees both images at once.

    If its control grid is coarser than its images, it sees them as patches, one for each cell of that grid. This keeps
    the arrangement of thin structures, and all convolutions work on the coarse grid.

    Args:
        settings: channels, and the scale of its images.
        control: of its velocity, see :class:`VelocityStep`.
        spatial_dims: D, 2 or 3.
        maps: M, channels of one image.
    """

    def __init__(self, settings: UNetSettings, control: int, spatial_dims: int, maps: int) -> None:
        super().__init__(settings.scale, control)
        from monai.networks.nets import BasicUNet  # here, because importing it takes seconds

        patch, channels = control // settings.scale, 2 * maps
        self.patches = nn.Identity()
        if patch > 1:
            channels = settings.channels[0]
            self.patches = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims](2 * maps, channels, patch, patch)
        self.unet = BasicUNet(spatial_dims, channels, spatial_dims, settings.channels)
        _start_from_identity(self.unet.final_conv)

    def answers(self, images: torch.Tensor) -> torch.Tensor:
        swapped = torch.cat(images.chunk(2)[::-1])
        return self.unet(self.patches(torch.cat([images, swapped], 1)))


def _start_from_identity(last: nn.Module) -> None:
    """Set the last layer of a step to zero, so that an untrained step moves nothing."""
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


class RegistrationNetwork(nn.Module):
    """A sequence of steps whose velocities all change sign when the images are swapped.

    Each step after the first sees both images warped halfway by the step before, so that swapping the images also swaps
    its inputs. The first may be a :class:`CorrelationStep` on a coarser grid, which finds large displacements.

    Args:
        settings: the steps, their grids, the squarings, and how often the last step is repeated.
        spatial_dims: 2 or 3.
        maps: M, channels of one image.
    """

    def __init__(self, settings: RegistrationSettings, spatial_dims: int, maps: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(UNetStep(each, settings.control, spatial_dims, maps) for each in settings.unets)
        if settings.correlation:
            self.steps.insert(0, CorrelationStep(settings.correlation, spatial_dims, maps))
        self.squarings, self.repeats = settings.squarings, settings.repeats
        self.scale = min(step.scale for step in self.steps)
        self.smallest = smallest_side(settings)

    def velocities(self, fixed: torch.Tensor, moving: torch.Tensor, repeats: int = 1) -> Velocities:
        """Velocities for maps (N, M, *spatial), each on its control grid and in its voxels; the outermost first.

        Args:
            repeats: how often the last step runs, each time on images warped by the step before. Displacements larger
                than in training then need not be found in one step.

        Raises:
            ValueError: if the images are too small for the U-Nets.
        """
        if min(fixed.shape[2:]) < self.smallest:
            raise ValueError(f"images need at least {self.smallest} voxels a side, got {tuple(fixed.shape[2:])}")
        fixed, moving = pool(fixed, self.scale), pool(moving, self.scale)
        found: list[torch.Tensor] = []
        for step in [*self.steps, *[self.steps[-1]] * (repeats - 1)]:
            if found:
                half = integrate((found[-1] / 2,), self.squarings).resized(fixed.shape[2:])
                fixed, moving = warp(fixed, half.inverse), warp(moving, half.displacement)
            found.append(step(fixed, moving, self.scale))
        return tuple(found)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> Deformation:
        """Register maps (N, M, *spatial); the deformation is on the finest grid of the U-Nets, in its voxels."""
        finest = [size // self.scale for size in fixed.shape[2:]]
        return integrate(self.velocities(fixed, moving), self.squarings).resized(finest)


def smallest_side(settings: RegistrationSettings) -> int:
    """The fewest voxels a side that images may have: the U-Nets halve the control grid four times."""
    return 16 * settings.control


def training_loss(
    model: nn.Module, labels: torch.Tensor, num_labels: int, settings: RegistrationSettings
) -> dict[str, torch.Tensor]:
    """What a training step minimises and logs, scalars.

    Args:
        model: a :class:`RegistrationNetwork`, or a wrapper of one.
        labels: pairs of label maps uint8 (N, 2, *spatial).
        num_labels: C, background included.
    """
    fixed, moving = (label_maps(image, num_labels) for image in labels.unbind(1))
    finest = min(step.scale for step in settings.unets)
    terms = registration_loss(
        model(fixed, moving), pool(fixed, finest), pool(moving, finest), settings.smoothness, scales=settings.scales
    )
    return {"loss": terms.total, "dissimilarity": terms.dissimilarity, "roughness": terms.roughness}
