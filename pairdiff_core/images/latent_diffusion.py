"""Diffusion with Gaussian noise on the latents of single grey images: MONAI's parts, put together.

An autoencoder maps an image to a small grid of numbers, the latent (Kingma and Welling, ICLR 2014; Rombach et al.,
CVPR 2022). A U-Net learns to remove Gaussian noise from latents, as the noise of a Markov chain (Ho et al., "Denoising
Diffusion Probabilistic Models", NeurIPS 2020), sampled in all its steps or in few (Song et al., "Denoising Diffusion
Implicit Models", ICLR 2021), or along straight lines (Liu et al., "Flow Straight and Fast", ICLR 2023).
Networks and schedulers are MONAI's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pairdiff_core.profiles import GROUPS, DiffusionSettings, KLAutoencoderSettings

if TYPE_CHECKING:
    from monai.networks.nets import DiffusionModelUNet, PatchDiscriminator
    from monai.networks.schedulers.scheduler import Scheduler

SAMPLERS = ("ddpm", "ddim", "rflow")
IMAGES_AT_ONCE = 32  # encoded or decoded together, which limits the memory
ADVERSARIAL_WEIGHT = 0.01  # as in MONAI's tutorial on latent diffusion
MOMENTUM = 0.02  # share of a batch in the running mean and variance of the latents


class Coded(NamedTuple):
    """Output of :class:`KLAutoencoder`."""

    images: torch.Tensor  # float (N, 1, *spatial), the reconstruction
    mean: torch.Tensor  # float (N, C, *grid), of each latent's Gaussian
    deviation: torch.Tensor  # float (N, C, *grid), its standard deviation


class KLAutoencoder(nn.Module):
    """MONAI's ``AutoencoderKL`` without attention, which also standardises its latents.

    In latents from :meth:`encode`, each channel has about mean 0 and variance 1, as the noise that diffusion adds.
    Rombach et al. 2022 scale all channels by one factor. Mean and variance are running ones of the training batches and
    stored with the weights.

    Args:
        settings: channels of the levels, each of which but the first halves the grid; channels of the latent.
        spatial_dims: 2 or 3.
    """

    def __init__(self, settings: KLAutoencoderSettings, spatial_dims: int) -> None:
        super().__init__()
        from monai.networks.nets import AutoencoderKL  # here, because importing it takes seconds

        levels = len(settings.channels)
        self.reduction = 2 ** (levels - 1)  # voxels per latent position along each axis
        self.network = AutoencoderKL(
            spatial_dims, 1, 1, (1,) * levels, settings.channels, (False,) * levels, settings.latent_channels, GROUPS,
            with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
        )  # fmt: skip
        self.statistics = nn.BatchNorm1d(settings.latent_channels, affine=False, momentum=MOMENTUM)

    def forward(self, images: torch.Tensor) -> Coded:
        """Reconstruct images float (N, 1, *spatial) from draws of their latents; training also updates the statistics.

        Raises:
            ValueError: as :meth:`latent_grid`.
        """
        self.latent_grid(images.shape[2:])
        mean, deviation = self.network.encode(images)
        latents = self.network.sampling(mean, deviation)
        if self.training:
            self.statistics(latents.detach().flatten(2))  # (N, C, *grid) -> (N, C, positions)
        return Coded(self.network.decode(latents), mean, deviation)

    def latent_grid(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The size of the latents of images of this size.

        Raises:
            ValueError: if a side is not a multiple of the reduction: MONAI would return a smaller image.
        """
        if any(size % self.reduction for size in spatial):
            raise ValueError(f"the sides of the grid must be multiples of {self.reduction}, got {tuple(spatial)}")
        return tuple(size // self.reduction for size in spatial)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents float (N, C, *grid), the means, of any number of images float (N, 1, *spatial), on the CPU."""
        self.latent_grid(images.shape[2:])
        parts = (part.to(self.statistics.running_mean.device) for part in images.split(IMAGES_AT_ONCE))
        means = torch.cat([self.network.encode(part)[0] for part in parts])
        mean, deviation = self._mean_and_deviation(means.dim() - 2)
        return ((means - mean) / deviation).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images float (N, 1, *spatial), 0 to 1, of any number of latents float (N, C, *grid), on the CPU."""
        mean, deviation = self._mean_and_deviation(latents.dim() - 2)
        parts = (part.to(mean.device) * deviation + mean for part in latents.split(IMAGES_AT_ONCE))
        return torch.cat([self.network.decode(part).clamp(0, 1).cpu() for part in parts])

    def _mean_and_deviation(self, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each channel of the latents, (C, 1, ..., 1) with ``dims`` ones."""
        running = (self.statistics.running_mean, (self.statistics.running_var + self.statistics.eps).sqrt())
        mean, deviation = (each.reshape(-1, *[1] * dims) for each in running)  # (C,) -> (C, 1, ..., 1)
        return mean, deviation


def autoencoder_loss(model: nn.Module, images: torch.Tensor, kl_weight: float) -> dict[str, torch.Tensor]:
    """What a training step of the autoencoder minimises and logs, scalars: ``loss``, ``l1``, ``kl``.

    ``l1`` is the mean absolute error of the reconstruction. ``kl`` is the Kullback-Leibler divergence of the latents'
    Gaussians from the standard normal distribution, in nats per number of the latent (Kingma and Welling 2014, app. B).

    Args:
        model: a :class:`KLAutoencoder`, or a wrapper of one.
        images: float (N, 1, *spatial), 0 to 1.
    """
    return _reconstruction_terms(model(images), images, kl_weight)


def _reconstruction_terms(output: Coded, images: torch.Tensor, kl_weight: float) -> dict[str, torch.Tensor]:
    l1 = F.l1_loss(output.images, images)
    variance = output.deviation.square()
    kl = (output.mean.square() + variance - variance.log() - 1).mean() / 2
    return {"loss": l1 + kl_weight * kl, "l1": l1, "kl": kl}


def new_discriminator(spatial_dims: int) -> PatchDiscriminator:
    """MONAI's ``PatchDiscriminator`` of grey images; each of its outputs judges a patch."""
    from monai.networks.nets import PatchDiscriminator  # here, because importing it takes seconds

    return PatchDiscriminator(spatial_dims, channels=16, in_channels=1, num_layers_d=2, norm="INSTANCE")


def adversarial_loss(
    model: nn.Module, discriminator: nn.Module, images: torch.Tensor, kl_weight: float
) -> dict[str, torch.Tensor]:
    """:func:`autoencoder_loss` and the adversarial term of both networks, neither of which changes the other.

    The discriminator learns to give 1 to images and 0 to reconstructions, and the autoencoder to be given 1, by least
    squares (MONAI's ``PatchAdversarialLoss``), with a small weight (Esser et al., CVPR 2021; Rombach et al. 2022).

    Returns:
        ``loss``, the sum; ``l1``, ``kl``, ``adversarial``, and ``discriminator``, its loss.
    """
    from monai.losses import PatchAdversarialLoss  # here, because importing it takes seconds

    output, judge = model(images), PatchAdversarialLoss(criterion="least_squares")
    terms = _reconstruction_terms(output, images, kl_weight)
    fixed = {name: weights.detach() for name, weights in discriminator.named_parameters()}
    seen = torch.func.functional_call(discriminator, fixed, output.images)
    terms["adversarial"] = judge(seen[-1], target_is_real=True, for_discriminator=False)
    pairs = ((images, True), (output.images.detach(), False))
    judged = [judge(discriminator(each)[-1], target_is_real=real, for_discriminator=True) for each, real in pairs]
    terms["discriminator"] = sum(judged) / 2
    terms["loss"] = terms["loss"] + ADVERSARIAL_WEIGHT * terms["adversarial"] + terms["discriminator"]
    return terms


def new_unet(settings: DiffusionSettings, latent_channels: int, spatial_dims: int) -> DiffusionModelUNet:
    """MONAI's ``DiffusionModelUNet`` for latents, with attention at its coarsest level only, where it always has it."""
    from monai.networks.nets import DiffusionModelUNet  # here, because importing it takes seconds

    levels = len(settings.channels)
    return DiffusionModelUNet(
        spatial_dims, latent_channels, latent_channels, (1,) * levels, settings.channels, (False,) * levels, GROUPS,
        num_head_channels=settings.channels[-1],
    )  # fmt: skip


def new_scheduler(sampler: str, timesteps: int, steps: int | None = None) -> Scheduler:
    """MONAI's scheduler of one of SAMPLERS, set to a number of sampling steps.

    DDPM's betas rise linearly from 0.1 / T to 20 / T: for T = 1000 those of Ho et al. 2020, and for a smaller T large
    enough to leave only noise. The network predicts the velocity (:func:`velocity_loss`): at the last timesteps, an
    error in a predicted noise would be amplified more than a hundredfold. Latents are not clipped to -1 to 1, as MONAI
    would by default.

    Args:
        timesteps: T, of training, more than 20.
        steps: of sampling; None for T. DDPM takes T, because MONAI's step always goes from t to t - 1. DDIM takes a
            divisor of T: otherwise, MONAI's timesteps and steps differ, and noise is left at the end.

    Raises:
        ValueError: for an unknown sampler, or a number of steps that it cannot take.
    """
    from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler

    steps = timesteps if steps is None else steps
    if sampler not in SAMPLERS:
        raise ValueError(f"the samplers are {', '.join(SAMPLERS)}, not {sampler!r}")
    if timesteps <= 20:
        raise ValueError(f"{timesteps} timesteps are too few for this schedule, which needs more than 20")
    fits = {"ddpm": steps == timesteps, "ddim": steps > 0 and timesteps % steps == 0, "rflow": 0 < steps <= timesteps}
    if not fits[sampler]:
        raise ValueError(f"{sampler} cannot take {steps} steps of {timesteps}")
    chain = {"beta_start": 0.1 / timesteps, "beta_end": 20 / timesteps}
    chain |= {"clip_sample": False, "prediction_type": "v_prediction"}
    if sampler == "ddpm":
        scheduler = DDPMScheduler(timesteps, **chain)
    elif sampler == "ddim":
        # with this offset, the timesteps are as far apart as MONAI's step assumes
        scheduler = DDIMScheduler(timesteps, steps_offset=timesteps // steps - 1, **chain)
    else:
        scheduler = RFlowScheduler(timesteps)
    scheduler.set_timesteps(steps)
    return scheduler


class Batch(NamedTuple):
    """Latents for one training step."""

    latents: torch.Tensor  # float (N, C, *grid), without noise
    noise: torch.Tensor  # float (N, C, *grid), standard normal
    timesteps: torch.Tensor  # int64 (N,), 0 to T - 1


def training_batch(latents: torch.Tensor, timesteps: int, generators: Sequence[torch.Generator]) -> Batch:
    """Noise and a uniformly drawn timestep for each latent (N, C, *grid), each from its own generator.

    Args:
        timesteps: T.
    """
    noise = torch.stack([torch.randn(latents.shape[1:], generator=each) for each in generators])
    drawn = torch.cat([torch.randint(timesteps, (1,), generator=each) for each in generators])
    return Batch(latents, noise, drawn)


def velocity_loss(model: nn.Module, batch: Batch, timesteps: int) -> dict[str, torch.Tensor]:
    """The mean squared error of the velocity, sqrt(a) noise - sqrt(1 - a) latent, where a is the share of the latent.

    The latent with noise is sqrt(a) latent + sqrt(1 - a) noise, so noise and latent follow from it and the velocity
    (Salimans and Ho, "Progressive Distillation", ICLR 2022, section 4).
    """
    scheduler = new_scheduler("ddpm", timesteps)
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    velocity = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    return {"loss": F.mse_loss(model(noisy, batch.timesteps), velocity)}


def flow_loss(model: nn.Module, batch: Batch, timesteps: int) -> dict[str, torch.Tensor]:
    """The loss of rectified flow (Liu et al. 2023, eq. 1): the mean squared error of the direction, latent minus noise.

    Timestep t of :class:`Batch` stands for the time (t + 1) / T: sampling starts at 1, where there is only noise.
    """
    times = batch.timesteps + 1
    noisy = new_scheduler("rflow", timesteps).add_noise(batch.latents, batch.noise, times)
    return {"loss": F.mse_loss(model(noisy, times), batch.latents - batch.noise)}


@torch.no_grad()
def denoise(
    model: nn.Module, noise: torch.Tensor, scheduler: Scheduler, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Turn noise (N, C, *grid) into latents, one step of a :func:`new_scheduler` at a time; yields each step's latents.

    Args:
        model: predicts the velocity for DDPM and DDIM, and the direction for rectified flow.
        generator: of the noise that DDPM adds in each step; the other two add none.
    """
    from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

    times = scheduler.timesteps.tolist()
    for time, following in zip(times, [*times[1:], 0], strict=True):
        predicted = model(noise, torch.full((len(noise),), time, device=noise.device))
        extra = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
        if isinstance(scheduler, RFlowScheduler):
            extra = {"next_timestep": following}
        noise, _ = scheduler.step(predicted, time, noise, **extra)
        yield noise


def sample(model: nn.Module, shape: Sequence[int], scheduler: Scheduler, generator: torch.Generator) -> torch.Tensor:
    """New latents float (N, C, *grid) of a ``shape``, denoised from noise by :func:`denoise`."""
    noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
    *_, latents = denoise(model, noise, scheduler, generator)
    return latents
