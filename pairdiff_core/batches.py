"""Training batches as a function of the step.

A batch depends on the seed and the step alone, so that a run which was interrupted goes on with the batches it would
have had. And each *sample* draws its random numbers from a generator of its own: several processes that share a batch
make the same samples as one process that makes them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pairdiff_core import fields, processes
from pairdiff_core.pairs import DataError
from pairdiff_core.profiles import Augmentation, Patches
from pairdiff_core.randomness import generator


@dataclass(frozen=True)
class Samples:
    """Which of N training items this process takes at which step.

    All samples of a training are numbered in a row: step s of P processes has those from s P B to (s + 1) P B - 1. In
    each round of N numbers every item comes once, in a new random order.

    Attributes:
        items: N.
        batch: B, samples a step and process.
        seed: of order and augmentation.

    Raises:
        DataError: if there are fewer items than processes.
    """

    items: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.items < processes.count():
            raise DataError(
                f"{processes.count()} processes cannot share {self.items} training items: start at most {self.items}"
            )

    def at(self, step: int) -> list[int]:
        """Numbers of the ``batch`` samples that this process takes at a step, from 0."""
        first = (step * processes.count() + processes.rank()) * self.batch
        return list(range(first, first + self.batch))

    def chosen(self, step: int) -> torch.Tensor:
        """Indices int64 (batch,), 0 to N - 1, of the items that this process takes at a step."""
        places = [divmod(number, self.items) for number in self.at(step)]
        orders = {
            each: torch.randperm(self.items, generator=generator(self.seed, "order", each))
            for each in {each for each, _ in places}
        }
        return torch.stack([orders[each][place] for each, place in places])

    def generators(self, step: int, purpose: str) -> list[torch.Generator]:
        """One generator for each sample of a step and what it is used for."""
        return [generator(self.seed, purpose, number) for number in self.at(step)]


class WarpedPairs:
    """Batches of pairs of label maps uint8 (batch, 2, *spatial), each freshly warped by :func:`augment`.

    Args:
        labels: (N, 2, *spatial), as many as ``samples`` has items.
        samples: which pair comes when.
        augmentation: None leaves them as they are.
    """

    def __init__(self, labels: torch.Tensor, samples: Samples, augmentation: Augmentation | None) -> None:
        self.labels, self.samples, self.augmentation = labels, samples, augmentation

    def __call__(self, step: int) -> torch.Tensor:
        labels = self.labels[self.samples.chosen(step)]
        if self.augmentation is None:
            return labels
        return augment(labels, self.augmentation, self.samples.generators(step, "warp"))


class Pieces:
    """Batches of pieces (batch, 2, *size) of warped pairs, ``cuts`` from each batch, at one random place a pair.

    Warping a volume takes longer than a training step on a piece of it, so each is used several times.
    """

    def __init__(self, volumes: WarpedPairs, patches: Patches) -> None:
        self.volumes, self.patches = volumes, patches
        self.round, self.batch = -1, torch.empty(0)

    def __call__(self, step: int) -> torch.Tensor:
        if self.round != step // self.patches.cuts:
            self.round = step // self.patches.cuts
            self.batch = self.volumes(self.round)
        places = self.volumes.samples.generators(step, "place")
        return torch.stack(
            [cut(pair, self.patches.size, place) for pair, place in zip(self.batch, places, strict=True)]
        )


def cut(labels: torch.Tensor, size: Sequence[int], place: torch.Generator) -> torch.Tensor:
    """A piece (M, *size) of label maps (M, *spatial), all places equally likely."""
    free = torch.tensor(labels.shape[1:]) - torch.tensor(size) + 1
    starts = (torch.rand(len(free), generator=place) * free).long().tolist()
    return labels[
        (slice(None), *(slice(start, start + side) for start, side in zip(starts, size, strict=True)))
    ]


def augment(
    labels: torch.Tensor, augmentation: Augmentation, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Pairs of label maps uint8 (N, 2, *spatial), warped by random affine jitter and a random smooth flow.

    One affine and one flow are common to both images of a pair: what their relation is stays. A second, smaller
    flow of its own moves each image.

    Args:
        generators: N, one for each pair.
    """
    spatial = labels.shape[2:]
    warps = [_random_warps(spatial, augmentation, each) for each in generators]
    displacement = torch.cat(warps)  # (2N, D, *s), as labels flatten
    return fields.warp_labels(labels.flatten(0, 1), displacement).unflatten(0, (len(labels), 2))


def _random_warps(
    spatial: torch.Size, augmentation: Augmentation, generator: torch.Generator
) -> torch.Tensor:
    """Displacements (2, D, *spatial) of the two images of one pair, put together on the coarser grid."""
    coarse = [size // (augmentation.coarser or 1) for size in spatial]
    common = _affine_jitter(coarse, augmentation.affine, generator)
    if augmentation.common > 0:
        common = fields.compose(common, _random_flow(1, coarse, augmentation.common, augmentation, generator))
    both = common.expand(2, *common.shape[1:])
    if augmentation.own > 0:
        both = fields.compose(both, _random_flow(2, coarse, augmentation.own, augmentation, generator))
    return both if coarse == list(spatial) else fields.resize_field(both, spatial)


def _random_flow(
    number: int,
    coarse: Sequence[int],
    amplitude: float,
    augmentation: Augmentation,
    generator: torch.Generator,
) -> torch.Tensor:
    factor = augmentation.coarser or 1
    velocity = fields.random_velocity(
        number,
        coarse,
        amplitude=amplitude / factor,
        smoothness=augmentation.smoothness / factor,
        generator=generator,
    )
    return fields.exponentiate(velocity, squarings=4)


def _affine_jitter(spatial: Sequence[int], scale: float, generator: torch.Generator) -> torch.Tensor:
    """Displacement (1, D, *spatial) of an affine map whose entries differ by about ``scale`` from the identity's."""
    dims = len(spatial)
    matrix = scale * torch.randn((1, dims, dims), generator=generator)
    shift = scale * torch.randn((1, dims, 1), generator=generator) * torch.tensor(spatial)[:, None] / 4
    centre = torch.tensor(spatial).reshape(-1, *[1] * dims) / 2 - 0.5
    position = (fields.identity_grid(spatial) - centre).flatten(1)  # (D, *s) -> (D, voxels)
    return (matrix @ position + shift).unflatten(2, tuple(spatial))  # (1, D, voxels) -> (1, D, *s)
