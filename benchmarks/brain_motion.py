"""Does a model of how brains differ augment pairs of brain slices better than random flows do?

    python -m benchmarks.brain_motion --data DIR --runs DIR --json book/results/brain_motion.json

The model's displacements are those that the optimiser finds in training pairs. Two networks with the settings of
`laptop` are trained on the same pairs, from the same weights: one with random warps, one with weaker warps plus a
displacement of the model. A seed takes about 25 minutes on one core. An interrupted command can be repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pairdiff_core import fields
from pairdiff_core.motion import MotionModel, motion_model
from pairdiff_core.pipeline import Run, train_registration
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import evaluate, register, summarise
from pairdiff_core.storage import fingerprint, provenance, write_json
from pairdiff_core.training import best_device

NODE = 4  # voxels of the images per voxel of the model's grid
COMPONENTS = 16
EVERY = 10  # every tenth training pair is registered


class RandomMotion:
    """Draws from a model of displacements, for :class:`pairdiff_core.augmentation.WarpedPairs`."""

    def __init__(self, model: MotionModel) -> None:
        self.model = model
        self.displacement = torch.cat([model.mean, model.components])  # what a run says it was trained with

    def __call__(self, labels: torch.Tensor, spatial: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        return fields.resize_field(self.model.draw(generator), spatial)[0]


def measure(data: Path | None, runs: Path, seed: int) -> tuple[list[dict[str, Any]], Run]:
    """Train and score both networks of one seed; returns a row for each, and their run."""
    profile = get_profile("laptop", 2)
    warps = profile.vqae.augmentation
    profile = replace(
        profile, registration=replace(profile.registration, breathing=replace(warps, own=warps.own / 2, motion=0.5))
    )
    run = Run("oasis2d", profile, seed=seed, folder=runs / str(seed), data=data)
    found = register(run.train[::EVERY], profile).displacement
    nodes = [size // NODE for size in run.train.spatial]
    motions = RandomMotion(motion_model(fields.resize_field(found, nodes), COMPONENTS))
    networks = {
        "random flows": train_registration(run, run.train, "real-warped", warped=True),
        "motion model": train_registration(run, run.train, "real-motion", warped=True, motions=motions),
    }
    rows = []
    for name, network in networks.items():
        method = partial(register, profile=profile, network=network.model, instance=False)
        row = summarise(list(evaluate(run.validation, method)), run.validation.label_names)
        rows.append({"augmentation": name, "seed": seed} | {key: row[key] for key in row if key != "cases"})
        print(name, seed, f"Dice {row['dice']:.4f}, HD95 {row['hd95_mm']:.3f} mm", flush=True)
    return rows, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.brain_motion", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data; default: PAIRDIFF_OASIS2D, PAIRDIFF_DATA")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders, one per seed")
    parser.add_argument("--json", type=Path, default=Path("book/results/brain_motion.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for number, seed in enumerate(chosen.seeds, start=1):
        new, run = measure(chosen.data, chosen.runs, seed)
        rows += new
        used = {"train": fingerprint(run.train.labels), "validation": fingerprint(run.validation.labels)}
        made_by = provenance("laptop", chosen.seeds[0], best_device(), used)
        made_by |= {"dataset": "oasis2d", "seeds": chosen.seeds[:number]}
        write_json(chosen.json, {"rows": rows, "provenance": made_by})


if __name__ == "__main__":
    main()
