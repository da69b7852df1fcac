"""Are synthetic pairs like real ones? Sizes of structures, connected components, displacements, distribution."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from scipy import ndimage
from scipy.stats import wasserstein_distance
from torch import Tensor

PERCENTILES = (5, 25, 50, 75, 95, 99)
QUANTILES = (np.arange(10_000) + 0.5) / 10_000  # of displacement lengths, for their Wasserstein distance


def structure_areas(labels: Tensor, num_labels: int) -> Tensor:
    """Share of the voxels that each structure takes in each image (area in 2D, volume in 3D).

    Label maps uint8 (N, I, *spatial) give double (N * I, C - 1), 0 to 1, image by image of pair by pair.
    """
    images = labels.flatten(0, 1).flatten(1)  # (N, I, *s) -> (N * I, voxels)
    counts = torch.stack([torch.bincount(image, minlength=num_labels) for image in images])  # (N * I, C)
    return counts[:, 1:].double() / images.shape[1]


def compare_areas(real: Tensor, synthetic: Tensor, label_names: Sequence[str]) -> list[dict]:
    """Sizes of the structures in real and in synthetic images, side by side.

    Label maps uint8 (N, I, *spatial), on grids that may differ, and C names, the background's first, give one row per
    structure: ``structure``; ``real_mean``, ``real_sd``, ``real_present``; the same three for ``synthetic_``;
    ``wasserstein``, the Wasserstein-1 distance between the sizes. Sizes are shares (0 to 1) of the image, and
    ``present`` is the share of the images that show the structure.
    """
    areas = [structure_areas(labels, len(label_names)).T.cpu().numpy() for labels in (real, synthetic)]
    rows = []
    for name, *sizes in zip(label_names[1:], *areas, strict=True):
        row: dict[str, str | float] = {"structure": name}
        for kind, size in zip(("real", "synthetic"), sizes, strict=True):
            measured = {"mean": size.mean(), "sd": size.std(), "present": (size > 0).mean()}
            row |= {f"{kind}_{what}": float(value) for what, value in measured.items()}
        rows.append(row | {"wasserstein": float(wasserstein_distance(*sizes))})
    return rows


def compare_components(real: Tensor, synthetic: Tensor) -> dict[str, dict[str, float]]:
    """Connected components of the foreground in real and in synthetic images, side by side.

    A vessel tree is connected; a poor generator breaks it into small components. Voxels that share a face, edge or
    corner are connected. Label maps uint8 (N, I, *spatial) of one voxel size give ``{"real": ..., "synthetic": ...}``:
    ``number``, components per image (mean over images); ``largest``, the share (0 to 1) of the foreground in the
    largest component (mean over the images that have one); ``small``, the share of the foreground in components
    below the real 25th percentile; ``percentile_5`` ... ``percentile_99`` of the sizes of all components in voxels.
    NaN where there are none.
    """
    sets = {"real": _component_sizes(real), "synthetic": _component_sizes(synthetic)}
    real_sizes = np.concatenate(sets["real"])
    limit = np.percentile(real_sizes, 25) if real_sizes.size else 0.0
    return {kind: _describe_components(images, limit) for kind, images in sets.items()}


def _component_sizes(labels: Tensor) -> list[np.ndarray]:
    """Voxels in each connected component of the foreground, one array for each image."""
    images = (labels.flatten(0, 1) > 0).cpu().numpy()
    touching = np.ones([3] * (images.ndim - 1))
    return [np.bincount(ndimage.label(image, touching)[0].ravel())[1:] for image in images]


def _describe_components(images: list[np.ndarray], limit: float) -> dict[str, float]:
    sizes = np.concatenate(images)
    if not sizes.size:
        return {"number": 0.0, "largest": math.nan, "small": math.nan} | _percentiles([math.nan])
    largest = float(np.mean([image.max() / image.sum() for image in images if image.size]))
    small = float(sizes[sizes < limit].sum() / sizes.sum())
    return {"number": sizes.size / len(images), "largest": largest, "small": small} | _percentiles(sizes)


def _percentiles(values: np.ndarray | list[float]) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES)
    return {f"percentile_{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}


def displacement_statistics(displacement: Tensor) -> dict[str, float]:
    """``mean``, ``sd`` and ``percentile_5`` ... ``percentile_99`` of the lengths |u| of all displacement vectors.

    Displacements are float (N, D, *spatial) in voxels, and so are the results.
    """
    return _describe_lengths(_lengths(displacement))


def _lengths(displacement: Tensor) -> np.ndarray:
    return np.sort(displacement.norm(dim=1).flatten().cpu().numpy())  # sorted once: faster than for each quantile


def _describe_lengths(lengths: np.ndarray) -> dict[str, float]:
    mean, sd = lengths.mean(dtype=np.float64), lengths.std(dtype=np.float64)
    return {"mean": float(mean), "sd": float(sd)} | _percentiles(lengths)


def compare_displacements(real: Tensor, synthetic: Tensor) -> dict[str, dict[str, float]]:
    """Lengths of the displacements within real and within synthetic pairs, side by side.

    Displacements, float (N, D, *spatial) in voxels of one size, both from one registration method (another finds longer
    or shorter ones), give ``{"real": ..., "synthetic": ...}`` as in :func:`displacement_statistics`, and
    ``{"difference": {"wasserstein": ...}}``, the Wasserstein-1 distance between the distributions of |u|, in voxels.
    """
    lengths = {"real": _lengths(real), "synthetic": _lengths(synthetic)}
    # on all values of 48 volumes scipy would take minutes; 10,000 quantiles of each set agree to four digits
    quantiles = [np.quantile(each, QUANTILES, method="inverted_cdf") for each in lengths.values()]
    difference = {"wasserstein": float(wasserstein_distance(*quantiles))}
    return {kind: _describe_lengths(each) for kind, each in lengths.items()} | {"difference": difference}


def pair_features(labels: Tensor, num_labels: int, cells: Sequence[int]) -> Tensor:
    """The share of each cell of a coarse grid that each structure takes: a feature space to compare pairs in.

    Label maps uint8 (N, I, *spatial) and the number of cells along each axis, such as (8, 10), give float (N, I * (C -
    1) * number of all cells), each 0 to 1: image by image, and within each, structure by structure, without the
    background. Voxel i of n along an axis is in cell floor(i * cells / n).
    """
    cell = torch.zeros((), dtype=torch.int64, device=labels.device)
    for size, count in zip(labels.shape[2:], cells, strict=True):
        along = torch.arange(size, device=labels.device) * count // size  # voxel -> cell along this axis
        cell = cell[..., None] * count + along  # grows by one axis: (*before,) -> (*before, size)
    number = math.prod(cells)
    voxels = torch.bincount(cell.flatten(), minlength=number).clamp_min(1)
    features = []
    for image in labels.flatten(0, 1):  # (N, I, *s) -> (N * I, *s)
        counts = torch.bincount((image.long() * number + cell).flatten(), minlength=num_labels * number)
        features.append(counts.reshape(num_labels, number)[1:] / voxels)  # (C - 1, cells)
    return torch.stack(features).reshape(len(labels), -1)  # (N * I, C - 1, cells) -> (N, I * (C - 1) * cells)


def share_in_real_range(real: Tensor, other: Tensor) -> float:
    """The share (0 to 1) of the features of ``other`` (M, F) that lie between the 5th and 95th percentiles of ``real``.

    Features are float (N, F), such as those of :func:`pair_features`. About 0.9 for other samples of the same kind.
    """
    low, high = real.quantile(torch.tensor([0.05, 0.95], dtype=real.dtype), dim=0)
    return ((other >= low) & (other <= high)).double().mean().item()


def precision_recall_density_coverage(real: Tensor, synthetic: Tensor, neighbours: int = 5) -> dict[str, float]:
    """Are synthetic samples like real ones (precision, density), and as varied (recall, coverage)?

    Samples are float (N, F) and (M, F), in a Euclidean space such as that of :func:`pair_features`. The neighbourhood
    of a sample is the closed ball that reaches to its k-th nearest other sample of the same set, where k is
    ``neighbours``. All results depend on N, M and k: compare only those that share them. ValueError if a set has no
    more than k samples. Precision and recall: Kynkaanniemi et al., NeurIPS 2019. Density and coverage, which a single
    outlier disturbs less: Naeem et al., ICML 2020.

    Returns:
        ``precision`` and ``recall``, shares (0 to 1) of the synthetic samples that lie in the neighbourhood of a real
        one, and of the real samples that lie in that of a synthetic one; ``density``, the mean number of real
        neighbourhoods that a synthetic sample lies in, divided by k, about 1 when both sets come from one distribution;
        ``coverage``, the share of the real samples that have a synthetic one in their neighbourhood.
    """
    if min(len(real), len(synthetic)) <= neighbours:
        raise ValueError(f"more than {neighbours} samples are needed, got {len(real)} real, {len(synthetic)} synthetic")
    # the faster matrix product of cdist does not give 0 for equal rows
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    # the very nearest of the same set is the sample itself
    radii = [distances(each, each).kthvalue(neighbours + 1, dim=1).values for each in (real, synthetic)]
    between = distances(real, synthetic)  # (N, M)
    near_real, near_synthetic = (between <= radii[0][:, None]).double(), (between <= radii[1]).double()
    return {
        "precision": near_real.amax(0).mean().item(),
        "recall": near_synthetic.amax(1).mean().item(),
        "density": near_real.sum(0).mean().item() / neighbours,
        "coverage": near_real.amax(1).mean().item(),
    }
