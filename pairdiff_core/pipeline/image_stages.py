"""The stages of diffusion on grey slices: autoencoder, latents, two denoisers of latents, and a student of one.

They load or make their results as the five stages of the method do, in the same run folder. Images are the measured T1
slices if the data set has them, else T1-like ones that are drawn from freshly warped label maps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pairdiff_core.augmentation import WarpedPairs
from pairdiff_core.data.contrasts import draw_images, each_slice_once, measured_t1
from pairdiff_core.images import distillation, latent_diffusion
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline.models import Trained, new_kl_autoencoder
from pairdiff_core.pipeline.run import Run
from pairdiff_core.pipeline.stages import Training, load_or_make, load_or_train, load_pretrained
from pairdiff_core.storage import fingerprint
from pairdiff_core.training import Samples, best_device

SHARD = 64  # images that are encoded together
STAGE_OF = {"ddpm": "gaussian_denoiser", "ddim": "gaussian_denoiser", "rflow": "rectified_flow"}  # by sampler


@dataclass(frozen=True, eq=False)
class T1Images:
    """T1 images of some pairs of slices, measured or drawn.

    Attributes:
        run: gives labels and warps.
        pairs: whose images are used.
        measured: float (S, 1, *spatial), 0 to 1; None: images are drawn from the pairs' label maps.
    """

    run: Run
    pairs: PairSet
    measured: torch.Tensor | None

    def inputs(self) -> dict[str, Any]:
        """What they depend on, for a checkpoint."""
        used = {"pairs": self.pairs.labels} | ({} if self.measured is None else {"images": self.measured})
        return {name: fingerprint(tensor) for name, tensor in used.items()}

    def batches(self, pairs: int, purpose: str) -> Callable[[int], torch.Tensor]:
        """From the number of a step to float (2 * ``pairs``, 1, *spatial), 0 to 1, which depend on it and a purpose.

        Images 2n and 2n + 1 are those of a pair.
        """
        samples, labels = Samples(len(self.pairs), pairs, self.run.seed_of(purpose)), self.labels(pairs, purpose)
        if self.measured is not None:
            once = each_slice_once(self.pairs)[1]
            numbers = torch.tensor([[once.index(image) for image in pair.split("~")] for pair in self.pairs.names])
            return lambda step: self.measured[numbers[samples.chosen(step)].flatten()]  # (pairs, 2) -> (2 pairs,)

        def drawn(step: int) -> torch.Tensor:
            generators = [each for each in samples.generators(step, "image") for _ in range(2)]
            return draw_images(labels(step), "T1", self.pairs.num_labels, generators)

        return drawn

    def labels(self, pairs: int, purpose: str) -> Callable[[int], torch.Tensor]:
        """The label maps uint8 (2 * ``pairs``, *spatial) of the images of :meth:`batches`."""
        samples = Samples(len(self.pairs), pairs, self.run.seed_of(purpose))
        augmentation = self.run.profile.vqae.augmentation if self.measured is None else None
        warped = WarpedPairs(self.pairs.labels, samples, augmentation)
        return lambda step: warped(step).flatten(0, 1)  # (pairs, 2, *s) -> (2 pairs, *s)

    def some(self, number: int, purpose: str) -> torch.Tensor:
        """``number`` images, float (number, 1, *spatial), the same for the same purpose."""
        return self.batches(-(-number // 2), purpose)(0)[:number]


def t1_images(run: Run, pairs: PairSet) -> T1Images:
    """The T1 images of the training or the validation pairs of a run.

    Raises:
        DataError: if data are missing or a file is unsuitable.
    """
    return T1Images(run, pairs, measured_t1(pairs, run.dataset, run.data))


def train_kl_autoencoder(run: Run, *, kl: bool = True, adversarial: bool = False) -> Trained:
    """The autoencoder of T1 images; its history holds the parts of the loss.

    Args:
        kl: whether the loss has its second part.
        adversarial: whether a discriminator adds a third one. Each choice has a result of its own in the run folder.
    """
    name = "kl_autoencoder" + ("" if kl else "-l1") + ("-adversarial" if adversarial else "")
    if pretrained := load_pretrained(run, name):
        return pretrained
    settings, images = run.profile.kl_autoencoder, t1_images(run, run.train)
    loss = latent_diffusion.adversarial_loss if adversarial else latent_diffusion.autoencoder_loss
    loss = partial(loss, kl_weight=settings.kl_weight if kl else 0.0)
    opponent = partial(latent_diffusion.new_discriminator, run.profile.spatial_dims) if adversarial else None
    batches = images.batches(settings.batch, "kl_autoencoder")
    return load_or_train(run, Training(name, images.inputs(), loss, batches, opponent=opponent))


def encode_training_images(run: Run, autoencoder: Trained) -> torch.Tensor:
    """Latents float (N, C, *grid) of training images, on which the diffusion learns."""
    images, number = t1_images(run, run.train), run.profile.kl_autoencoder.latents
    batches = images.batches(SHARD // 2, "latents")

    def encode(shard: int) -> torch.Tensor:
        return autoencoder.model.encode(batches(shard)[: number - shard * SHARD])

    inputs = images.inputs() | {"autoencoder": autoencoder.fingerprint, "latents": number}
    return load_or_make(run, "latents", inputs, encode, -(-number // SHARD))


def train_latent_denoiser(run: Run, latents: torch.Tensor, stage: str) -> Trained:
    """A U-Net on latents (N, C, *grid).

    Args:
        stage: "gaussian_denoiser", which predicts velocities, or "rectified_flow", which predicts directions.
    """
    if pretrained := load_pretrained(run, stage):
        return pretrained
    settings = getattr(run.profile, stage)
    samples = Samples(len(latents), settings.batch, run.seed_of(stage))
    loss = {"gaussian_denoiser": latent_diffusion.velocity_loss, "rectified_flow": latent_diffusion.flow_loss}[stage]

    def batch(step: int) -> latent_diffusion.Batch:
        generators = samples.generators(step, "noise")
        return latent_diffusion.training_batch(latents[samples.chosen(step)], settings.timesteps, generators)

    loss = partial(loss, timesteps=settings.timesteps)
    return load_or_train(run, Training(stage, {"latents": fingerprint(latents)}, loss, batch))


def train_student(run: Run, latents: torch.Tensor, denoiser: Trained) -> Trained:
    """A U-Net that draws a latent in one step, learned from the U-Net of the stage "gaussian_denoiser".

    Args:
        latents: of training images, from :func:`encode_training_images`.
    """
    if pretrained := load_pretrained(run, "student"):
        return pretrained
    settings, timesteps = run.profile.student, run.profile.gaussian_denoiser.timesteps
    teacher = denoiser.model.requires_grad_(False)
    samples = Samples(len(latents), settings.batch, run.seed_of("student"))

    def batch(step: int) -> distillation.Batch:
        return distillation.training_batch(latents[samples.chosen(step)], timesteps, samples.generators(step, "noise"))

    def start(student: nn.Module) -> None:
        student.load_state_dict(teacher.state_dict())

    loss = partial(distillation.matching_loss, teacher=teacher, timesteps=timesteps, divergence=settings.divergence)
    opponent = partial(distillation.Critics, teacher, latents.shape[1:])
    inputs = {"latents": fingerprint(latents), "denoiser": denoiser.fingerprint}
    return load_or_train(run, Training("student", inputs, loss, batch, start, opponent))


def sample_latents(run: Run, denoiser: Trained, sampler: str, number: int) -> torch.Tensor:
    """Latents float (number, C, *grid) of new images; no data are needed.

    Args:
        sampler: "ddpm", which takes all timesteps of the training, "ddim" or "rflow".
    """
    settings, device = getattr(run.profile, STAGE_OF[sampler]), best_device()
    grid = new_kl_autoencoder(run.profile).latent_grid(run.profile.spatial)
    steps = None if sampler == "ddpm" else settings.sampling_steps
    scheduler = latent_diffusion.new_scheduler(sampler, settings.timesteps, steps)
    shape = (number, run.profile.kl_autoencoder.latent_channels, *grid)
    return latent_diffusion.sample(denoiser.model, shape, scheduler, run.generator(sampler, device)).cpu()
