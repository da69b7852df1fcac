"""All stages of grey slices in their order."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pairdiff_core.pipeline.control_stages import train_controlnet, train_segmenter, train_translator
from pairdiff_core.pipeline.image_stages import (
    encode_training_images,
    train_kl_autoencoder,
    train_latent_denoiser,
    train_student,
)
from pairdiff_core.pipeline.modality_stages import train_encoders, train_score_network
from pairdiff_core.pipeline.models import Trained, new_kl_autoencoder
from pairdiff_core.pipeline.run import Run
from pairdiff_core.profiles import IMAGE_STAGES


class ImageStageResults(NamedTuple):
    """Results of the stages of images."""

    models: dict[str, Trained]  # by stage
    latents: torch.Tensor | None  # of training images; None if not requested


def run_image_stages(run: Run, last: str = IMAGE_STAGES[-1]) -> ImageStageResults:
    """Run, or load, the stages of images in their order, up to the ``last`` of ``IMAGE_STAGES``.

    Raises:
        CheckpointError, Paused: as :func:`load_or_train`.
        DataError: for volumes.
    """
    new_kl_autoencoder(run.profile)  # a profile without it is refused before a folder is made
    models, latents = {}, None
    for stage in IMAGE_STAGES[: IMAGE_STAGES.index(last) + 1]:
        if stage == "kl_autoencoder":
            models[stage] = train_kl_autoencoder(run)
        elif stage == "latents":
            latents = encode_training_images(run, models["kl_autoencoder"])
        elif stage in ("gaussian_denoiser", "rectified_flow"):
            models[stage] = train_latent_denoiser(run, latents, stage)
        elif stage in ("controlnet_flair", "controlnet_fixed"):
            models[stage] = train_controlnet(run, latents, models["gaussian_denoiser"], stage)
        elif stage == "translator":
            models[stage] = train_translator(run)
        elif stage == "segmenter":
            models[stage] = train_segmenter(run, models["kl_autoencoder"])
        elif stage == "student":
            models[stage] = train_student(run, latents, models["gaussian_denoiser"])
        elif stage == "encoders":
            models[stage] = train_encoders(run)
        else:
            models[stage] = train_score_network(run)
    return ImageStageResults(models, latents)
