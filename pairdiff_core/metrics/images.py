"""Grey images, real and synthetic: likeness, variety, distance between two sets, and copies.

Images are float (N, 1, *spatial), 0 to 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pairdiff_core.metrics.memorisation import memorisation_audit
from pairdiff_core.metrics.realism import precision_recall_density_coverage

KERNEL = 4  # of MS-SSIM: with MONAI's default of 11, five scales would need more than 160 voxels a side
CELL = 8  # voxels a side of the blocks whose means are the features
COMPONENTS = 16  # of these features, far fewer than images, as a covariance needs


def multiscale_ssim(a: Tensor, b: Tensor) -> Tensor:
    """MS-SSIM of each image of one set with the image of the same number in another, float (N,); 1 for equal images.

    Wang, Simoncelli and Bovik, Asilomar 2003, on five scales, by MONAI, with a kernel of KERNEL voxels. Sides must have
    more than 48 voxels.
    """
    from monai.metrics import MultiScaleSSIMMetric  # here, because importing it takes seconds

    return MultiScaleSSIMMetric(a.dim() - 2, kernel_size=KERNEL)(a, b)[:, 0]


def image_errors(found: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """How far images are from the true ones of the same number, float (N,) each.

    Returns:
        ``psnr``, the peak signal-to-noise ratio in dB, of a peak of 1: 10 log10 of 1 / the mean squared error;
        ``mae``, the mean absolute error; ``ms_ssim``, see :func:`multiscale_ssim`. The first two by MONAI, too.
    """
    from monai.metrics import MAEMetric, PSNRMetric  # here, because importing it takes seconds

    psnr, mae = PSNRMetric(max_val=1)(found, truth), MAEMetric()(found, truth)
    return {"psnr": psnr[:, 0], "mae": mae[:, 0], "ms_ssim": multiscale_ssim(found, truth)}


def similarity_of_samples(images: Tensor) -> float:
    """Mean MS-SSIM of N pairs of different images of one set: the lower, the more varied they are."""
    return multiscale_ssim(images, images.roll(1, 0)).mean().item()


def image_distances(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of each image of one set to each of another, float (N, M)."""
    # the faster matrix product of cdist does not give 0 for equal rows
    distances = torch.cdist(a.flatten(1), b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return distances / a[0].numel() ** 0.5


def principal_features(training: Tensor, *others: Tensor) -> list[Tensor]:
    """Sets of images in the space of the training images' principal components, float (N, COMPONENTS) each.

    Components are computed from the means of blocks of CELL voxels a side. So they describe size, position and
    brightness of parts, but not sharpness.

    Returns:
        the features of the training images, then those of each other set.
    """
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[training.dim() - 2]
    cells = [pool(images, CELL).flatten(1).double() for images in (training, *others)]
    mean = cells[0].mean(0)
    axes = torch.linalg.svd(cells[0] - mean, full_matrices=False).Vh[:COMPONENTS]
    scale = ((cells[0] - mean) @ axes.T).std(0)  # each component of the training images has variance 1
    return [(each - mean) @ axes.T / scale for each in cells]


def compare_images(training: Tensor, held_out: Tensor, sets: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Distance, variety and novelty of some sets of images.

    Args:
        training: what the generators learned from, at least as many as the other images.
        held_out: images of other people.
        sets: by name.

    Returns:
        for each set: ``frechet``, the Frechet distance of its :func:`principal_features` from those of the training
        images (Heusel et al., NeurIPS 2017, by MONAI), which depends on the number of images; ``recall`` in the same
        space, see :func:`precision_recall_density_coverage`; ``similarity``, see :func:`similarity_of_samples`;
        ``closer`` and ``memorised``, of :func:`memorisation_audit` with :func:`image_distances`.
    """
    from monai.metrics.fid import get_fid_score  # here, because importing it takes seconds

    known, *features = principal_features(training, *sets.values())
    compared = {}
    for (name, images), each in zip(sets.items(), features, strict=True):
        audit = memorisation_audit(images, training, held_out, image_distances)
        compared[name] = {
            "frechet": get_fid_score(each, known).item(),
            "similarity": similarity_of_samples(images),
            "recall": precision_recall_density_coverage(known, each)["recall"],
            "closer": audit.closer,
            "memorised": audit.memorised,
        }
    return compared
