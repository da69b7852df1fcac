"""Stage 1: the paired vector-quantised autoencoder.

Both images of a pair go through **one** encoder together, and one grid of integer tokens describes them both. The
decoder returns two sets of logits, one per image. Background: van den Oord et al., "Neural Discrete
Representation Learning", NeurIPS 2017; the paired form is Heinrich, "Unleashing Registration", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pairdiff_core.metrics import codebook_statistics
from pairdiff_core.pairs import one_hot
from pairdiff_core.profiles import VQAESettings
from pairdiff_core.training.distributed import gather

FOREGROUND_WEIGHT = 2.5  # of each foreground label in the cross-entropy (background: 1), as published
COMMITMENT_WEIGHT = 0.1  # of the commitment in the loss, as published
VOXELS_AT_ONCE = 2**22  # of all images that are encoded or decoded together
LARGE, TILE = 2**29, 2**25  # numbers in the finest activations: above LARGE, decoding uses tiles of about TILE


class Quantised(NamedTuple):
    """A latent grid after quantisation."""

    latent: torch.Tensor  # float (N, C, *grid): the chosen codes, with straight-through gradient
    tokens: torch.Tensor  # int64 (N, *grid): their indices, 0 to K - 1
    commitment: torch.Tensor  # scalar: mean squared distance of the encoder's output from its code


class Codebook(nn.Module):
    """K code vectors, updated as running means of the encoder's output; dead codes are revived.

    Each code is the running mean of the latents assigned to it (van den Oord et al. 2017, appendix A.1; Razavi et
    al. 2019). A code that is used less than ``revive_below`` times as often as the average code is moved to a latent of
    the current batch (random restarts: Dhariwal et al. 2020, "Jukebox"). The probability of a latent grows with its
    squared distance from the codes (k-means++, Arthur & Vassilvitskii 2007), because most positions of an image are
    plain background, for which one code suffices. The first training batch places all codes. MONAI's ``EMAQuantizer``
    does not revive codes. When several processes train together, each uses the latents of all: all have the same codes.

    Over the first ``fade_in`` training batches, the decoder's input changes gradually from the encoder's output to the
    codes. With codes from the start, it first learns what most tokens share, and a *paired* autoencoder can get stuck
    there: it encodes the average of both images twice.

    Args:
        codes: K, the number of codes.
        channels: C, of the latent.
        fade_in: training batches until the decoder sees codes only; 0: from the start.
        decay: of the running means, per batch.
        revive_below: share of the average use below which a code is dead.
    """

    def __init__(
        self, codes: int, channels: int, fade_in: int = 0, decay: float = 0.97, revive_below: float = 0.05
    ) -> None:
        super().__init__()
        self.fade_in, self.decay, self.revive_below = fade_in, decay, revive_below
        self.placed = False  # once this is true, the device is not asked again
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # seen in training
        self.register_buffer("vectors", torch.zeros(codes, channels))
        self.register_buffer("counts", torch.zeros(codes))  # running number of latents per code
        self.register_buffer("sums", torch.zeros_like(self.vectors))  # running sum of the latents per code

    def forward(self, latent: torch.Tensor) -> Quantised:
        """Replace each latent vector (N, C, *grid) by its nearest code; in training mode, also update the codes."""
        flat = latent.detach().movedim(1, -1).flatten(0, -2).float()  # (N * positions, C)
        self.placed = self.placed or bool(self.counts.any())
        if self.training and not self.placed:
            latents = gather(flat)
            everywhere = torch.ones_like(self.counts, dtype=torch.bool)
            self._place(everywhere, latents, (latents - latents.mean(0)).square().sum(1))
        distance, nearest = torch.cdist(flat, self.vectors).min(1)
        tokens = nearest.reshape(latent.shape[0], *latent.shape[2:])
        chosen = self.look_up(tokens)
        share = 1.0
        if self.training:
            self._follow(gather(flat), gather(nearest), gather(distance.square()))
            self.batches += 1
            share = (self.batches / max(1, self.fade_in)).clamp(max=1)
        # The straight-through estimator: the code forward, the encoder's gradient backward.
        return Quantised(latent + share * (chosen - latent).detach(), tokens, F.mse_loss(latent, chosen))

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """The code vectors (N, C, *grid) of tokens int (N, *grid)."""
        return self.vectors[tokens].movedim(-1, 1)

    @torch.no_grad()
    def _follow(self, flat: torch.Tensor, nearest: torch.Tensor, squared_distance: torch.Tensor) -> None:
        counts = torch.zeros_like(self.counts).index_add_(0, nearest, torch.ones_like(squared_distance))
        sums = torch.zeros_like(self.sums).index_add_(0, nearest, flat)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.vectors.copy_(self.sums / self.counts[:, None].clamp_min(1e-6))
        dead = self.counts < self.revive_below * len(flat) / len(self.counts)
        self._place(dead, flat, squared_distance)

    @torch.no_grad()
    def _place(self, dead: torch.Tensor, flat: torch.Tensor, squared_distance: torch.Tensor) -> None:
        """Move the codes that are ``dead`` (K,) to latents; drawing for all K codes avoids waiting for a GPU."""
        chances = squared_distance.nan_to_num(0, 0).clamp(max=1e12) + 1e-6  # if it diverges, the loss shows it
        drawn = flat[torch.multinomial(chances, len(dead), replacement=True)]
        average = len(flat) / len(dead)  # a new code starts with average use, so that it is not dead at once
        self.vectors.copy_(torch.where(dead[:, None], drawn, self.vectors))
        self.counts.copy_(torch.where(dead, average, self.counts))
        self.sums.copy_(torch.where(dead[:, None], drawn * average, self.sums))


class Reconstruction(NamedTuple):
    """Output of :class:`PairedVQAE`."""

    logits: torch.Tensor  # float (N, 2, C, *spatial): one softmax over the labels for each image
    tokens: torch.Tensor  # int64 (N, *grid)
    commitment: torch.Tensor  # scalar


class PairedVQAE(nn.Module):
    """MONAI's ``AutoEncoder`` with a codebook between its encoder and its decoder.

    The input has one channel for each image and each label except the background, 2 (C - 1) in all; the output has
    2 C logits. For vessels (C = 2) these are the published 2 and 4.

    Args:
        settings: channels and strides (numbers, or one for each axis) of the encoder, which the decoder mirrors; codes.
        spatial_dims: 2 or 3.
        num_labels: C, background included.
    """

    def __init__(self, settings: VQAESettings, spatial_dims: int, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels
        channels, strides = settings.channels, settings.strides
        per_axis = [[stride] * spatial_dims if isinstance(stride, int) else stride for stride in strides]
        self.reduction = tuple(map(math.prod, zip(*per_axis, strict=True)))  # voxels per token along each axis
        from monai.networks.nets import AutoEncoder  # here, because importing it takes seconds

        self.network = AutoEncoder(spatial_dims, 2 * (num_labels - 1), 2 * num_labels, channels, strides)
        self.codebook = Codebook(settings.codes, channels[-1], settings.fade_in)

    def forward(self, labels: torch.Tensor) -> Reconstruction:
        """Reconstruct pairs of label maps, uint8 (N, 2, *spatial)."""
        quantised = self.codebook(self._latent(labels))
        return Reconstruction(self._logits(quantised.latent), quantised.tokens, quantised.commitment)

    def token_grid(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The size of the token grid of images of this size.

        Raises:
            ValueError: if a side is not a multiple of the reduction along its axis.
        """
        if any(size % factor for size, factor in zip(spatial, self.reduction, strict=True)):
            raise ValueError(f"the sides of the grid must be multiples of {self.reduction}, got {tuple(spatial)}")
        return tuple(size // factor for size, factor in zip(spatial, self.reduction, strict=True))

    def to_maps(self, labels: torch.Tensor) -> torch.Tensor:
        """Convert uint8 (N, 2, *spatial) to the encoder's input, float (N, 2 (C - 1), *spatial)."""
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
        """Decode tokens int (N, *grid) to label maps uint8 (N, 2, *spatial); large volumes are decoded in tiles."""
        decoder, latent = self.network.decode, self.codebook.look_up(tokens)
        spatial = [size * factor for size, factor in zip(tokens.shape[1:], self.reduction, strict=True)]
        row = len(tokens) * self.network.channels[0] * math.prod(spatial[1:])
        if row * spatial[0] <= LARGE:
            return most_likely(decoder(latent))
        return decode_in_tiles(decoder, latent, max(1, TILE // row), most_likely)


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The most likely label maps uint8 (N, 2, *spatial) for a decoder's logits (N, 2C, *spatial).

    Weighted cross-entropy makes the softmax overstate each label by its weight, so that structures would be too large.
    This is corrected here.
    """
    logits = logits.unflatten(1, (2, -1)).clone()  # (N, 2C, *s) -> (N, 2, C, *s)
    logits[:, :, 0] += math.log(FOREGROUND_WEIGHT)
    return logits.max(2).indices.to(torch.uint8)  # argmax finds the same, up to sixteen times slower on a CPU


def reconstruction_loss(output: Reconstruction, labels: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy and soft Dice of both images, plus the commitment loss; scalar.

    Args:
        output: of :class:`PairedVQAE`.
        labels: uint8 (N, 2, *spatial), the pairs that were its input.
    """
    weight = torch.full((output.logits.shape[2],), FOREGROUND_WEIGHT, device=labels.device)
    weight[0] = 1.0
    from monai.losses import DiceCELoss  # here, because importing it takes seconds

    image = DiceCELoss(to_onehot_y=True, softmax=True, weight=weight, include_background=True, batch=True)
    # Dice and the weighted mean are computed over the whole batch, across all processes.
    logits = gather(output.logits).flatten(0, 1)  # (N, 2, C, *s) -> (2N, C, *s)
    target = gather(labels).flatten(0, 1)[:, None]  # (N, 2, *s) -> (2N, 1, *s)
    return image(logits, target) + COMMITMENT_WEIGHT * output.commitment


def training_loss(model: nn.Module, labels: torch.Tensor, codes: int) -> dict[str, torch.Tensor]:
    """What a training step minimises and logs, scalars: the loss, the commitment and the use of the codebook.

    Args:
        model: a :class:`PairedVQAE`, or a wrapper of one.
        labels: uint8 (N, 2, *spatial).
        codes: K.
    """
    output = model(labels)
    return {
        "loss": reconstruction_loss(output, labels),
        "commitment": output.commitment,
        **codebook_statistics(gather(output.tokens), codes),
    }


def pairs_at_once(spatial: Sequence[int]) -> int:
    """How many pairs of this size are encoded or decoded at once, which limits the memory."""
    return max(1, VOXELS_AT_ONCE // (2 * math.prod(spatial)))


@torch.no_grad()
def encode_pairs(model: PairedVQAE, labels: torch.Tensor) -> torch.Tensor:
    """Encode any number of pairs of label maps uint8 (N, 2, *spatial) to tokens int16 (N, *grid), on the CPU."""
    device = model.codebook.vectors.device
    model.eval()
    parts = labels.split(pairs_at_once(labels.shape[2:]))
    return torch.cat([model.encode(part.to(device)).cpu() for part in parts]).to(torch.int16)


@torch.no_grad()
def decode_labels(model: PairedVQAE, tokens: torch.Tensor) -> torch.Tensor:
    """Decode any number of token grids int (N, *grid) to label maps uint8 (N, 2, *spatial), on the CPU."""
    device = model.codebook.vectors.device
    model.eval()
    spatial = [size * factor for size, factor in zip(tokens.shape[1:], model.reduction, strict=True)]
    parts = tokens.split(pairs_at_once(spatial))
    return torch.cat([model.decode(part.to(device).long()).cpu() for part in parts])


# Tiled decoding: at full size, the activations of a decoder's last layers would take most of the memory. Convolutions
# need neighbours, so each tile has a margin. Instance normalisation needs mean and variance of the whole image: a first
# pass over the tiles computes them, and a second one uses them.


def decode_in_tiles(
    decoder: nn.Sequential, latent: torch.Tensor, rows: int, finish: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``finish(decoder(latent))``, with the last two layers computed for ``rows`` rows of the result at a time.

    The result equals that of the whole image up to rounding: mean and variance are computed in 64 bit.

    Args:
        decoder: ``decode`` of MONAI's ``AutoEncoder`` without residual units: transposed convolutions of kernel 3, all
            but the last followed by instance normalisation and an activation.
        latent: float (N, C, *grid).
        rows: per tile, along the first spatial axis.
        finish: maps a tile of the output (N, C, rows, ...) to what is kept of it, (..., rows, ...); the position of the
            rows, counted from the last axis, must not change.
    """
    *first, before, last = (layer.conv for layer in decoder)
    for layer in first:
        latent = layer(latent)
    inner = latent.shape[2] * before.conv.stride[0]
    outer = inner * last.conv.stride[0]
    mean, deviation = _moments(before, latent, list(_chunks(inner, rows)))
    tiles = []
    for start, stop in _chunks(outer, rows):
        low, high = _needed(last.conv, start, stop, inner)
        activations = before.adn.A((_rows(before.conv, latent, low, high) - mean) / deviation)
        skipped = low * last.conv.stride[0]
        tiles.append(finish(last(activations)[:, :, start - skipped : stop - skipped]))
    return torch.cat(tiles, 2 - latent.dim())


def _chunks(length: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + rows, length)) for start in range(0, length, rows))


def _needed(convolution: nn.Module, start: int, stop: int, length: int) -> tuple[int, int]:
    """The input rows, of ``length`` in all, that determine rows ``start`` to ``stop`` of a transposed convolution."""
    stride = convolution.stride[0]
    return max(0, start // stride - 1), min(length, -(-stop // stride) + 1)


def _rows(convolution: nn.Module, image: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of ``convolution(image)``, without computing the others."""
    low, high = _needed(convolution, start, stop, image.shape[2])
    skipped = low * convolution.stride[0]
    return convolution(image[:, :, low:high])[:, :, start - skipped : stop - skipped]


def _moments(
    layer: nn.Module, latent: torch.Tensor, chunks: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (N, C, 1, ...) of the whole image for the layer's instance normalisation."""
    total = square = number = 0
    axes = tuple(range(2, latent.dim()))
    for start, stop in chunks:
        rows = _rows(layer.conv, latent, start, stop).double()
        total = total + rows.sum(axes, keepdim=True)
        square = square + rows.square().sum(axes, keepdim=True)
        number += rows[0, 0].numel()
    mean = total / number
    deviation = (square / number - mean.square() + layer.adn.N.eps).sqrt()
    return mean.to(latent.dtype), deviation.to(latent.dtype)
