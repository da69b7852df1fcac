"""How much does the best lung network depend on its seed?

    python -m benchmarks.seeds --data DIR --runs DIR --json book/results/seeds.json --seeds 0 1 2

For each seed, the network is trained at `laptop` on real pairs moved by other people's breaths (an hour on one core).
It is measured on the validation pairs, alone and followed by the optimiser. An interrupted command can be repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pairdiff_core.data.breathing import load_motions
from pairdiff_core.pipeline import Run, methods, train_registration
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import evaluate, summarise
from pairdiff_core.storage import fingerprint, provenance, write_json
from pairdiff_core.training import best_device

NAME = "real, motion"
KEPT = ("tre_mm", "dice", "hd95_mm", "folding_percent", "inverse_consistency_error")


def measure(run: Run) -> list[dict[str, Any]]:
    """Train and score the network of one seed: a row for the network, and one for the optimiser after it."""
    motions = load_motions(run.dataset, run.data, run.seed)
    network = train_registration(run, run.train, NAME.replace(", ", "-"), warped=True, motions=motions)
    rows = []
    for name, (method, _) in methods(run.profile, {NAME: network}).items():
        if name.startswith(NAME):
            row = summarise(list(evaluate(run.validation, method)), run.validation.label_names)
            rows.append({"seed": run.seed, "method": name} | {key: row[key] for key in KEPT})
            print(run.seed, name, f"TRE {row['tre_mm']:.3f} mm", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data; default: PAIRDIFF_DATA")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders, one per seed")
    parser.add_argument("--json", type=Path, default=Path("book/results/seeds.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for number, seed in enumerate(chosen.seeds, start=1):
        folder = chosen.runs / f"seed{seed}"
        run = Run("lung250m", get_profile("laptop", 3), seed=seed, folder=folder, data=chosen.data)
        rows += measure(run)
        used = {"train": fingerprint(run.train.labels), "validation": fingerprint(run.validation.labels)}
        made_by = provenance("laptop", chosen.seeds[0], best_device(), used)
        write_json(chosen.json, {"rows": rows, "provenance": made_by | {"seeds": chosen.seeds[:number]}})


if __name__ == "__main__":
    main()
