"""The registration network: small U-Nets, one after the other, inverse consistent by construction.

By construction, swapping the images swaps displacement and inverse. That these undo each other holds in theory; in
numbers only as nearly as :mod:`pairdiff_core.registration.deformation` says. Training and the steps between the U-Nets
integrate cheaply, without bounding the roughness; :func:`pairdiff_core.registration.register` bounds it.
"""

from __future__ import annotations

import torch
from torch import nn

from pairdiff_core.fields import smooth, warp
from pairdiff_core.profiles import RegistrationSettings, UNetStep
from pairdiff_core.registration.deformation import Deformation, Velocities, integrate
from pairdiff_core.registration.losses import label_maps, pool, registration_loss


class VelocityStep(nn.Module):
    """A U-Net whose velocity changes its sign when the images are swapped.

    It sees (A, B) and (B, A) in one batch; the difference of its two answers, smoothed, is the velocity.

    Args:
        settings: channels, and how many times coarser the images are that it sees.
        control: the velocity lives on a grid this many times coarser than the images, a multiple of that. A smooth
            flow needs no finer one, and in 3D integrating it is most of the work.
        spatial_dims: 2 or 3.
        maps: M, channels of one image.
    """

    def __init__(self, settings: UNetStep, control: int, spatial_dims: int, maps: int) -> None:
        super().__init__()
        if control % settings.scale:
            raise ValueError(f"control must be a multiple of scale, got {control} and {settings.scale}")
        self.scale, self.control = settings.scale, control
        from monai.networks.nets import BasicUNet  # here: its import takes seconds

        self.unet = BasicUNet(spatial_dims, 2 * maps, spatial_dims, settings.channels)
        nn.init.zeros_(self.unet.final_conv.weight)  # start from the identity
        nn.init.zeros_(self.unet.final_conv.bias)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor, seen_at: int) -> torch.Tensor:
        """Velocity (N, D, *control grid), in its voxels, of maps (N, M, *grid) that were pooled by ``seen_at``."""
        fixed, moving = pool(fixed, self.scale // seen_at), pool(moving, self.scale // seen_at)
        both = torch.cat([torch.cat([fixed, moving], 1), torch.cat([moving, fixed], 1)])  # (2N, 2M, *grid)
        forth, back = self.unet(both).chunk(2)
        return smooth(pool(forth - back, self.control // self.scale))


class RegistrationNetwork(nn.Module):
    """Velocity steps, one after the other, whose velocities all change their sign when the images are swapped.

    Each step but the first sees both images moved halfway by the one before, so that swapping the images swaps its
    inputs, too. The first may see coarser images: it finds what moves far at a fraction of the cost.

    Args:
        settings: the U-Nets, the control grid, the squarings, and how often the last step is repeated.
        spatial_dims: 2 or 3.
        maps: M, channels of one image.
    """

    def __init__(self, settings: RegistrationSettings, spatial_dims: int, maps: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(VelocityStep(each, settings.control, spatial_dims, maps) for each in settings.unets)
        self.squarings, self.repeats = settings.squarings, settings.repeats
        self.scale = min(step.scale for step in self.steps)
        self.smallest = 16 * max(step.scale for step in self.steps)  # the U-Nets halve their grid four times

    def velocities(self, fixed: torch.Tensor, moving: torch.Tensor, repeats: int = 1) -> Velocities:
        """Velocities for maps (N, M, *spatial), on the control grid and in its voxels; the outermost first.

        Args:
            repeats: how often the last step is taken, each time from where the one before led. Images that are farther
                from each other than in training then need not be registered in one go.

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
        """Register maps (N, M, *spatial); the deformation lives on the finest grid of the U-Nets, in its voxels."""
        finest = [size // self.scale for size in fixed.shape[2:]]
        return integrate(self.velocities(fixed, moving), self.squarings).resized(finest)


def training_loss(
    model: nn.Module, labels: torch.Tensor, num_labels: int, settings: RegistrationSettings
) -> dict[str, torch.Tensor]:
    """What a training step minimises and logs, scalars.

    Args:
        model: a :class:`RegistrationNetwork`, or what wraps it.
        labels: pairs of label maps uint8 (N, 2, *spatial).
        num_labels: C, background included.
    """
    fixed, moving = (label_maps(image, num_labels) for image in labels.unbind(1))
    finest = min(step.scale for step in settings.unets)
    terms = registration_loss(
        model(fixed, moving), pool(fixed, finest), pool(moving, finest), settings.smoothness, scales=settings.scales
    )
    return {"loss": terms.total, "dissimilarity": terms.dissimilarity, "roughness": terms.roughness}
