"""Two encoders whose embeddings of the same slice in two contrasts agree.

The contrastive loss is that of CLIP (Radford et al., "Learning Transferable Visual Models", ICML 2021), which MedM2G
uses to align modalities; its second term, the visual invariant, needs no pairs (Zhan et al., "MedM2G", CVPR 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pairdiff_core.profiles import EncodersSettings

TEMPERATURE = 0.1  # of the contrastive loss
GAIN_SD, BIAS_SD, NOISE_SD = 0.2, 0.2, 0.05  # of an augmented view: logarithm of brightness and bias field; noise
BIAS_NODES = 4  # along each axis


class Encoders(nn.Module):
    """One of MONAI's ``Regressor`` for T1-like images, and one for FLAIR-like ones.

    Args:
        spatial: size of the images, along each axis a multiple of 2 to the number of levels.
    """

    def __init__(self, settings: EncodersSettings, spatial: Sequence[int]) -> None:
        super().__init__()
        from monai.networks.nets import Regressor  # here, because importing it takes seconds

        def encoder() -> nn.Module:
            strides = (2,) * len(settings.channels)
            return Regressor((1, *spatial), (settings.embedding,), settings.channels, strides, num_res_units=0)

        self.t1, self.flair = encoder(), encoder()

    def forward(self, t1: torch.Tensor, flair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings float (N, E) of images float (N, 1, *spatial) of either contrast."""
        return self.t1(t1), self.flair(flair)


def similarities(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of each embedding of one set (N, E) and each of another (M, E), float (N, M), -1 to 1."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def info_nce(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The symmetric contrastive loss, in nats: each of N embeddings (N, E) has to find its partner among N.

    If all embeddings are equal, it is the logarithm of N. MONAI's ``ContrastiveLoss`` also compares embeddings of one
    modality with each other.
    """
    logits, partner = similarities(a, b) / TEMPERATURE, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner)) / 2


def share_found(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of 2N embeddings (N, E) each whose most similar one of the other set is their partner, 0 to 1."""
    found, partner = similarities(a, b), torch.arange(len(a), device=a.device)
    hits = [(each.argmax(1) == partner).double().mean() for each in (found, found.T)]
    return float(sum(hits)) / 2


def augmented_views(images: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """The images (N, 1, H, W) with another brightness, a smooth bias field and noise, each by its own generator."""

    def random(*shape: int) -> torch.Tensor:
        return torch.stack([torch.randn((1, *shape), generator=each) for each in generators])

    gain = GAIN_SD * random(1, 1)
    nodes = random(BIAS_NODES, BIAS_NODES)
    bias = BIAS_SD * F.interpolate(nodes, size=images.shape[2:], mode="bicubic", align_corners=False)
    return images * (gain + bias).exp() + NOISE_SD * random(*images.shape[2:])


class Batch(NamedTuple):
    """Images float (N, 1, *spatial) for one training step."""

    t1: torch.Tensor  # augmented views of slices, in both contrasts
    flair: torch.Tensor
    views: tuple[torch.Tensor, ...] = ()  # two views each of other T1 and FLAIR images, which need not be partners


def alignment_loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The contrastive loss and, if the batch has ``views``, the visual invariant of both encoders.

    The latter is the loss of Barlow Twins by MONAI (Zbontar et al., ICML 2021), divided by the length of an embedding:
    two views should give the same numbers, and no two numbers the same information.

    Returns:
        ``loss``, ``contrastive`` and, with views, ``invariant``.
    """
    contrastive = info_nce(*model(batch.t1, batch.flair))
    if not batch.views:
        return {"loss": contrastive, "contrastive": contrastive}
    from monai.losses import BarlowTwinsLoss  # here, because importing it takes seconds

    t1, t1_again, flair, flair_again = batch.views
    first, second = model(t1, flair), model(t1_again, flair_again)
    invariant = sum(BarlowTwinsLoss()(a, b) / a.shape[1] for a, b in zip(first, second, strict=True))
    return {"loss": contrastive + invariant, "contrastive": contrastive, "invariant": invariant}
