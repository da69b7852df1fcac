"""How much do the best lung networks depend on their seed, and do real and synthetic images together teach more?

    python -m benchmarks.seeds runs/lungs --data DIR --runs DIR --json book/results/seeds.json --seeds 0 1 2

Networks are trained at `laptop` on pairs moved by other people's breaths: real pairs, the synthetic images of a
finished run (``runs/lungs``), or both in equal number. Each takes 45 minutes to an hour on one core. They are measured
on the validation pairs, alone and followed by the optimiser. Rows of other networks and seeds in the file are kept. An
interrupted command can be repeated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pairdiff_core.data.breathing import load_motions
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline import Run, images_with_themselves, methods, open_run, run_stages, train_registration
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import evaluate, summarise, used_as_start
from pairdiff_core.storage import fingerprint, provenance, write_json
from pairdiff_core.training import best_device

NETWORKS = ("real, motion", "synthetic, motion", "real and synthetic, motion")
KEPT = ("tre_mm", "dice", "hd95_mm", "folding_percent", "inverse_consistency_error")


def training_pairs(finished: Run, name: str) -> PairSet:
    """The training pairs of one of NETWORKS; the real pairs are repeated until there are as many as synthetic ones."""
    real = finished.train
    if name == NETWORKS[0]:
        return real
    synthetic = images_with_themselves(run_stages(finished, "synthesis").synthetic)
    if name == NETWORKS[1]:
        return synthetic
    times = len(synthetic) // len(real)
    labels = torch.cat([synthetic.labels, real.labels.repeat(times, *[1] * (real.labels.dim() - 1))])
    return replace(synthetic, labels=labels, names=synthetic.names + times * real.names)


def measure(run: Run, pairs: PairSet, name: str) -> list[dict[str, Any]]:
    """Train and score the network of one seed: a row for the network, and one for the optimiser after it."""
    motions = load_motions(run.dataset, run.data, run.seed)
    network = train_registration(run, pairs, name.replace(", ", "-").replace(" ", "-"), warped=True, motions=motions)
    rows = []
    for method_name, (method, _) in methods(run.profile, {name: network}).items():
        if method_name.startswith(name):
            row = summarise(list(evaluate(run.validation, method)), run.validation.label_names)
            kept = {"seed": run.seed, "method": method_name} | {key: row[key] for key in KEPT}
            if method.keywords.get("instance", True):
                kept["used_as_start"] = sum(used_as_start(run.validation, **method.keywords))
            rows.append(kept)
            print(run.seed, method_name, f"TRE {row['tre_mm']:.3f} mm", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("--data", type=Path, help="folder of the real data; default: PAIRDIFF_DATA")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders, one per seed")
    parser.add_argument("--json", type=Path, default=Path("book/results/seeds.json"))
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    finished = open_run(chosen.run, chosen.data)
    rows = json.loads(chosen.json.read_text())["rows"] if chosen.json.exists() else []
    for name in chosen.networks:
        pairs = training_pairs(finished, name)
        for seed in chosen.seeds:
            folder = chosen.runs / f"seed{seed}"
            run = Run("lung250m", get_profile("laptop", 3), seed=seed, folder=folder, data=chosen.data)
            used = {"train": fingerprint(run.train.labels), "validation": fingerprint(run.validation.labels)}
            made_by = provenance("laptop", seed, best_device(), used)
            new = [row | {"commit": made_by["commit"], "date": made_by["date"]} for row in measure(run, pairs, name)]
            again = {(row["seed"], row["method"]) for row in new}
            rows = [row for row in rows if (row["seed"], row["method"]) not in again] + new
            seeds = sorted({row["seed"] for row in rows})
            write_json(chosen.json, {"rows": rows, "provenance": made_by | {"seeds": seeds}})


if __name__ == "__main__":
    main()
