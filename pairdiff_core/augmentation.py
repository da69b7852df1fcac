"""Batches of training pairs, freshly warped at each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pairdiff_core import fields
from pairdiff_core.profiles import Augmentation, Patches
from pairdiff_core.training import Samples

# From an image (*spatial), a coarser grid and a generator to a random motion (D, *grid) of that image, in voxels of the
# grid: what is at x moves to x + u(x).
Motion = Callable[[torch.Tensor, Sequence[int], torch.Generator], torch.Tensor]


class WarpedPairs:
    """Batches of pairs of label maps uint8 (batch, 2, *spatial), each freshly warped by :func:`augment`.

    Args:
        labels: uint8 (N, 2, *spatial), one pair for each item of ``samples``.
        samples: chooses the pairs of each step.
        augmentation: None: no warps.
        motion: draws other people's motions; None: no motions.
    """

    def __init__(
        self, labels: torch.Tensor, samples: Samples, augmentation: Augmentation | None, motion: Motion | None = None
    ) -> None:
        self.labels, self.samples, self.augmentation, self.motion = labels, samples, augmentation, motion

    def __call__(self, step: int) -> torch.Tensor:
        labels = self.labels[self.samples.chosen(step)]
        if self.augmentation is None:
            return labels
        return augment(labels, self.augmentation, self.samples.generators(step, "warp"), self.motion)


class PatchesOfPairs:
    """Batches of patches (batch, 2, *size): ``cuts`` batches from each warped one, each pair cut at a random location.

    Warping a volume takes longer than a training step on a patch, so each warped volume is used several times.
    """

    def __init__(self, volumes: WarpedPairs, patches: Patches) -> None:
        self.volumes, self.patches = volumes, patches
        self.round, self.batch = -1, torch.empty(0)

    def __call__(self, step: int) -> torch.Tensor:
        if self.round != step // self.patches.cuts:
            self.round = step // self.patches.cuts
            self.batch = self.volumes(self.round)
        generators = self.volumes.samples.generators(step, "place")
        return torch.stack(
            [cut(pair, self.patches.size, each) for pair, each in zip(self.batch, generators, strict=True)]
        )


def cut(labels: torch.Tensor, size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Cut a patch (M, *size) of label maps (M, *spatial) at a random location; all are equally likely."""
    free = torch.tensor(labels.shape[1:]) - torch.tensor(size) + 1
    starts = (torch.rand(len(free), generator=generator) * free).long().tolist()
    return labels[(..., *(slice(start, start + side) for start, side in zip(starts, size, strict=True)))]


def augment(
    labels: torch.Tensor,
    augmentation: Augmentation,
    generators: Sequence[torch.Generator],
    motion: Motion | None = None,
) -> torch.Tensor:
    """Warp pairs of label maps uint8 (N, 2, *spatial) with a random affine jitter and random smooth flows.

    One affine and one flow are common to both images of a pair, which keeps their relation. A second flow moves each
    image separately. With a ``motion``, a random share of it also moves one of the two images, the moving image
    forwards or the fixed one backwards, so that they differ more.

    Args:
        generators: N, one for each pair.
        motion: draws motions; None: no motions.
    """
    warped = torch.empty_like(labels)
    for index, generator in enumerate(generators):  # one at a time: the fields of large volumes need much memory
        displacement = _random_warps(labels.shape[2:], augmentation, generator)
        if motion is not None:
            _add_motion(displacement, labels[index], motion, augmentation.motion, generator)
        displacement = fields.resize_field(displacement, labels.shape[2:])
        warped[index] = fields.warp_labels(labels[index], displacement)
    return warped


def _random_warps(spatial: torch.Size, augmentation: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """Displacements (2, D, *coarser) of the two images of one pair, on the coarser grid."""
    coarse = [size // (augmentation.coarser) for size in spatial]
    common = _affine_jitter(coarse, augmentation.affine, generator)
    if augmentation.common > 0:
        common = fields.compose(common, _random_flow(1, coarse, augmentation.common, augmentation, generator))
    both = common.expand(2, *common.shape[1:])
    if augmentation.own > 0:
        both = fields.compose(both, _random_flow(2, coarse, augmentation.own, augmentation, generator))
    return both.clone()


def _add_motion(
    displacement: torch.Tensor, labels: torch.Tensor, motion: Motion, most: float, generator: torch.Generator
) -> None:
    """Add a random share, up to ``most``, of a motion to the warp of one image of a pair (2, *spatial), in place."""
    image = int(torch.randint(2, (1,), generator=generator))
    share = most * float(torch.rand(1, generator=generator))
    along = share * motion(labels[image], displacement.shape[2:], generator)[None]
    pull = fields.invert(along) if image == 1 else along  # a moved image at y is the image at the inverse of y
    displacement[image] = fields.compose(displacement[image : image + 1], pull)[0]


def _random_flow(
    number: int, coarse: Sequence[int], amplitude: float, augmentation: Augmentation, generator: torch.Generator
) -> torch.Tensor:
    factor = augmentation.coarser
    velocity = fields.random_velocity(
        number, coarse, amplitude=amplitude / factor, smoothness=augmentation.smoothness / factor, generator=generator
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
