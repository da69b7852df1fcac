"""The stages of control on grey slices: two ControlNets and two plain U-Nets.

A ControlNet is trained for the frozen U-Net of the stage "gaussian_denoiser". Its condition is an image of another
contrast, or the label map of the fixed image, whose moving partner is drawn. The plain U-Nets need no diffusion: one
translates the contrast, too, and one finds the labels of a drawn partner, which a registration needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pairdiff_core.data.contrasts import draw_images
from pairdiff_core.images import controlnet, latent_diffusion
from pairdiff_core.pairs import PairSet, one_hot
from pairdiff_core.pipeline.image_stages import SHARD, t1_images
from pairdiff_core.pipeline.models import Trained
from pairdiff_core.pipeline.run import Run
from pairdiff_core.pipeline.stages import Training, load_or_train, load_pretrained
from pairdiff_core.storage import fingerprint
from pairdiff_core.training import Samples, best_device

AT_ONCE = 32  # images that are sampled or segmented together


class Controlled(NamedTuple):
    """Latents for one training step of a ControlNet."""

    latents: torch.Tensor  # these three as in latent_diffusion.Batch
    noise: torch.Tensor
    timesteps: torch.Tensor
    condition: torch.Tensor  # float (N, C, *spatial)


def train_controlnet(run: Run, latents: torch.Tensor, denoiser: Trained, stage: str) -> Trained:
    """A ControlNet for the frozen U-Net of the stage "gaussian_denoiser", whose encoder it starts from.

    Args:
        latents: of training images, from :func:`encode_training_images`.
        stage: "controlnet_flair", conditioned on a FLAIR-like image of the same slice, or "controlnet_fixed", on the
            label map of the other image of the pair.
    """
    unet = denoiser.model.requires_grad_(False)
    if pretrained := load_pretrained(run, stage):
        return pretrained
    settings, timesteps = getattr(run.profile, stage), run.profile.gaussian_denoiser.timesteps
    images, num_labels = t1_images(run, run.train), run.profile.num_labels
    samples = Samples(len(latents), settings.batch, run.seed_of(stage))

    @cache  # a finished stage needs no labels
    def labels() -> torch.Tensor:
        of_shard = images.labels(SHARD // 2, "latents")  # the latents were encoded in these shards
        return torch.cat([of_shard(shard) for shard in range(-(-len(latents) // SHARD))])

    def batch(step: int) -> Controlled:
        chosen, generators = samples.chosen(step), samples.generators(step, "noise")
        if stage == "controlnet_flair":
            condition = draw_images(labels()[chosen], "FLAIR", num_labels, samples.generators(step, "condition"))
        else:
            condition = one_hot(labels()[chosen ^ 1], num_labels)  # the partner of image 2n is 2n + 1, and vice versa
        return Controlled(*latent_diffusion.training_batch(latents[chosen], timesteps, generators), condition)

    def loss(model: nn.Module, drawn: Controlled) -> dict[str, torch.Tensor]:
        steered = controlnet.controlled(unet, model, drawn.condition)
        return latent_diffusion.velocity_loss(steered, latent_diffusion.Batch(*drawn[:3]), timesteps)

    inputs = images.inputs() | {"latents": fingerprint(latents), "denoiser": denoiser.fingerprint}
    start = partial(controlnet.copy_encoder, unet=unet)
    return load_or_train(run, Training(stage, inputs, loss, batch, start))


def train_translator(run: Run) -> Trained:
    """A plain U-Net from FLAIR-like to T1 images of the same slice, which minimises the absolute error."""
    if pretrained := load_pretrained(run, "translator"):
        return pretrained
    settings, images = run.profile.translator, t1_images(run, run.train)
    samples = Samples(len(run.train), 2 * settings.batch, run.seed_of("translator"))
    t1, labels = (kind(settings.batch, "translator") for kind in (images.batches, images.labels))

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generators = samples.generators(step, "condition")
        return draw_images(labels(step), "FLAIR", run.profile.num_labels, generators), t1(step)

    def loss(model: nn.Module, drawn: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        flair, wanted = drawn
        return {"loss": F.l1_loss(model(flair), wanted)}

    return load_or_train(run, Training("translator", images.inputs(), loss, batch))


def train_segmenter(run: Run, autoencoder: Trained) -> Trained:
    """A plain U-Net from T1 images to labels, trained on images whose labels are known.

    They have passed through the autoencoder, as those have in which labels are to be found. If they are drawn from
    their labels, no measured image is needed (Billot et al., Medical Image Analysis 2023).
    """
    if pretrained := load_pretrained(run, "segmenter"):
        return pretrained
    from monai.losses import DiceCELoss  # here, because importing it takes seconds

    settings, images, coder = run.profile.segmenter, t1_images(run, run.train), autoencoder.model
    t1, labels = (kind(settings.batch, "segmenter") for kind in (images.batches, images.labels))
    dice_and_entropy = DiceCELoss(softmax=True, to_onehot_y=True)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return coder.decode(coder.encode(t1(step))), labels(step)

    def loss(model: nn.Module, drawn: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen, wanted = drawn
        return {"loss": dice_and_entropy(model(seen), wanted[:, None])}

    inputs = images.inputs() | {"autoencoder": autoencoder.fingerprint}
    return load_or_train(run, Training("segmenter", inputs, loss, batch))


@torch.no_grad()
def _in_parts(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The output of a network for any number of images, on the CPU."""
    return torch.cat([model(part.to(best_device())).cpu() for part in images.split(AT_ONCE)])


def translate(translator: Trained, images: torch.Tensor) -> torch.Tensor:
    """T1 images float (N, 1, *spatial), 0 to 1, of FLAIR-like ones of that shape."""
    return _in_parts(lambda part: translator.model(part).clamp(0, 1), images)


def segment(segmenter: Trained, images: torch.Tensor) -> torch.Tensor:
    """Label maps uint8 (N, *spatial) of T1 images float (N, 1, *spatial)."""
    return _in_parts(lambda part: segmenter.model(part).argmax(1).to(torch.uint8), images)


def sample_controlled(
    run: Run, models: Mapping[str, Trained], stage: str, conditions: torch.Tensor, purpose: str, scale: float = 1.0
) -> torch.Tensor:
    """Latents float (N, L, *grid) under the control of N conditions float (N, C, *spatial), by DDIM.

    Args:
        models: by stage: "kl_autoencoder", "gaussian_denoiser" and the ControlNet.
        stage: "controlnet_flair" or "controlnet_fixed".
        purpose: of the noise that they start from: the same gives the same latents.
        scale: see :func:`controlnet.controlled`.
    """
    unet, control, device = models["gaussian_denoiser"].model, models[stage].model, best_device()
    timesteps, steps = run.profile.gaussian_denoiser.timesteps, getattr(run.profile, stage).sampling_steps
    scheduler = latent_diffusion.new_scheduler("ddim", timesteps, steps)
    grid = models["kl_autoencoder"].model.latent_grid(run.profile.spatial)
    generator, latents = run.generator(purpose, device), []
    for part in conditions.split(AT_ONCE):
        steered = controlnet.controlled(unet, control, part.to(device), scale)
        shape = (len(part), run.profile.kl_autoencoder.latent_channels, *grid)
        latents.append(latent_diffusion.sample(steered, shape, scheduler, generator).cpu())
    return torch.cat(latents)


def draw_partners(
    run: Run, models: Mapping[str, Trained], pairs: PairSet, scale: float = 1.0
) -> tuple[PairSet, torch.Tensor]:
    """New moving partners for the fixed images of some pairs, as :func:`decode_partners` returns them.

    Args:
        models: by stage: "kl_autoencoder", "gaussian_denoiser", "controlnet_fixed" and "segmenter".
        scale: of the control; 0 draws without it.
    """
    conditions = one_hot(pairs.fixed, pairs.num_labels)
    latents = sample_controlled(run, models, "controlnet_fixed", conditions, "partners", scale)
    return decode_partners(models, pairs, latents)


def decode_partners(
    models: Mapping[str, Trained], pairs: PairSet, latents: torch.Tensor
) -> tuple[PairSet, torch.Tensor]:
    """Partners of the fixed images of N pairs, from their latents float (N, L, *grid).

    Returns:
        The pairs with the labels of the partners as moving images, and the partners themselves, float (N, 1, *spatial).
    """
    images = models["kl_autoencoder"].model.decode(latents)
    labels = torch.stack([pairs.fixed, segment(models["segmenter"], images)], 1)  # (N, 2, *spatial)
    names = tuple(f"{name.split('~')[0]}~partner_{number:04d}" for number, name in enumerate(pairs.names))
    return replace(pairs, labels=labels, names=names, displacement=None, landmarks=None), images
