"""Breathing motions of many patients, transferred to other lungs.

A *motion* is a displacement from breathed in to breathed out. Those of the 79 training patients of Lung250M-4B come
from automatic correspondences (``corrfieldTr/case_NNN.csv``), **computed from the CTs, not from vessels**. The volumes
of most of these patients are not public, so a motion is placed by the box of its points, the 2nd to 98th percentiles
along each axis. All motions share one box, ``STANDARD_BOX``, on a grid of 8 mm. Phantoms have their own motions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from pairdiff_core import fields
from pairdiff_core.data.lung250m import CORRESPONDENCES, find_lung250m, read_correspondences
from pairdiff_core.data.lung_frame import FRAME
from pairdiff_core.data.phantom_lungs import lung_correspondences
from pairdiff_core.errors import DataError
from pairdiff_core.motion import unfolded

BREATHING = ("phantom3d", "lung250m")  # the data sets that have motions
FIRST_PHANTOM, PHANTOMS = 9_000, 12  # first number and count of the phantom subjects whose motions are used
NODE_MM = 8
NODES = tuple(size // NODE_MM for size in FRAME)
STANDARD_BOX = torch.tensor([[9.0, 24.0, 24.0], [247.0, 184.0, 232.0]])  # mm, of the average size of the 79 boxes
INSIDE = (0.02, 0.98)  # quantiles of the points along each axis that bound a box
SCALES_MM = (40.0, 20.0, 10.0)  # standard deviations of the kernels, each applied to the residual of the last
FADING = (0.02, 0.05, 0.1)  # for each scale: the field fades where point density is below this share of its maximum
RIDGE = 0.01  # weight of the squared entries of the affine part, in standard deviations of the points


@dataclass(frozen=True, eq=False)
class Motions:
    """Motions of several people.

    Attributes:
        cases: M names.
        displacement: float (M, 3, *NODES) in the standard box, voxels of 8 mm, without folding.
        residual_mm: mean distance between each field and its correspondences.
    """

    cases: tuple[str, ...]
    displacement: torch.Tensor
    residual_mm: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.cases)

    def __call__(self, labels: torch.Tensor, spatial: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """A random weighted mean of two motions, transferred to an image of vessels (H, W, D); see :func:`laid`."""
        one, other = self.displacement[torch.randint(len(self), (2,), generator=generator)]
        share = torch.rand(1, generator=generator)
        return laid(torch.lerp(one, other, share), box_of_vessels(labels), spatial)


def load_motions(dataset: str, data: str | Path | None = None, seed: int = 0) -> Motions:
    """The motions for a data set of lungs: of patients, or of phantoms that are in no other set.

    Args:
        dataset: "lung250m" or "phantom3d".
        data: folder of the real data; None takes the one that PAIRDIFF_DATA names.
        seed: of the phantoms.

    Raises:
        DataError: as :func:`read_motions`.
    """
    if dataset == "lung250m":
        return read_motions(find_lung250m(data))
    numbers = range(FIRST_PHANTOM, FIRST_PHANTOM + PHANTOMS)
    return fit_motions({f"LUNGS_{number:04d}": lung_correspondences(number, seed) for number in numbers})


def read_motions(folder: Path) -> Motions:
    """The motions of the training patients in a folder of Lung250M-4B; takes 0.1 s each.

    Raises:
        DataError: if there are none, or a file is damaged; the message names the file.
    """
    files = sorted((folder / CORRESPONDENCES).glob("case_*.csv"))
    if not files:
        raise DataError(f"{folder / CORRESPONDENCES} holds no motions. Fetch them with `pairdiff fetch lung250m`.")
    return fit_motions({path.stem: read_correspondences(path) for path in files})


def fit_motions(points: dict[str, torch.Tensor]) -> Motions:
    """Motions from correspondences by case, float (K, 2, 3) in mm, fixed and moving, with any origin."""
    displacement, residual_mm = zip(*(fit(in_standard_box(each)) for each in points.values()), strict=True)
    return Motions(tuple(points), torch.stack(displacement), residual_mm)


def box_of(points: torch.Tensor) -> torch.Tensor:
    """The box (2, 3) of points (K, 3): their 2nd and 98th percentiles along each axis."""
    return torch.from_numpy(np.quantile(points.numpy(), INSIDE, axis=0)).float()


def box_of_vessels(labels: torch.Tensor) -> torch.Tensor:
    """The box (2, 3), in mm of the frame, of the vessels in an image (H, W, D) on a grid over the frame."""
    return box_of(fields.resize_points(labels.nonzero().float(), labels.shape, FRAME))


def in_standard_box(points: torch.Tensor) -> torch.Tensor:
    """Correspondences (K, 2, 3), moved and scaled along the axes so that the fixed ones fill the standard box."""
    low, high = box_of(points[:, 0])
    return (points - low) * ((STANDARD_BOX[1] - STANDARD_BOX[0]) / (high - low)) + STANDARD_BOX[0]


def fit(points: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Fit a displacement to correspondences (K, 2, 3) in mm of the frame.

    First an affine map by ridge regression, then at three scales the kernel average (Nadaraya, 1964) of the residual,
    which fades to zero where there are no points.

    Returns:
        float (3, *NODES), voxels of 8 mm, without folding; and its mean distance from the correspondences in mm.
    """
    fixed = points[:, 0].double().numpy()
    left = points[:, 1].double().numpy() - fixed  # the residual, (K, 3)
    nodes = fields.resize_points(fields.identity_grid(NODES).flatten(1).T, NODES, FRAME).double().numpy()
    centre, spread = fixed.mean(0), fixed.std(0)
    design, at_nodes = (np.c_[np.ones(len(each)), (each - centre) / spread] for each in (fixed, nodes))
    affine = np.linalg.solve(design.T @ design + len(fixed) * RIDGE * np.diag([0, 1, 1, 1]), design.T @ left)
    left, field = left - design @ affine, (at_nodes @ affine).T.reshape(3, *NODES)
    where = fields.resize_points(points[:, 0], FRAME, NODES)  # (K, 3), in voxels of the field
    cells = [np.arange(size + 1) - 0.5 for size in NODES]
    for scale, fading in zip(SCALES_MM, FADING, strict=True):
        sums = [np.histogramdd(where.numpy(), cells, weights=each)[0] for each in (None, *left.T)]
        density, *sums = (ndimage.gaussian_filter(each, scale / NODE_MM, mode="constant") for each in sums)
        average = np.stack(sums) / (density + fading * density.max())
        field += average
        left -= fields.sample_at(torch.from_numpy(average), where).numpy()
    displacement = unfolded(torch.from_numpy(field / NODE_MM).float()[None])[0]
    found = NODE_MM * fields.sample_at(displacement, where)
    return displacement, float((found - points.diff(dim=1)[:, 0]).norm(dim=1).mean())


def laid(motion: torch.Tensor, box: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """A motion (3, *NODES) of the standard box, transferred to another box, (2, 3) in mm of the frame.

    Returns:
        float (3, *spatial), in voxels of a grid over the frame, which may be coarser than that of the images.
    """
    size = (box[1] - box[0]) / (STANDARD_BOX[1] - STANDARD_BOX[0])
    here = fields.resize_points(fields.identity_grid(spatial).movedim(0, -1), spatial, FRAME)  # (*spatial, 3), mm
    there = fields.resize_points((here - box[0]) / size + STANDARD_BOX[0], FRAME, NODES)
    mm = NODE_MM * size * fields.sample_at(motion, there.reshape(-1, 3))
    return (mm * torch.tensor(tuple(spatial)) / torch.tensor(FRAME)).T.unflatten(1, tuple(spatial))
