"""Stage 1: the paired vector-quantised autoencoder.

Both images of a pair go through **one** encoder together, and one grid of integer tokens describes them both. The
decoder returns two sets of logits, one per image. Background: van den Oord et al., "Neural Discrete
Representation Learning", NeurIPS 2017; the paired form is Heinrich, "Unleashing Registration", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.nets import AutoEncoder
from torch import nn

from pairdiff_core import processes
from pairdiff_core.pairs import one_hot
from pairdiff_core.slabs import decode_in_slabs

LARGE, SLAB = (
    2**29,
    2**25,
)  # numbers in the finest activations from which on, and in pieces of which, to decode
FOREGROUND_WEIGHT = 2.5  # of every label but the background (1) in the cross-entropy, as published


class Quantised(NamedTuple):
    """What the codebook makes of a latent grid."""

    latent: torch.Tensor  # float (N, C, *grid): the chosen codes, with straight-through gradient
    tokens: torch.Tensor  # int64 (N, *grid): their indices, 0 to K - 1
    commitment: torch.Tensor  # scalar: mean squared distance of the encoder's output from its code


class Codebook(nn.Module):
    """K code vectors that follow the encoder by moving averages, with revival of dead codes.

    Each code is the running mean of the latents assigned to it (van den Oord et al. 2017, appendix A.1; Razavi et
    al. 2019). A code that is used less than ``revive_below`` times as often as the average code is put on a latent of
    the batch at hand (random restarts: Dhariwal et al. 2020, "Jukebox"). That latent is drawn with a chance that
    grows with its squared distance from the codes (k-means++, Arthur & Vassilvitskii 2007), not uniformly: most
    positions of an image are plain background, which one code serves. The first training batch places all codes.
    MONAI's ``EMAQuantizer`` has no revival: its unused codes stay dead. Of several processes that train together, each
    follows the latents of all, so that all have the same codes.

    Over the first ``fade_in`` training batches the decoder sees less and less of the encoder's own output and more and
    more of the codes. Thrown in at the deep end, it first learns what most tokens share, and a *paired* autoencoder can
    stay there: it encodes the average of both images, twice.

    Args:
        codes: K, the number of codes.
        channels: C, of the latent.
        fade_in: training batches until the codes alone count; 0 for from the start.
        decay: of the running means, per batch.
        revive_below: share of the average use under which a code is dead.
    """

    def __init__(
        self,
        codes: int,
        channels: int,
        fade_in: int = 0,
        decay: float = 0.97,
        revive_below: float = 0.05,
    ) -> None:
        super().__init__()
        self.fade_in, self.decay, self.revive_below = fade_in, decay, revive_below
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # seen in training
        self.register_buffer("vectors", torch.zeros(codes, channels))
        self.register_buffer(
            "counts", torch.zeros(codes)
        )  # running number of latents per code; 0 = never placed
        self.register_buffer("sums", torch.zeros_like(self.vectors))  # running sum of the latents per code

    def forward(self, latent: torch.Tensor) -> Quantised:
        """Replace each latent vector (N, C, *grid) by its nearest code; in training mode, follow the latents."""
        flat = latent.detach().movedim(1, -1).flatten(0, -2).float()  # (N * positions, C)
        if self.training and not self.counts.any():
            everything, latents = torch.ones_like(self.counts, dtype=torch.bool), processes.gather(flat)
            self._place(everything, latents, (latents - latents.mean(0)).square().sum(1))
        distance, nearest = torch.cdist(flat, self.vectors).min(1)
        tokens = nearest.reshape(latent.shape[0], *latent.shape[2:])
        chosen = self.look_up(tokens)
        share = 1.0
        if self.training:
            self._follow(*(processes.gather(each) for each in (flat, nearest, distance.square())))
            self.batches += 1
            share = min(1.0, int(self.batches) / max(1, self.fade_in))
        # The straight-through estimator: the code forward, the encoder's gradient backward.
        return Quantised(latent + share * (chosen - latent).detach(), tokens, F.mse_loss(latent, chosen))

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """The code vectors of tokens int (N, *grid) as (N, C, *grid)."""
        return self.vectors[tokens].movedim(-1, 1)

    @torch.no_grad()
    def _follow(self, flat: torch.Tensor, nearest: torch.Tensor, squared_distance: torch.Tensor) -> None:
        counts = torch.bincount(nearest, minlength=len(self.counts)).to(flat)
        sums = torch.zeros_like(self.sums).index_add_(0, nearest, flat)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.vectors.copy_(self.sums / self.counts[:, None].clamp_min(1e-6))
        dead = self.counts < self.revive_below * len(flat) / len(self.counts)
        if dead.any():
            self._place(dead, flat, squared_distance)

    @torch.no_grad()
    def _place(self, where: torch.Tensor, flat: torch.Tensor, squared_distance: torch.Tensor) -> None:
        drawn = torch.multinomial(squared_distance + 1e-6, int(where.sum()), replacement=True)
        average = len(flat) / len(
            self.counts
        )  # a newcomer counts as an average code, to live until latents find it
        self.vectors[where] = flat[drawn]
        self.counts[where] = average
        self.sums[where] = flat[drawn] * average


class Reconstruction(NamedTuple):
    """Output of :class:`PairedVQAE`."""

    logits: torch.Tensor  # float (N, 2, C, *spatial): one softmax over the labels for each image
    tokens: torch.Tensor  # int64 (N, *grid)
    commitment: torch.Tensor  # scalar


class PairedVQAE(nn.Module):
    """MONAI's ``AutoEncoder`` with a codebook between its encoder and its decoder.

    The input holds one channel for every label but the background, for both images: 2 (C - 1) channels; the
    output holds 2 C logits. For vessels (C = 2) these are the published 2 and 4.

    Args:
        spatial_dims: 2 or 3.
        num_labels: C, background included.
        channels, strides: of the encoder, as ``AutoEncoder`` takes them; the decoder mirrors them. A stride may be one
            number for each axis.
        codes: K, the size of the codebook.
        fade_in: see :class:`Codebook`.
    """

    def __init__(
        self,
        spatial_dims: int,
        num_labels: int,
        channels: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        codes: int,
        fade_in: int = 0,
    ) -> None:
        super().__init__()
        self.num_labels = num_labels
        per_axis = [[stride] * spatial_dims if isinstance(stride, int) else stride for stride in strides]
        # voxels per token along each axis
        self.reduction = tuple(map(math.prod, zip(*per_axis, strict=True)))
        self.network = AutoEncoder(spatial_dims, 2 * (num_labels - 1), 2 * num_labels, channels, strides)
        self.codebook = Codebook(codes, channels[-1], fade_in)

    def forward(self, labels: torch.Tensor) -> Reconstruction:
        """Reconstruct pairs of label maps, uint8 (N, 2, *spatial)."""
        quantised = self.codebook(self._latent(labels))
        return Reconstruction(self._logits(quantised.latent), quantised.tokens, quantised.commitment)

    def token_grid(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The grid of the tokens of images with so many voxels.

        Raises:
            ValueError: if a side is no multiple of the reduction along its axis.
        """
        if any(size % factor for size, factor in zip(spatial, self.reduction, strict=True)):
            raise ValueError(
                f"the sides of the grid must be multiples of {self.reduction}, got {tuple(spatial)}"
            )
        return tuple(size // factor for size, factor in zip(spatial, self.reduction, strict=True))

    def to_maps(self, labels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 2, *spatial) as the encoder's input, float (N, 2 (C - 1), *spatial)."""
        self.token_grid(labels.shape[2:])
        maps = one_hot(labels.flatten(0, 1), self.num_labels)[:, 1:]  # (2N, C - 1, *s)
        return maps.reshape(len(labels), -1, *labels.shape[2:])  # (2N, C - 1, *s) -> (N, 2 (C - 1), *s)

    def _latent(self, labels: torch.Tensor) -> torch.Tensor:
        return self.network.encode(self.to_maps(labels))

    def _logits(self, latent: torch.Tensor) -> torch.Tensor:
        return self.network.decode(latent).unflatten(1, (2, -1))  # (N, 2C, *s) -> (N, 2, C, *s)

    @torch.no_grad()
    def encode(self, labels: torch.Tensor) -> torch.Tensor:
        """Tokens int64 (N, *grid) of pairs of label maps uint8 (N, 2, *spatial)."""
        return self.codebook(self._latent(labels)).tokens

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Most likely label maps uint8 (N, 2, *spatial) of tokens int (N, *grid); large volumes go slab by slab."""
        decoder, latent = self.network.decode, self.codebook.look_up(tokens)
        spatial = [size * factor for size, factor in zip(tokens.shape[1:], self.reduction, strict=True)]
        row = len(tokens) * self.network.channels[0] * math.prod(spatial[1:])
        if row * spatial[0] <= LARGE:
            return most_likely(decoder(latent))
        return decode_in_slabs(decoder, latent, max(1, SLAB // row), most_likely)


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Label maps uint8 (N, 2, *spatial) of a decoder's logits (N, 2C, *spatial).

    Cross-entropy with weights is lowest for a softmax that overstates each label by its weight: here that is taken
    back, or structures would come out too large.
    """
    logits = logits.unflatten(1, (2, -1)).clone()  # (N, 2C, *s) -> (N, 2, C, *s)
    logits[:, :, 0] += math.log(FOREGROUND_WEIGHT)
    return logits.argmax(2).to(torch.uint8)


class VQAELoss(nn.Module):
    """Cross-entropy and soft Dice of both images, plus the commitment of the encoder to its codes.

    Args:
        num_labels: C, background included.
        commitment_weight: of the commitment term (published: 0.1).
    """

    def __init__(self, num_labels: int, commitment_weight: float = 0.1) -> None:
        super().__init__()
        weight = torch.full((num_labels,), FOREGROUND_WEIGHT)
        weight[0] = 1.0
        self.commitment_weight = commitment_weight
        self.image = DiceCELoss(
            to_onehot_y=True, softmax=True, weight=weight, include_background=True, batch=True
        )

    def forward(self, output: Reconstruction, labels: torch.Tensor) -> torch.Tensor:
        # Dice and the weighted mean are of a whole batch: with several processes, of the batches of all.
        logits = processes.gather(output.logits).flatten(0, 1)  # (N, 2, C, *s) -> (2N, C, *s)
        target = processes.gather(labels).flatten(0, 1)[:, None]  # (N, 2, *s) -> (2N, 1, *s)
        return self.image(logits, target) + self.commitment_weight * output.commitment


@torch.no_grad()
def encode_pairs(model: PairedVQAE, labels: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Tokens int16 (N, *grid), on the CPU, of any number of pairs of label maps uint8 (N, 2, *spatial)."""
    device = model.codebook.vectors.device
    model.eval()
    return torch.cat([model.encode(part.to(device)).cpu() for part in labels.split(batch)]).to(torch.int16)


@torch.no_grad()
def decode_labels(model: PairedVQAE, tokens: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Label maps uint8 (N, 2, *spatial), on the CPU, of any number of tokens int (N, *grid)."""
    device = model.codebook.vectors.device
    model.eval()
    return torch.cat([model.decode(part.to(device).long()).cpu() for part in tokens.split(batch)])
