"""Grey images of brain slices: T1-like and FLAIR-like ones drawn from label maps, and the measured T1 images of OASIS.

Images are drawn as SynthSeg draws them (Billot et al., Medical Image Analysis 2023): a Gaussian for each structure,
then blur, a smooth bias field and noise. SynthSeg draws the means at random, so that a network learns any contrast.
Here they follow from the signal equations of two MRI sequences and the relaxation times of the tissues.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pairdiff_core.data import oasis
from pairdiff_core.data.phantom_brains import LABEL_OF_STRUCTURE, TISSUE_OF_STRUCTURE
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet

CONTRASTS = ("T1", "FLAIR")


class Tissue(NamedTuple):
    """What the brightness of a tissue depends on, at 1.5 tesla."""

    t1: float  # ms, longitudinal relaxation
    t2: float  # ms, transverse relaxation
    t2_star: float  # ms, the same with the field's own inhomogeneity
    density: float  # of protons, 1 for water


# The tissue parameters of BrainWeb's simulator (Kwan et al., IEEE TMI 1999).
GREY, WHITE = Tissue(833, 83, 69, 0.86), Tissue(500, 70, 61, 0.77)
CSF = Tissue(2569, 329, 58, 1.0)
# Nuclei and brain stem contain myelin. BrainWeb has no row for them; the mean of grey and white matter is our choice.
SUBCORTICAL = Tissue(*(sum(pair) / 2 for pair in zip(GREY, WHITE, strict=True)))
TISSUES = (GREY, SUBCORTICAL, WHITE, CSF)  # in the order of the four tissue labels, without the background

BRIGHTEST = 0.8  # mean of the brightest tissue, of a range from 0 to 1
MEAN_SD, TEXTURE_SD = 0.03, 0.03  # of a structure's mean between images, and of its voxels
BLUR = 0.6  # standard deviation in voxels: voxels at a border show both sides
BIAS_SD, BIAS_NODES = 0.1, 4  # of the logarithm of the bias field, and its nodes along each axis
NOISE_SD = 0.02


def tissue_signal(tissue: Tissue, contrast: str) -> float:
    """Signal of a tissue in one of CONTRASTS, in arbitrary units.

    "T1" is a spoiled gradient echo with the settings of BrainWeb's T1 images (repetition 18 ms, echo 10 ms, flip angle
    30 degrees). "FLAIR" is an inversion recovery (repetition 9000 ms, echo 100 ms) that starts when CSF has no signal.

    Raises:
        DataError: for another contrast.
    """
    if contrast == "T1":
        angle, recovered = math.radians(30), math.exp(-18 / tissue.t1)
        excited = math.sin(angle) * (1 - recovered) / (1 - math.cos(angle) * recovered)
        return tissue.density * excited * math.exp(-10 / tissue.t2_star)
    if contrast == "FLAIR":
        inversion = CSF.t1 * math.log(2 / (1 + math.exp(-9000 / CSF.t1)))
        left = 1 - 2 * math.exp(-inversion / tissue.t1) + math.exp(-9000 / tissue.t1)
        return tissue.density * abs(left) * math.exp(-100 / tissue.t2)
    raise DataError(f"there is no contrast {contrast!r}; choose one of {', '.join(CONTRASTS)}")


def mean_intensities(contrast: str, num_labels: int) -> torch.Tensor:
    """Mean of each label in one of CONTRASTS, float (C,), 0 to 1; the background is 0, as outside a stripped brain.

    Args:
        num_labels: C, 5 (tissues) or 25 (structures, each with the signal of its tissue).

    Raises:
        DataError: for another contrast or number of labels.
    """
    if num_labels not in LABEL_OF_STRUCTURE:
        known = " or ".join(map(str, LABEL_OF_STRUCTURE))
        raise DataError(f"images are drawn from {known} labels (background included), not {num_labels}")
    signals = torch.tensor([0.0, *(tissue_signal(tissue, contrast) for tissue in TISSUES)])
    means = BRIGHTEST * signals / signals.max()
    return means if num_labels == len(means) else means[list(TISSUE_OF_STRUCTURE)]


def draw_images(
    labels: torch.Tensor, contrast: str, num_labels: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Draw an image of each label map uint8 (N, H, W): float (N, 1, H, W), 0 to 1.

    Args:
        contrast: one of CONTRASTS.
        num_labels: 5 or 25, background included.
        generators: N, one for each image; the same one gives the same image.

    Raises:
        DataError: as :func:`mean_intensities`.
    """
    from monai.networks.layers import GaussianFilter  # here, because importing it takes seconds

    means = mean_intensities(contrast, num_labels)
    blur = GaussianFilter(2, BLUR)
    drawn = []
    for image, generator in zip(labels, generators, strict=True):

        def noise(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        structures = means + MEAN_SD * noise(num_labels) * (means > 0)
        voxels = structures[image.long()] + TEXTURE_SD * noise(*image.shape) * (image > 0)
        nodes = noise(1, 1, BIAS_NODES, BIAS_NODES)
        bias = F.interpolate(nodes, size=image.shape, mode="bicubic", align_corners=False)
        seen = blur(voxels[None, None]) * (BIAS_SD * bias).exp() + NOISE_SD * noise(1, 1, *image.shape)
        drawn.append(seen.clamp(0, 1))
    return torch.cat(drawn)


def each_slice_once(pairs: PairSet) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The label maps uint8 (S, *spatial) of all images of some pairs, each only once, and their S names."""
    names = [image for pair in pairs.names for image in pair.split("~")]
    once = tuple(dict.fromkeys(names))
    return pairs.labels.flatten(0, 1)[[names.index(name) for name in once]], once


def measured_t1(pairs: PairSet, dataset: str, data: str | Path | None = None) -> torch.Tensor | None:
    """The measured T1 images of the slices of :func:`each_slice_once`, float (S, 1, *spatial), 0 to 1.

    They are the intensity-normalised slices ``slice_norm.nii.gz`` of neurite-oasis. None for phantoms, and for a folder
    in which not every slice has one, such as label maps alone.

    Raises:
        DataError: if the data are missing or a file is unsuitable.
    """
    if dataset != "oasis2d":
        return None
    return oasis.load_t1(oasis.find_oasis(data), each_slice_once(pairs)[1], pairs.spatial)
