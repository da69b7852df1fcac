"""Are synthetic pairs copies of training pairs?"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

VOXELS_AT_A_TIME = 65536  # bounds the memory of pair_distances
CLOSE = 0.05  # the share of held-out pairs that the memorisation audit calls close to a training pair


def pair_distances(a: Tensor, b: Tensor) -> Tensor:
    """Share of voxels that differ between each pair of one set and each pair of another.

    Label maps uint8 (N, I, *spatial) and (M, I, *spatial) give float (N, M), 0 (identical) to 1: of the voxels that are
    foreground in at least one of the two, over all I images together, the share whose label differs. Background common
    to both would only dilute it.
    """
    counts = [_agreement(a[:, i].flatten(1), b[:, i].flatten(1)) for i in range(a.shape[1])]
    same, union = (sum(images) for images in zip(*counts, strict=True))
    return torch.where(union > 0, 1 - same / union, 0.0).float()


def _agreement(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Voxels with the same structure, and voxels in the union of the foregrounds, of (N, V) and (M, V)."""
    # real pairs are combinations of a few images: each image is compared only once
    a, a_index = torch.unique(a, dim=0, return_inverse=True)
    b, b_index = torch.unique(b, dim=0, return_inverse=True)
    same = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    both = torch.zeros_like(same)
    for part_a, part_b in zip(a.split(VOXELS_AT_A_TIME, 1), b.split(VOXELS_AT_A_TIME, 1), strict=True):
        both += (part_a > 0).float() @ (part_b > 0).float().T  # (N, M) counts, exact in float32
        for c in range(1, int(part_a.max()) + 1):
            same += (part_a == c).float() @ (part_b == c).float().T
    union = (a > 0).sum(1)[:, None] + (b > 0).sum(1)[None] - both
    return same[a_index][:, b_index], union[a_index][:, b_index]


class MemorisationAudit(NamedTuple):
    """Are synthetic pairs copies of training pairs? Distances as in :func:`pair_distances`."""

    distances: Tensor  # float (S,), from each sample to its nearest training pair
    nearest: Tensor  # int64 (S,), index of that training pair
    held_out_distances: Tensor  # float (H,), from each held-out real pair, which cannot be a copy, to its nearest one
    threshold: float  # the 5th percentile of ``held_out_distances``
    closer: float  # share (0 to 1) of the samples nearer than the threshold; about 0.05 if they were real pairs
    memorised: bool  # the verdict: ``closer`` exceeds 0.05 by more than three (binomial) standard errors


def memorisation_audit(
    samples: Tensor,
    training: Tensor,
    held_out: Tensor,
    distances_of: Callable[[Tensor, Tensor], Tensor] = pair_distances,
) -> MemorisationAudit:
    """Are the samples nearer to the training pairs than real pairs of unseen subjects are?

    The idea of Meehan et al. (AISTATS 2020): a generator that learned the distribution comes no nearer to its training
    data than new real data does. *Reconstructed* training and held-out pairs exclude the smoothing by the VQ
    autoencoder from the comparison. Single images (I = 1) reveal copies in new combinations.

    Label maps uint8 (S, I, *spatial), (T, I, *spatial), (H, I, *spatial), on one grid, one or more of each.

    Args:
        distances_of: from two sets of pairs to the distances (N, M) between them.
    """
    distances, nearest = distances_of(samples, training).min(dim=1)
    held_out_distances = distances_of(held_out, training).min(dim=1).values
    threshold = held_out_distances.quantile(CLOSE).item()
    closer = (distances < threshold).double().mean().item()
    memorised = closer > CLOSE + 3 * math.sqrt(CLOSE * (1 - CLOSE) / len(samples))
    return MemorisationAudit(distances, nearest, held_out_distances, threshold, closer, memorised)
