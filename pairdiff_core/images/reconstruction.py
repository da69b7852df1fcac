"""A slice from a part of its Fourier transform, completed by a score network or by the least total variation.

A scanner measures the Fourier transform line by line; lines that it skips have to be filled in. A denoiser for all
levels of noise gives the score of the images (Song and Ermon, "Generative Modeling by Estimating Gradients of the Data
Distribution", NeurIPS 2019). Denoising and replacing what was measured alternate, as in DiffusionMBIR (Chung et al.,
CVPR 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from pairdiff_core.profiles import ScoreNetworkSettings

SPREAD = 0.4  # root mean square of the images
LOWEST, HIGHEST = 0.05, 2.0  # standard deviations of the noise in training


class ScoreNetwork(nn.Module):
    """A denoiser of T1 images, given FLAIR images: MONAI's ``UNet`` with the noise level as a third input.

    Inputs and outputs are scaled, so that all levels are about equally hard (Karras et al., "Elucidating the Design
    Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1).
    """

    def __init__(self, settings: ScoreNetworkSettings, spatial_dims: int) -> None:
        super().__init__()
        from monai.networks.nets import UNet  # here, because importing it takes seconds

        strides = (2,) * (len(settings.channels) - 1)
        self.network = UNet(spatial_dims, 3, 1, settings.channels, strides, num_res_units=2, norm=None)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, flair: torch.Tensor) -> torch.Tensor:
        """The denoised images (N, 1, *spatial).

        Args:
            noisy: float (N, 1, *spatial), images plus noise.
            sigma: float (N, 1, ..., 1), the standard deviation of the noise.
            flair: float (N, 1, *spatial), the same slices in the other contrast, or zeros.
        """
        scale = (sigma**2 + SPREAD**2).sqrt()
        level = (sigma.log() / 2).expand_as(noisy)
        change = self.network(torch.cat([noisy / scale, level, flair], 1))
        return (SPREAD / scale) ** 2 * noisy + sigma * SPREAD / scale * change


class Batch(NamedTuple):
    """Images float (N, 1, *spatial) for one training step."""

    t1: torch.Tensor
    noise: torch.Tensor  # standard normal
    sigma: torch.Tensor  # float (N, 1, ..., 1), its standard deviation after scaling
    flair: torch.Tensor


def denoising_loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The squared error of the denoised images, weighted so that all levels of noise count alike (Karras et al.)."""
    denoised = model(batch.t1 + batch.sigma * batch.noise, batch.sigma, batch.flair)
    weight = 1 / batch.sigma**2 + 1 / SPREAD**2
    return {"loss": (weight * (denoised - batch.t1) ** 2).mean()}


class Measurement(NamedTuple):
    """A part of the Fourier transform of N images."""

    values: torch.Tensor  # complex (N, 1, H, W), zero where nothing was measured
    lines: torch.Tensor  # bool (H, 1), the measured ones; frequency 0 is the first


def measure_lines(images: torch.Tensor, every: int = 4, middle: int = 8) -> Measurement:
    """Every n-th line of the Fourier transform of images (N, 1, H, W), and the ``middle`` ones of lowest frequency."""
    lines = torch.zeros(images.shape[2], 1, dtype=torch.bool)
    lines[::every] = lines[: middle // 2] = lines[-(middle // 2) :] = True
    return Measurement(torch.fft.fft2(images, norm="ortho") * lines, lines)


def replace_measured(images: torch.Tensor, measured: Measurement) -> torch.Tensor:
    """The images (N, 1, H, W) with the measured lines in place of their own."""
    own = torch.fft.fft2(images, norm="ortho")
    return torch.fft.ifft2(torch.where(measured.lines, measured.values, own), norm="ortho").real


def zero_filled(measured: Measurement) -> torch.Tensor:
    """The images (N, 1, H, W) whose missing lines are zero."""
    return torch.fft.ifft2(measured.values, norm="ortho").real


@torch.no_grad()
def reconstruct(
    model: nn.Module, measured: Measurement, flair: torch.Tensor, steps: int, generator: torch.Generator
) -> torch.Tensor:
    """Images (N, 1, H, W), 0 to 1, that agree with the measurement, from ``steps`` of less and less noise.

    Args:
        model: a :class:`ScoreNetwork`, on the CPU.
        flair: float (N, 1, H, W); zeros for a network that has learned without.
    """
    levels = torch.logspace(*torch.tensor([HIGHEST / 2, LOWEST]).log10().tolist(), steps).tolist()
    images = zero_filled(measured)
    images = images + levels[0] * torch.randn(images.shape, generator=generator)
    for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
        denoised = model(images, torch.full((len(images), 1, 1, 1), level), flair)
        images = replace_measured(denoised, measured)
        images = images + following * torch.randn(images.shape, generator=generator)
    return images


def least_variation(measured: Measurement, steps: int = 200, learning_rate: float = 0.01) -> torch.Tensor:
    """Images (N, 1, H, W) of the least total variation that agree with the measurement, not clipped.

    Rudin, Osher and Fatemi, Physica D 1992; minimised by Adam, with the measured lines replaced after each step.
    """
    images = zero_filled(measured).requires_grad_()
    optimiser = torch.optim.Adam([images], learning_rate)
    for _ in range(steps):
        squares = images.diff(dim=2)[..., :-1] ** 2 + images.diff(dim=3)[:, :, :-1] ** 2
        optimiser.zero_grad()
        (squares + 1e-5).sqrt().sum().backward()  # the root of 0 has no slope
        optimiser.step()
        images.data = replace_measured(images.data, measured)
    return images.detach()
