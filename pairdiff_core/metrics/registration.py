"""How well a displacement aligns two images, and how regular it is."""

import math
import warnings
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from pairdiff_core import fields


def dice(a: Tensor, b: Tensor, num_labels: int) -> Tensor:
    """Dice overlap of each structure, 2 |A and B| / (|A| + |B|) (Dice, Ecology 1945).

    Label maps, integer (N, *spatial) with values 0 to C - 1, C being ``num_labels``, give float (N, C - 1), 0 to 1,
    without the background. NaN where a structure is absent from both images; one that is absent from only one of them
    scores 0, unlike in MONAI. ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"label maps of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    scores = []
    for one, other in zip(a, b, strict=True):  # image by image, and never one-hot: this bounds the memory
        voxels = (one.flatten(), other.flatten(), one[one == other])
        size_a, size_b, shared = (torch.bincount(labels, minlength=num_labels) for labels in voxels)
        scores.append(2 * shared / (size_a + size_b))  # 0 / 0 is NaN
    return torch.stack(scores)[:, 1:]


def mean_dice(a: Tensor, b: Tensor, num_labels: int) -> Tensor:
    """Mean of :func:`dice` over the structures in either image, float (N,), 0 to 1; NaN if there are none."""
    return dice(a, b, num_labels).nanmean(dim=1)


def mean_over_pairs(values: Tensor) -> float | None:
    """Mean of the values that are not NaN; None if there are none, because JSON has no NaN."""
    mean = values.nanmean().item()
    return None if math.isnan(mean) else mean


def hausdorff95(a: Tensor, b: Tensor, num_labels: int, spacing: Sequence[float]) -> Tensor:
    """95th percentile of the distance between the surfaces of each structure, as MONAI computes it.

    This is the larger of two 95th percentiles: of the distances from the surface voxels of ``a`` to the surface of
    ``b``, and from ``b`` to ``a``. The edge of the image counts as a surface of a structure. Label maps as for
    :func:`dice`, of ``spacing`` mm per voxel along each axis, give float (N, C - 1) in mm, on the CPU. NaN where a
    structure is absent from either image.
    """
    from monai.metrics import compute_hausdorff_distance  # here, because importing it takes seconds

    distances = torch.full((len(a), num_labels - 1), torch.nan)
    for n, c in product(range(len(a)), range(1, num_labels)):
        masks = [(labels[n] == c).cpu()[None, None] for labels in (a, b)]
        if all(mask.any() for mask in masks):
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of MONAI's own call
                distances[n, c - 1] = compute_hausdorff_distance(
                    *masks, include_background=True, percentile=95, spacing=tuple(spacing)
                ).item()
    return distances


def target_registration_error(displacement: Tensor, landmarks: Tensor, spacing: Sequence[float]) -> Tensor:
    """Distance from where the displacement takes each fixed landmark to the moving one, float (K,) in mm.

    The displacement is float (D, *spatial), voxels, fixed to moving; zeros give the error before registration. The
    landmarks are float (K, 2, D), voxel coordinates, ``[:, 0]`` fixed and ``[:, 1]`` moving; ``spacing`` is in mm.
    A fixed landmark outside the field of view stays where it is, as in ITK.
    """
    fixed, moving = landmarks.to(displacement).unbind(1)
    last = displacement.new_tensor(displacement.shape[1:]) - 0.5
    inside = ((fixed >= -0.5) & (fixed < last)).all(dim=1, keepdim=True)
    arrived = fixed + torch.where(inside, fields.sample_at(displacement, fixed), 0.0)
    return ((arrived - moving) * displacement.new_tensor(tuple(spacing))).norm(dim=1)


def describe_errors(errors: Tensor) -> dict[str, float]:
    """Summary of one or more landmark errors (K,) in mm.

    ``mean``; ``p25``, ``p50``, ``p75``, ``p95``, percentiles by linear interpolation; ``worst30``, the mean of the
    worst 30 % of the landmarks (at least one); ``landmarks``, K.
    """
    errors = errors.double().sort(descending=True).values
    percentiles = {f"p{p}": errors.quantile(p / 100).item() for p in (25, 50, 75, 95)}
    worst = errors[: max(1, round(0.3 * len(errors)))].mean().item()
    return {"mean": errors.mean().item(), **percentiles, "worst30": worst, "landmarks": len(errors)}


def folding_percent(displacement: Tensor) -> Tensor:
    """Share of voxels where a map folds, that is, where its Jacobian determinant is not positive.

    Displacements float (N, D, *spatial) in voxels give float (N,), percent (0 to 100) of all voxels. The central
    differences of the determinant can overlook a fold between two neighbouring voxels (Liu et al., IJCV 2024).
    """
    return 100 * (fields.jacobian_determinant(displacement) <= 0).flatten(1).float().mean(1)


def log_jacobian_sd(displacement: Tensor) -> Tensor:
    """Standard deviation of the log-Jacobian over the image: how unevenly a map changes volume.

    Displacements float (N, D, *spatial) in voxels give float (N,), natural logarithm; 0 for a translation. Determinants
    below 1e-9, such as those of folds, are set to 1e-9. Tools clamp differently: compare numbers of one tool only.
    """
    return fields.jacobian_determinant(displacement).clamp_min(1e-9).log().flatten(1).std(dim=1, correction=0)


def inverse_consistency_error(displacement: Tensor, inverse: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean distance between start and end of a round trip: |u(x) + v(x + u(x))|, averaged over the voxels.

    Displacements u (fixed to moving) and v (moving to fixed), float (N, D, *spatial) in voxels, give float (N,) in
    voxels: over all voxels, or over those at which ``where`` (N, *spatial) is true, NaN if there are none. Where
    x + u(x) lies outside the image, v is read at the border.
    """
    distance = fields.compose(displacement, inverse).norm(dim=1).flatten(1)
    if where is None:
        return distance.mean(1)
    counts = where.flatten(1).to(distance.dtype)
    return (distance * counts).sum(1) / counts.sum(1)
