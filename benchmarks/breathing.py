"""How far lungs move in breathing, and how well a model of other people's motions explains an unseen patient.

    python -m benchmarks.breathing --data DIR --json book/results/breathing.json

This takes a minute on one core. Distances are between correspondences, which were computed from the CTs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from pairdiff_core import fields
from pairdiff_core.data import load_pairs
from pairdiff_core.data.breathing import NODE_MM, NODES, STANDARD_BOX, Motions, box_of, in_standard_box, read_motions
from pairdiff_core.data.lung250m import CORRESPONDENCES, case_files, find_lung250m, read_correspondences
from pairdiff_core.data.lung_frame import FRAME
from pairdiff_core.motion import motion_model
from pairdiff_core.profiles import get_profile
from pairdiff_core.storage import provenance, write_json

COMPONENTS = (1, 2, 4, 8, 16, 32)


def mean_distance(points: torch.Tensor) -> float:
    """Mean distance between corresponding points (K, 2, 3)."""
    return float((points[:, 1] - points[:, 0]).norm(dim=1).mean())


def left_out_residuals(points: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """Mean residual in mm of a patient's correspondences (K, 2, 3) after models made of the others' motions.

    ``none``: no model; ``aligned``: best shift and scale along each axis; ``mean``: the mean of the others' motions,
    float (M, 3, *NODES); a number: that mean plus the best sum of as many principal components. All are fitted to the
    points on which they are evaluated, so the residuals are lower bounds.
    """
    low, high = box_of(points[:, 0])
    mm = (high - low) / (STANDARD_BOX[1] - STANDARD_BOX[0])  # of the patient, per mm of the standard box
    model, standard = motion_model(others, max(COMPONENTS)), in_standard_box(points)
    where, moved = fields.resize_points(standard[:, 0], FRAME, NODES), standard[:, 1] - standard[:, 0]
    left = {"none": moved}
    fixed, target = points.unbind(1)
    scale = target.std(0) / fixed.std(0)
    left["aligned"] = (target - target.mean(0) - scale * (fixed - fixed.mean(0))) / mm
    left["mean"] = moved - NODE_MM * fields.sample_at(model.mean[0], where)
    bases = torch.stack([NODE_MM * fields.sample_at(each, where).flatten() for each in model.components], 1)  # (3 K, R)
    for number in COMPONENTS:
        if number <= bases.shape[1]:
            fitted = torch.linalg.lstsq(bases[:, :number], left["mean"].flatten()[:, None]).solution
            left[str(number)] = left["mean"] - (bases[:, :number] @ fitted).reshape(-1, 3)
    return {name: float((mm * each).norm(dim=1).mean()) for name, each in left.items()}


def measure(folder: Path) -> dict[str, Any]:
    """Mean distance of each case and residuals of each left-out patient, in mm, from a folder of Lung250M-4B."""
    motions: Motions = read_motions(folder)
    points = {case: read_correspondences(folder / CORRESPONDENCES / f"{case}.csv") for case in motions.cases}
    held_out = load_pairs("lung250m", "validation", get_profile("laptop", 3), data=folder)
    cases = []
    for index, (case, each) in enumerate(points.items()):
        others = torch.cat([motions.displacement[:index], motions.displacement[index + 1 :]])
        cases.append(
            {"name": case, "mean_mm": mean_distance(each), "fit_residual_mm": motions.residual_mm[index]}
            | {"left_out_mm": left_out_residuals(each, others)}
        )
    mm = torch.tensor(held_out.spacing)
    validation = {
        name.partition("~")[0][:8]: mean_distance(landmarks * mm)
        for name, landmarks in zip(held_out.names, held_out.landmarks, strict=True)
    }
    left = {name: sum(case["left_out_mm"][name] for case in cases) / len(cases) for name in cases[0]["left_out_mm"]}
    with_vessels = [case["mean_mm"] for case in cases if case["name"] in case_files(folder, "train")]
    sizes = torch.tensor([case["mean_mm"] for case in cases])
    shares = (5, 25, 50, 75, 95)
    summary = {
        "motions": len(cases),
        "mean_mm": float(sizes.mean()),
        "percentiles_mm": {str(p): float(sizes.quantile(p / 100)) for p in shares},
        "with_vessels": len(with_vessels),
        "with_vessels_mm": sum(with_vessels) / len(with_vessels),
        "validation_mm": sum(validation.values()) / len(validation),
        "fit_residual_mm": sum(case["fit_residual_mm"] for case in cases) / len(cases),
        "left_out_mm": left,
    }
    made_by = provenance("", 0, "cpu") | {"dataset": "lung250m"}
    return {"summary": summary, "cases": cases, "with_vessels": sorted(set(points) & set(case_files(folder, "train"))),
            "validation": validation, "provenance": made_by}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breathing", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    chosen = parser.parse_args()
    measured = measure(find_lung250m(chosen.data))
    write_json(chosen.json, measured)
    print(measured["summary"])


if __name__ == "__main__":
    main()
