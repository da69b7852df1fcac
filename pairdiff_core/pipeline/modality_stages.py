"""The stages of several modalities of grey slices: two encoders that agree, and a score network.

FLAIR-like images are drawn from label maps. T1 images are the measured ones if the data set has them, else drawn, too.
"""

from __future__ import annotations

from functools import cache

import torch

from pairdiff_core.data.contrasts import draw_images
from pairdiff_core.images import modalities, reconstruction
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline.image_stages import t1_images
from pairdiff_core.pipeline.models import Trained
from pairdiff_core.pipeline.run import Run
from pairdiff_core.pipeline.stages import Training, load_or_train, load_pretrained
from pairdiff_core.training import Samples


def both_contrasts(run: Run, pairs: PairSet, number: int, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
    """T1 and FLAIR images of the same ``number`` slices, float (number, 1, *spatial), 0 to 1.

    Args:
        pairs: the training or the validation pairs of the run.
        purpose: the same one gives the same images.
    """
    images, half = t1_images(run, pairs), -(-number // 2)
    labels = images.labels(half, purpose)(0)[:number]
    generators = [run.generator(f"{purpose} FLAIR {index}") for index in range(number)]
    return images.some(number, purpose), draw_images(labels, "FLAIR", run.profile.num_labels, generators)


def train_encoders(run: Run, pairs: int | None = None, *, invariant: bool = False) -> Trained:
    """Encoders of T1 and FLAIR images whose embeddings agree.

    Args:
        pairs: how many images have a partner; None for all that the profile has.
        invariant: whether the loss has its second term, for which all images are used, with or without a partner.

    Raises:
        ValueError: for more pairs than the profile has.
    """
    settings = run.profile.encoders
    if pairs and pairs > settings.pairs:
        raise ValueError(f"the profile has {settings.pairs} images with a partner, not {pairs}")
    chosen = [f"-{pairs}" if pairs else "", "-invariant" if invariant else ""]
    if pretrained := load_pretrained(run, name := "encoders" + "".join(chosen)):
        return pretrained
    images = t1_images(run, run.train)

    @cache  # a finished stage needs no images
    def drawn() -> tuple[torch.Tensor, torch.Tensor]:
        return both_contrasts(run, run.train, settings.pairs, "encoders")

    paired = Samples(pairs or settings.pairs, settings.batch, run.seed_of("encoders"))
    single = Samples(settings.pairs, settings.batch, run.seed_of("encoders"))

    def views(samples: Samples, step: int, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = samples.chosen(step)
        t1, flair = (
            modalities.augmented_views(each[chosen], samples.generators(step, f"{purpose} {contrast}"))
            for contrast, each in zip(("T1", "FLAIR"), drawn(), strict=True)
        )
        return t1, flair

    def batch(step: int) -> modalities.Batch:
        t1, flair = views(paired, step, "pair")
        if not invariant:
            return modalities.Batch(t1, flair)
        (first, other), (again, other_again) = (views(single, step, purpose) for purpose in ("view", "again"))
        return modalities.Batch(t1, flair, (first, again, other, other_again))

    inputs = images.inputs() | {"pairs": pairs or settings.pairs, "invariant": invariant}
    return load_or_train(run, Training(name, inputs, modalities.alignment_loss, batch))


def train_score_network(run: Run, *, beside_flair: bool = True) -> Trained:
    """A denoiser of T1 images for all levels of noise, given the FLAIR image of the slice or zeros instead of it."""
    name = "score_network" if beside_flair else "score_network-alone"
    if pretrained := load_pretrained(run, name):
        return pretrained
    settings, images = run.profile.score_network, t1_images(run, run.train)
    samples = Samples(len(run.train), 2 * settings.batch, run.seed_of("score_network"))
    t1, labels = (kind(settings.batch, "score_network") for kind in (images.batches, images.labels))
    ratio = reconstruction.HIGHEST / reconstruction.LOWEST

    def batch(step: int) -> reconstruction.Batch:
        clean, generators = t1(step), samples.generators(step, "noise")
        shares = torch.cat([torch.rand((1, 1, 1, 1), generator=each) for each in generators])
        noise = torch.cat([torch.randn((1, *clean.shape[1:]), generator=each) for each in generators])
        flair = torch.zeros_like(clean)
        if beside_flair:
            seeds = samples.generators(step, "condition")
            flair = draw_images(labels(step), "FLAIR", run.profile.num_labels, seeds)
        return reconstruction.Batch(clean, noise, reconstruction.LOWEST * ratio**shares, flair)

    inputs = images.inputs() | {"beside_flair": beside_flair}
    return load_or_train(run, Training(name, inputs, reconstruction.denoising_loss, batch))
