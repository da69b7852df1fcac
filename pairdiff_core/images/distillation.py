"""A student that draws a latent in one step, learned from a denoiser that needs many.

The student maps noise to a latent, and its latents should be distributed as those of the denoiser, the teacher. Every
f-divergence between both distributions has a gradient of the same form: the difference of their scores times a weight
that depends on the ratio of their densities (Xu et al., "One-step Diffusion Models with f-Divergence Distribution
Matching", 2025; for reverse KL, Yin et al., "One-step Diffusion with Distribution Matching Distillation", CVPR 2024).
Two critics estimate what is not known of the student: its score and that ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pairdiff_core.images import latent_diffusion

# The weight h(r) = r^2 f''(r) of each divergence (Xu et al. 2025), r the density of the data over that of the student.
WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reverse KL": torch.ones_like,
    "forward KL": lambda r: r,
    "Jensen-Shannon": lambda r: r / (1 + r),
}
RATIOS = (0.05, 20.0)  # an estimated ratio is clipped to this range


class Critics(nn.Module):
    """What is estimated of the student while it learns.

    Args:
        teacher: the denoiser that the student learns from.
        shape: (C, *grid) of a latent.
    """

    def __init__(self, teacher: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        from monai.networks.nets import Regressor  # here, because importing it takes seconds

        self.velocity = deepcopy(teacher).requires_grad_(True)  # of noisy latents of the student
        self.ratio = Regressor(shape, (1,), channels=(32, 64), strides=(2, 2), num_res_units=0)  # its logarithm


class Batch(NamedTuple):
    """What one training step draws."""

    data: latent_diffusion.Batch  # latents of training images, with noise and timesteps
    start: torch.Tensor  # float (N, C, *grid), standard normal, which the student turns into latents
    noise: torch.Tensor  # float (N, C, *grid), standard normal, that is added to them


def training_batch(latents: torch.Tensor, timesteps: int, generators: Sequence[torch.Generator]) -> Batch:
    """Noise and timesteps for latents (N, C, *grid) of training images, each from its own generator.

    Args:
        timesteps: T of the teacher.
    """
    data = latent_diffusion.training_batch(latents, timesteps, generators)
    more = torch.stack([torch.randn((2, *latents.shape[1:]), generator=each) for each in generators], 1)
    return Batch(data, more[0], more[1])


def one_step(student: nn.Module, noise: torch.Tensor, timesteps: int) -> torch.Tensor:
    """Latents float (N, C, *grid) from standard normal noise of that shape: one step of DDIM from the last timestep."""
    share = latent_diffusion.new_scheduler("ddpm", timesteps).alphas_cumprod[-1].to(noise)
    last = torch.full((len(noise),), timesteps - 1, device=noise.device)
    return share.sqrt() * noise - (1 - share).sqrt() * student(noise, last)


def matching_loss(
    student: nn.Module, critics: Critics, batch: Batch, *, teacher: nn.Module, timesteps: int, divergence: str
) -> dict[str, torch.Tensor]:
    """The losses of the student and of both critics; none of them changes the networks of another.

    Args:
        teacher: predicts velocities, and is not changed.
        divergence: one of ``WEIGHTS``.

    Returns:
        ``loss``, the sum; ``velocity`` and ``ratio``, of the critics; ``student``, whose gradient is that of the
        divergence, while its value says little.
    """
    data, t = batch.data, batch.data.timesteps
    scheduler = latent_diffusion.new_scheduler("ddpm", timesteps)
    y = one_step(student, batch.start, timesteps)
    made = y.detach()
    noisy = scheduler.add_noise(made, batch.noise, t)
    velocity, ratio = critics.velocity(noisy, t), critics.ratio(noisy)
    real = critics.ratio(scheduler.add_noise(data.latents, data.noise, t))
    losses = {
        "velocity": F.mse_loss(velocity, scheduler.get_velocity(made, batch.noise, t)),
        "ratio": F.softplus(-real).mean() + F.softplus(ratio).mean(),
    }
    weight = WEIGHTS[divergence](ratio.detach().exp().clamp(*RATIOS))
    weight = (weight / weight.mean()).reshape(-1, *[1] * (y.dim() - 1))  # (N, 1) -> (N, 1, ..., 1)
    share = scheduler.alphas_cumprod.to(t.device)[t].reshape(weight.shape)
    with torch.no_grad():  # the difference of the scores is, up to a factor, that of the estimated latents
        push = (1 - share).sqrt() * (velocity - teacher(noisy, t))
    losses["student"] = F.mse_loss(y, made + weight * push)
    return {"loss": sum(losses.values())} | losses
