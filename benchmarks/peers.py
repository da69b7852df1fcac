"""Other registration programs on the same pairs: ANTs (SyN) and SimpleITK (Demons, B-splines).

    pip install -e '.[peers]'
    python -m benchmarks.peers --data DIR --json book/results/peers.json
    python -m benchmarks.peers --data DIR --choose

Each method sees the vessel masks at 2 mm, blurred. It registers in both directions, because it gives no consistent
inverse by construction; its seconds are those of one direction. ``--choose`` compares settings on training pairs with
deeper breathing (:mod:`benchmarks.moved`); without it, the best settings of each method run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from scipy import ndimage

from benchmarks.moved import moved_pairs
from pairdiff_core.data import load_pairs
from pairdiff_core.data.breathing import read_motions
from pairdiff_core.data.lung250m import find_lung250m
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import Deformation, summarise
from pairdiff_core.registration.scores import score_pair
from pairdiff_core.storage import provenance, write_json

# From two float images (H, W, D) with 1 mm between their voxels to the displacement (3, H, W, D), fixed to moving.
Peer = Callable[[np.ndarray, np.ndarray], np.ndarray]
CHOSEN_MOTIONS = (40,)  # of the 79, for `--choose`


def itk_image(values: np.ndarray) -> sitk.Image:
    """An image with the axes of the array, which SimpleITK has in reverse order."""
    return sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)).astype(np.float32))


def array_of(field: sitk.Image) -> np.ndarray:
    """A displacement field as (3, H, W, D)."""
    return sitk.GetArrayFromImage(field).transpose(3, 2, 1, 0)


def demons(steps: tuple[int, ...] = (60, 40, 20), sigma: float = 1.5) -> Peer:
    """Diffeomorphic Demons (Vercauteren et al., 2009) on a pyramid: each level continues the one before."""

    def register(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
        images, found = (itk_image(fixed), itk_image(moving)), None
        for level, iterations in enumerate(steps):
            shrink = [2 ** (len(steps) - 1 - level)] * 3
            coarse = [sitk.BinShrink(image, shrink) for image in images]
            grid = coarse[0]
            if found is None:
                found = sitk.Image(grid.GetSize(), sitk.sitkVectorFloat64)
                found.CopyInformation(grid)
            else:
                found = sitk.Resample(found, grid)
            method = sitk.DiffeomorphicDemonsRegistrationFilter()
            method.SetNumberOfIterations(iterations)
            method.SetSmoothDisplacementField(True)
            method.SetStandardDeviations(sigma)
            found = method.Execute(*coarse, sitk.Cast(found, sitk.sitkVectorFloat64))
        return array_of(found)

    return register


def b_splines(nodes_mm: float = 32, steps: int = 60) -> Peer:
    """A B-spline transform with mean squares, L-BFGS and a pyramid of three levels, as in SimpleITK's examples."""

    def register(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
        images = itk_image(fixed), itk_image(moving)
        mesh = [max(1, round(size / nodes_mm / 2)) for size in images[0].GetSize()]
        start = sitk.BSplineTransformInitializer(images[0], mesh)
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMeanSquares()
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsLBFGS2(solutionAccuracy=1e-4, numberOfIterations=steps)
        method.SetShrinkFactorsPerLevel([4, 2, 1])
        method.SetSmoothingSigmasPerLevel([2, 1, 0])
        method.SetInitialTransformAsBSpline(start, inPlace=True, scaleFactors=[1, 2, 4])
        found = method.Execute(*images)
        to_field = sitk.TransformToDisplacementFieldFilter()
        to_field.SetReferenceImage(images[0])
        return array_of(to_field.Execute(found))

    return register


def syn(metric: str = "meansquares", steps: tuple[int, ...] = (80, 60, 40), flow_sigma: float = 3) -> Peer:
    """ANTs: an affine transform, then symmetric normalisation (Avants et al., 2008)."""
    import ants

    def register(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
        images = ants.from_numpy(fixed), ants.from_numpy(moving)
        with tempfile.TemporaryDirectory() as folder:
            found = ants.registration(
                *images, "SyN", syn_metric=metric, reg_iterations=steps, flow_sigma=flow_sigma,
                outprefix=f"{folder}/", random_seed=0,
            )  # fmt: skip
            path = ants.apply_transforms(*images, found["fwdtransforms"], compose=f"{folder}/composed")
            return ants.image_read(path).numpy().transpose(3, 0, 1, 2)

    return register


# Name, method, blur of the masks (standard deviation, voxels), settings. The first of each name is reported.
TRIED: list[tuple[str, Callable[..., Peer], float, dict[str, Any]]] = [
    ("SimpleITK, Demons", demons, 1.0, {"steps": (200, 100, 40), "sigma": 1.5}),
    ("SimpleITK, Demons", demons, 1.0, {"steps": (60, 40, 20), "sigma": 1.5}),
    ("SimpleITK, Demons", demons, 1.0, {"steps": (60, 40, 20), "sigma": 2.5}),
    ("ANTs, SyN", syn, 1.0, {"metric": "meansquares", "steps": (40, 20, 0), "flow_sigma": 3}),
    ("ANTs, SyN", syn, 1.0, {"metric": "meansquares", "steps": (80, 60, 20), "flow_sigma": 3}),
    ("ANTs, SyN", syn, 1.0, {"metric": "CC", "steps": (40, 20, 0), "flow_sigma": 3}),
]


def run_peer(pairs: PairSet, peer: Peer, blur: float, both: bool = True) -> dict[str, Any]:
    """A row of the table of methods: one on blurred masks, in ``both`` directions or from fixed to moving only."""
    cases = []
    for index in range(len(pairs)):
        pair = pairs[index]
        images = [ndimage.gaussian_filter((image > 0).float().numpy(), blur) for image in pair.labels[0]]
        started = time.perf_counter()
        forth = peer(*images)
        seconds = time.perf_counter() - started
        back = peer(*images[::-1]) if both else np.zeros_like(forth)
        fields = (torch.from_numpy(np.ascontiguousarray(each)).float()[None] for each in (forth, back))
        cases.append(score_pair(pair, Deformation(*fields)) | {"seconds": seconds})
    return summarise(cases, pairs.label_names)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data; default: PAIRDIFF_DATA")
    parser.add_argument("--json", type=Path, default=Path("book/results/peers.json"))
    parser.add_argument("--choose", action="store_true", help="compare settings on training pairs")
    parser.add_argument("--only", default="", help="only methods whose name contains this")
    chosen = parser.parse_args()
    profile = get_profile("laptop", 3)
    pairs = load_pairs("lung250m", "train" if chosen.choose else "validation", profile, data=chosen.data)
    if chosen.choose:
        pairs = moved_pairs(pairs, read_motions(find_lung250m(chosen.data)), CHOSEN_MOTIONS)
    rows, done = [], set()
    for name, method, blur, settings in TRIED:
        if chosen.only in name and (chosen.choose or name not in done):
            row = run_peer(pairs, method(**settings), blur, both=not chosen.choose)
            rows.append({"method": name, "blur": blur, "settings": settings} | row)
            shown = ("tre_mm", "dice", "folding_percent", "seconds_per_pair")
            print(name, blur, settings, {key: round(row[key], 3) for key in shown}, flush=True)
        done.add(name)
    write_json(chosen.json, {"rows": rows, "provenance": provenance("laptop", 0, torch.device("cpu"))})


if __name__ == "__main__":
    main()
