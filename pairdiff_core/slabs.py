"""The last layers of a decoder, slab by slab: at full size, their activations would take most of the memory.

A convolution needs its neighbours, which a slab brings along as a margin. Instance normalisation needs mean and
variance of the whole image: a first pass over the slabs adds them up, a second one uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn


def decode_in_slabs(
    decoder: nn.Sequential, latent: torch.Tensor, rows: int, finish: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``finish(decoder(latent))``, the last two layers so many rows of the result at a time.

    The result is that of the whole but for rounding: mean and variance are added up in 64 bit.

    Args:
        decoder: ``decode`` of MONAI's ``AutoEncoder`` without residual units: transposed convolutions of kernel 3, all
            but the last followed by instance normalisation and an activation.
        latent: float (N, C, *grid).
        rows: along the first axis.
        finish: from a slab of the output (N, C, rows, ...) to what is kept of it, (..., rows, ...); the first axis
            stays where it is, counted from the end.
    """
    *first, before, last = (layer.conv for layer in decoder)
    for layer in first:
        latent = layer(latent)
    inner = latent.shape[2] * before.conv.stride[0]
    outer = inner * last.conv.stride[0]
    mean, deviation = _moments(before, latent, list(_chunks(inner, rows)))
    slabs = []
    for start, stop in _chunks(outer, rows):
        low, high = _needed(last.conv, start, stop, inner)
        activations = before.adn.A((_rows(before.conv, latent, low, high) - mean) / deviation)
        skipped = low * last.conv.stride[0]
        slabs.append(finish(last(activations)[:, :, start - skipped : stop - skipped]))
    return torch.cat(slabs, 2 - latent.dim())


def _chunks(length: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + rows, length)) for start in range(0, length, rows))


def _needed(convolution: nn.Module, start: int, stop: int, length: int) -> tuple[int, int]:
    """Which of the ``length`` rows of its input rows ``start`` to ``stop`` of a transposed convolution depend on."""
    stride = convolution.stride[0]
    return max(0, start // stride - 1), min(length, -(-stop // stride) + 1)


def _rows(convolution: nn.Module, image: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of ``convolution(image)``, at the cost of these alone."""
    low, high = _needed(convolution, start, stop, image.shape[2])
    skipped = low * convolution.stride[0]
    return convolution(image[:, :, low:high])[:, :, start - skipped : stop - skipped]


def _moments(
    layer: nn.Module, latent: torch.Tensor, chunks: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (N, C, 1, ...) that the layer's instance normalisation has for the whole image."""
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
