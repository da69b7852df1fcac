"""How good is it? Measures of registration, of the codebook, and of a set of synthetic pairs.

Three groups. *Registration*: Dice, target registration error, folding, inverse consistency. *Codebook*: how
many of the codes are in use. *Synthetic pairs against real ones*: sizes of structures and of displacements,
precision / recall / density / coverage, and the memorisation audit. Everything takes tensors, reads 2D or 3D
off their shape and gives plain results: tensors, named tuples, or rows (lists of dicts) that can go into a
table or a JSON file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.metrics import compute_dice
from scipy import ndimage

from pairdiff_core import fields

PERCENTILES = (5, 25, 50, 75, 95, 99)  # of the displacement magnitude
SMALLEST_DETERMINANT = 1e-9  # a folded voxel has no logarithm; it counts as a shrinkage to this volume
VOXELS_AT_A_TIME = 65536  # bounds the memory of pair_distances
CLOSE = 0.05  # the share of held-out pairs that the memorisation audit calls close to a training pair


# ---- registration


def dice(a: torch.Tensor, b: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Dice overlap of each structure, 2 |A and B| / (|A| + |B|) (Dice, Ecology 1945).

    Args:
        a, b: label maps, integer (N, *spatial), values 0 to ``num_labels`` - 1.
        num_labels: C, the background included.

    Returns:
        float (N, C - 1), 0 (apart) to 1 (the same); the background is left out. NaN where a structure is
        absent from both images; one that is absent from only one of them scores 0.

    Raises:
        ValueError: if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"label maps of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    # MONAI's ignore_empty would also drop a structure that only ``b`` lost: a failure, not a missing value
    scores = compute_dice(
        a[:, None], b[:, None], include_background=False, ignore_empty=False, num_classes=num_labels
    )
    present = [((a == c) | (b == c)).flatten(1).any(1) for c in range(1, num_labels)]
    return scores.masked_fill(~torch.stack(present, dim=1), torch.nan)


def mean_dice(a: torch.Tensor, b: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Mean of :func:`dice` over the structures present in either image, float (N,), 0 to 1."""
    return dice(a, b, num_labels).nanmean(dim=1)


def target_registration_error(
    displacement: torch.Tensor, landmarks: torch.Tensor, spacing: Sequence[float]
) -> torch.Tensor:
    """Distance between where the displacement takes each fixed landmark and where its partner is.

    Args:
        displacement: float (D, *spatial), voxels, fixed to moving. Zeros give the error before registration.
        landmarks: float (K, 2, D), voxel coordinates, ``[:, 0]`` fixed and ``[:, 1]`` moving.
        spacing: millimetres per voxel along each array axis.

    Returns:
        float (K,), millimetres.
    """
    fixed, moving = landmarks.to(displacement).unbind(1)
    arrived = fixed + fields.sample_at(displacement, fixed)
    return ((arrived - moving) * displacement.new_tensor(tuple(spacing))).norm(dim=1)


def describe_errors(errors: torch.Tensor) -> dict[str, float]:
    """Landmark errors (K,) in mm as the numbers that tables show.

    Returns:
        ``mean``; ``p25``, ``p50``, ``p75``, ``p95``, percentiles by linear interpolation; ``worst30``, the mean of the
        worst 30 % of the landmarks (at least one); ``landmarks``, K.

    Raises:
        ValueError: without a landmark.
    """
    if not len(errors):
        raise ValueError("there are no landmarks, so there is no error to describe")
    worst = errors.double().sort(descending=True).values[: max(1, round(0.3 * len(errors)))]
    percentiles = {f"p{p}": errors.double().quantile(p / 100).item() for p in (25, 50, 75, 95)}
    return {"mean": errors.double().mean().item(), **percentiles, "worst30": worst.mean().item(),
            "landmarks": len(errors)}  # fmt: skip


def folding_percent(displacement: torch.Tensor) -> torch.Tensor:
    """Share of voxels where the map folds, that is, where its Jacobian determinant is not positive.

    Args:
        displacement: float (N, D, *spatial), voxels.

    Returns:
        float (N,), percent (0 to 100) of all voxels, the border included. The determinant comes from central
        differences (:func:`pairdiff_core.fields.jacobian_determinant`), which can overlook a fold between two
        neighbouring voxels (Liu et al., IJCV 2024).
    """
    return 100 * (fields.jacobian_determinant(displacement) <= 0).flatten(1).float().mean(1)


def log_jacobian_sd(displacement: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the log-Jacobian over the image: how uneven the local change of volume is.

    Args:
        displacement: float (N, D, *spatial), voxels.

    Returns:
        float (N,), natural logarithm; 0 for a translation. Determinants below 1e-9, folds above all, have no
        usable logarithm and are set to 1e-9. Other tools clamp elsewhere: compare numbers of one tool only.
    """
    determinant = fields.jacobian_determinant(displacement).clamp_min(SMALLEST_DETERMINANT)
    return determinant.log().flatten(1).std(dim=1, correction=0)


def inverse_consistency_error(displacement: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """How far a round trip ends from where it began: mean over the voxels of |u(x) + v(x + u(x))|.

    Args:
        displacement: u, float (N, D, *spatial), voxels, fixed to moving.
        inverse: v, the same for moving to fixed.

    Returns:
        float (N,), voxels. All voxels count; for one that leaves the field of view on the way, v is read off
        at the border.
    """
    return fields.compose(displacement, inverse).norm(dim=1).flatten(1).mean(1)


# ---- codebook


class CodebookUse(NamedTuple):
    """How many of the codes occur.

    Attributes:
        used: share of the codes that occur at least once, 0 to 1.
        perplexity: exp(entropy) of the frequencies, 1 to K: as varied as so many equally frequent codes.
        counts: int64 (K,), how often each code occurs.
    """

    used: float
    perplexity: float
    counts: torch.Tensor


def codebook_use(tokens: torch.Tensor, codes: int) -> CodebookUse:
    """Use of a codebook by a set of tokens.

    Args:
        tokens: integers 0 to ``codes`` - 1, of any shape.
        codes: K, size of the codebook.

    Raises:
        ValueError: if there is no token, or one that is no code.
    """
    flat = tokens.flatten().long()
    if not flat.numel() or int(flat.min()) < 0 or int(flat.max()) >= codes:
        raise ValueError(f"tokens must be integers from 0 to {codes - 1}, at least one")
    counts = torch.bincount(flat, minlength=codes)
    share = counts.double() / counts.sum()
    entropy = -torch.xlogy(share, share).sum()
    return CodebookUse((counts > 0).double().mean().item(), entropy.exp().item(), counts)


# ---- synthetic against real: sizes of structures and of displacements


class AreaStatistics(NamedTuple):
    """Size of each structure over a set of images (area in 2D, volume in 3D); tensors of shape (C - 1,).

    Attributes:
        mean: share of the image's voxels, 0 to 1.
        sd: standard deviation of that share over the images.
        present: share of the images in which the structure occurs at all, 0 to 1.
    """

    mean: torch.Tensor
    sd: torch.Tensor
    present: torch.Tensor


def structure_areas(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Share of the voxels that each structure takes in each image.

    Args:
        labels: label maps uint8 (N, 2, *spatial).
        num_labels: C, the background included.

    Returns:
        double (2N, C - 1), 0 to 1; row 2i is the fixed and row 2i + 1 the moving image of pair i. Shares, not
        voxels, so that grids of different fineness can be compared.
    """
    images = labels.flatten(0, 1).flatten(1)  # (N, 2, *s) -> (2N, voxels)
    counts = torch.stack([torch.bincount(image, minlength=num_labels) for image in images])  # (2N, C)
    return counts[:, 1:].double() / images.shape[1]


def area_statistics(labels: torch.Tensor, num_labels: int) -> AreaStatistics:
    """Mean, spread and presence of each structure over all images of label maps (N, 2, *spatial)."""
    areas = structure_areas(labels, num_labels)
    return AreaStatistics(areas.mean(0), areas.std(0, correction=0), (areas > 0).double().mean(0))


class DisplacementStatistics(NamedTuple):
    """Length of the displacement vectors over all voxels of a set of fields, in voxels.

    Attributes:
        mean, sd: mean and standard deviation of |u|.
        percentiles: |u| at each percentile of :data:`PERCENTILES`, by linear interpolation.
    """

    mean: float
    sd: float
    percentiles: dict[int, float]


def displacement_statistics(displacement: torch.Tensor) -> DisplacementStatistics:
    """Statistics of |u| over all voxels of displacements (N, D, *spatial), in voxels."""
    lengths = displacement.norm(dim=1).flatten().double().sort().values
    percentiles = {}
    for p in PERCENTILES:  # torch.quantile refuses more than 16 million values
        place = p / 100 * (lengths.numel() - 1)
        below, above = lengths[math.floor(place)], lengths[math.ceil(place)]
        percentiles[p] = torch.lerp(below, above, place % 1).item()
    return DisplacementStatistics(lengths.mean().item(), lengths.std(correction=0).item(), percentiles)


def wasserstein_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Wasserstein-1 distance of two samples of numbers, in their unit: how far a's mass moves to become b's.

    It is the area between the two cumulative distribution functions (Ramdas et al., Entropy 2017). ``a`` and
    ``b`` may have different sizes and any shape; 0 means the same distribution.
    """
    a, b = a.flatten().double().sort().values, b.flatten().double().sort().values
    values = torch.cat([a, b]).sort().values
    share_a = torch.searchsorted(a, values[:-1], right=True).double() / a.numel()
    share_b = torch.searchsorted(b, values[:-1], right=True).double() / b.numel()
    return ((share_a - share_b).abs() * values.diff()).sum().item()


def compare_areas(
    real: torch.Tensor, synthetic: torch.Tensor, label_names: Sequence[str]
) -> list[dict[str, str | float]]:
    """Sizes of the structures in real and in synthetic images, side by side.

    Args:
        real, synthetic: label maps uint8 (N, 2, *spatial) and (M, 2, *spatial); the grids may differ.
        label_names: C names, the background's first.

    Returns:
        One row a structure: ``structure``; ``real_mean``, ``real_sd``, ``real_present``; the same three for
        ``synthetic_``; ``wasserstein``, the Wasserstein-1 distance between the sizes. Sizes are shares
        (0 to 1) of the image, ``present`` is a share of the images.
    """
    count = len(label_names)
    areas = {"real": structure_areas(real, count), "synthetic": structure_areas(synthetic, count)}
    rows = []
    for index, name in enumerate(label_names[1:]):
        row: dict[str, str | float] = {"structure": name}
        for kind in areas:
            column = areas[kind][:, index]
            row[f"{kind}_mean"] = column.mean().item()
            row[f"{kind}_sd"] = column.std(correction=0).item()
            row[f"{kind}_present"] = (column > 0).double().mean().item()
        row["wasserstein"] = wasserstein_distance(areas["real"][:, index], areas["synthetic"][:, index])
        rows.append(row)
    return rows


def compare_components(real: torch.Tensor, synthetic: torch.Tensor) -> dict[str, dict[str, float]]:
    """Connected pieces of the foreground in real and in synthetic images, side by side.

    A vessel tree hangs together; what a generator did not understand falls into crumbs.

    Args:
        real, synthetic: label maps uint8 (N, 2, *spatial) and (M, 2, *spatial) on grids of the same voxel size.

    Returns:
        ``{"real": ..., "synthetic": ...}``, each with ``number`` of pieces an image (mean over images), ``largest``,
        the share (0 to 1) of the foreground in the largest piece (mean over the images that have one), ``percentile_5``
        ... ``percentile_99`` of the sizes of all pieces in voxels, and ``crumbs``, the share of foreground in pieces
        below the real 25th percentile. Voxels hang together if they touch in any way, corners included.
    """
    sizes = {kind: _component_sizes(labels) for kind, labels in (("real", real), ("synthetic", synthetic))}
    everything = {kind: np.concatenate([np.zeros(0, int), *images]) for kind, images in sizes.items()}
    small = np.percentile(everything["real"], 25) if everything["real"].size else 0.0
    table = {}
    for kind, images in sizes.items():
        pieces = everything[kind]
        largest = [image.max() / image.sum() for image in images if image.size]
        table[kind] = {
            "number": float(np.mean([image.size for image in images])),
            "largest": float(np.mean(largest)) if largest else math.nan,
            "crumbs": float(pieces[pieces < small].sum() / pieces.sum()) if pieces.size else math.nan,
        } | {
            f"percentile_{p}": float(np.percentile(pieces, p)) if pieces.size else math.nan
            for p in PERCENTILES
        }
    return table


def _component_sizes(labels: torch.Tensor) -> list[np.ndarray]:
    """Voxels in each connected piece of the foreground, one array for each of the 2N images."""
    images = (labels.flatten(0, 1) > 0).cpu().numpy()
    touching = np.ones([3] * (images.ndim - 1))
    return [np.bincount(ndimage.label(image, touching)[0].ravel())[1:] for image in images]


def compare_displacements(real: torch.Tensor, synthetic: torch.Tensor) -> dict[str, dict[str, float]]:
    """Lengths of the displacements within real and within synthetic pairs, side by side.

    Args:
        real, synthetic: float (N, D, *spatial) and (M, D, *spatial), in voxels of the same size, both found
            by the same registration: another method finds longer or shorter ways for the same pair.

    Returns:
        ``{"real": ..., "synthetic": ...}`` with ``mean``, ``sd``, ``percentile_5`` ... ``percentile_99`` of
        |u| over all voxels, and ``{"difference": {"wasserstein": ...}}``, the Wasserstein-1 distance between
        the two distributions of |u|. All in voxels.
    """
    table = {}
    for kind, displacement in (("real", real), ("synthetic", synthetic)):
        statistics = displacement_statistics(displacement)
        table[kind] = {"mean": statistics.mean, "sd": statistics.sd}
        table[kind] |= {f"percentile_{p}": length for p, length in statistics.percentiles.items()}
    table["difference"] = {"wasserstein": wasserstein_distance(real.norm(dim=1), synthetic.norm(dim=1))}
    return table


# ---- synthetic against real: the distribution of the pairs


def pair_features(labels: torch.Tensor, num_labels: int, cells: Sequence[int]) -> torch.Tensor:
    """The feature space of the comparison: which share of each cell of a coarse grid each structure takes.

    Args:
        labels: label maps uint8 (N, 2, *spatial).
        num_labels: C, the background included.
        cells: number of cells along each axis, such as (8, 10). Voxel i of n along an axis is in cell
            floor(i * cells / n).

    Returns:
        float (N, 2 * (C - 1) * number of cells), each 0 to 1: fixed image, then moving image; in each,
        structure by structure. The background, one minus the rest, is left out. The features see where things
        are and how big, not the shape of an outline within a cell.
    """
    cell = torch.zeros((), dtype=torch.int64, device=labels.device)
    for size, count in zip(labels.shape[2:], cells, strict=True):
        along = torch.arange(size, device=labels.device) * count // size  # voxel -> cell along this axis
        cell = cell[..., None] * count + along  # grows by one axis: (*before,) -> (*before, size)
    number = math.prod(cells)
    voxels = torch.bincount(cell.flatten(), minlength=number).clamp_min(1)
    features = []
    for image in labels.flatten(0, 1):  # (N, 2, *s) -> (2N, *s)
        counts = torch.bincount((image.long() * number + cell).flatten(), minlength=num_labels * number)
        features.append(counts.reshape(num_labels, number)[1:] / voxels)  # (C - 1, cells)
    return torch.stack(features).reshape(len(labels), -1)  # (2N, C - 1, cells) -> (N, 2 * (C - 1) * cells)


class SampleQuality(NamedTuple):
    """How well synthetic samples match real ones. Shares, 0 to 1; only density may exceed 1.

    Attributes:
        precision: share of the synthetic samples that lie in the neighbourhood of a real one.
        recall: share of the real samples that lie in the neighbourhood of a synthetic one.
        density: in how many real neighbourhoods a synthetic sample lies on average, divided by k; about 1
            when both sets come from one distribution.
        coverage: share of the real samples that have a synthetic sample in their neighbourhood.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(
    real: torch.Tensor, synthetic: torch.Tensor, neighbours: int = 5
) -> SampleQuality:
    """Are synthetic samples like real ones (precision, density), and as varied (recall, coverage)?

    The neighbourhood of a sample is the closed ball that reaches to its k-th nearest other sample of the same
    set. Precision and recall: Kynkaanniemi et al., NeurIPS 2019. Density and coverage, which a single outlier
    disturbs less: Naeem et al., ICML 2020.

    Args:
        real, synthetic: float (N, F) and (M, F), in a Euclidean space such as that of :func:`pair_features`.
        neighbours: k. All four depend on N, M and k: compare only results that share them.

    Raises:
        ValueError: if a set has no more than k samples.
    """
    if min(len(real), len(synthetic)) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours need more than {neighbours} samples in each set, "
            f"there are {len(real)} real and {len(synthetic)} synthetic ones"
        )
    real_radius = _radius(real, neighbours)  # (N,)
    synthetic_radius = _radius(synthetic, neighbours)  # (M,)
    between = _distances(real, synthetic)  # (N, M)
    near_real = between <= real_radius[:, None]
    near_synthetic = between <= synthetic_radius[None]
    return SampleQuality(
        precision=near_real.any(0).double().mean().item(),
        recall=near_synthetic.any(1).double().mean().item(),
        density=near_real.sum(0).double().mean().item() / neighbours,
        coverage=near_real.any(1).double().mean().item(),
    )


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (N, M) of the rows of (N, F) and (M, F)."""
    # cdist's faster way through a matrix product does not give 0 for equal rows
    return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")


def _radius(samples: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Distance (N,) of each sample to its k-th nearest other one; the very nearest is the sample itself."""
    return _distances(samples, samples).kthvalue(neighbours + 1, dim=1).values


# ---- synthetic against real: copies


def pair_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distances between all pairs of one set and all pairs of another: the share of voxels that differ.

    Args:
        a, b: label maps uint8 (N, I, *spatial) and (M, I, *spatial); I = 2 for pairs, 1 for single images.

    Returns:
        float (N, M), 0 (the same) to 1. Of the voxels that are foreground in at least one of the two, over
        all I images together, the share whose label differs. Background common to both would only dilute it.
    """
    counts = [_agreement(a[:, i].flatten(1), b[:, i].flatten(1)) for i in range(a.shape[1])]
    same, union = (sum(images) for images in zip(*counts, strict=True))
    return torch.where(union > 0, 1 - same / union, 0.0).float()


def _agreement(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels with the same structure, and voxels in the union of the foregrounds, of (N, V) and (M, V)."""
    # real pairs are combinations of a few images: each image is compared once only
    a, a_index = torch.unique(a, dim=0, return_inverse=True)
    b, b_index = torch.unique(b, dim=0, return_inverse=True)
    same = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    both = torch.zeros_like(same)
    for start in range(0, a.shape[1], VOXELS_AT_A_TIME):
        part_a, part_b = (x[:, start : start + VOXELS_AT_A_TIME] for x in (a, b))
        both += (part_a > 0).float() @ (part_b > 0).float().T  # (N, M) counts, exact in float32
        for c in range(1, int(part_a.max()) + 1):
            same += (part_a == c).float() @ (part_b == c).float().T
    union = (a > 0).sum(1)[:, None] + (b > 0).sum(1)[None] - both
    return same[a_index][:, b_index], union[a_index][:, b_index]


class MemorisationAudit(NamedTuple):
    """Are synthetic pairs copies of training pairs? Distances as in :func:`pair_distances`.

    Attributes:
        distances: float (S,), from each sample to its nearest training pair.
        nearest: int64 (S,), index of that training pair.
        held_out_distances: float (H,), from each held-out real pair to its nearest training pair: how near a
            real pair of unseen subjects comes without having been copied.
        threshold: the 5th percentile of ``held_out_distances``.
        closer: share (0 to 1) of the samples nearer than the threshold; about 0.05 if they were real pairs.
        memorised: the verdict: ``closer`` is over 0.05 by more than three (binomial) standard errors.
    """

    distances: torch.Tensor
    nearest: torch.Tensor
    held_out_distances: torch.Tensor
    threshold: float
    closer: float
    memorised: bool


def memorisation_audit(
    samples: torch.Tensor, training: torch.Tensor, held_out: torch.Tensor
) -> MemorisationAudit:
    """Are the samples nearer to the training pairs than real pairs of unseen subjects are?

    The idea of Meehan et al. (AISTATS 2020): a generator that learned the distribution comes no nearer to
    its training data than new real data does. Two finer questions, by the choice of the arguments:
    *reconstructed* training and held-out pairs take the smoothing by the VQ autoencoder out of the
    comparison; single images ``labels.flatten(0, 1)[:, None]`` in all three places find copied images in new
    combinations.

    Args:
        samples: synthetic label maps uint8 (S, 2, *spatial).
        training: the label maps that the generator was trained on, uint8 (T, 2, *spatial).
        held_out: real label maps of other subjects, uint8 (H, 2, *spatial).

    Raises:
        ValueError: if a set is empty or the grids differ.
    """
    sets = (samples, training, held_out)
    if not all(len(labels) for labels in sets) or len({labels.shape[1:] for labels in sets}) > 1:
        shapes = ", ".join(str(tuple(labels.shape)) for labels in sets)
        raise ValueError(
            f"samples, training and held-out pairs: all on one grid, none may be empty; got {shapes}"
        )
    distances, nearest = pair_distances(samples, training).min(dim=1)
    held_out_distances = pair_distances(held_out, training).min(dim=1).values
    threshold = held_out_distances.quantile(CLOSE).item()
    closer = (distances < threshold).double().mean().item()
    memorised = closer > CLOSE + 3 * math.sqrt(CLOSE * (1 - CLOSE) / len(samples))
    return MemorisationAudit(distances, nearest, held_out_distances, threshold, closer, memorised)
