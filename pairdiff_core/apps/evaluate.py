"""``pairdiff evaluate``: a registration method on held-out pairs, case by case."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from tqdm import tqdm

from pairdiff_core.apps.register import check_outputs, chosen_registrar, opened
from pairdiff_core.apps.run import chosen_profile, show
from pairdiff_core.data import load_pairs
from pairdiff_core.errors import DataError
from pairdiff_core.profiles import DATASETS, with_levels
from pairdiff_core.registration import evaluate, summarise
from pairdiff_core.storage import fingerprint, provenance, write_json
from pairdiff_core.training import best_device

SHOWN = {"tre_mm": "TRE {:.2f} mm", "dice": "Dice {:.3f}", "folding_percent": "folding {:.3f} %", "seconds": "{:.1f} s"}


def evaluate_split(
    dataset: str,
    split: str,
    cases: str | None,
    data: Path | None,
    run: str | None,
    method: str | None,
    network: str | None,
    levels: int | None,
    steps: int | None,
    profile: str | None,
    seed: int | None,
    json: Path | None,
) -> None:
    """Measure and print; the arguments are the options of ``pairdiff evaluate``."""
    method = method or ("network+instance" if run else "baseline")
    if method.startswith("network") and run is None:
        raise typer.BadParameter(f"{method} needs a trained network: give --run", param_hint="--method")
    check_outputs({"--json": json})
    own = opened(run, network)
    if own and profile is None and own.profile.spatial_dims == DATASETS[dataset]:
        settings = own.profile
    else:
        settings = chosen_profile(dataset, profile, "laptop")
    seed = seed if seed is not None else own.seed if own else 0
    registrar, described = None, {}
    if method == "baseline":
        registrar, described = chosen_registrar(with_levels(settings, levels, steps))
    elif method != "before":
        if (own.profile.spatial_dims, own.profile.num_labels) != (settings.spatial_dims, settings.num_labels):
            raise DataError(f"{own.path} knows other axes or labels than {dataset} has. Choose another run or profile.")
        instance = method == "network+instance" and steps != 0
        registrar, described = chosen_registrar(with_levels(own.profile, levels, steps), own, network, instance)
    names = cases.split(",") if cases else None
    pairs = load_pairs(dataset, split, settings, data=data, seed=seed, cases=names)
    made_by = provenance(settings.name, seed, best_device(), {split: fingerprint(pairs.labels)})
    made_by |= {"dataset": dataset, "split": split, "pairs": len(pairs), "method": method, **described}
    measured = []
    for case in (bar := tqdm(evaluate(pairs, registrar), total=len(pairs), disable=None)):
        measured.append(case)
        texts = [text.format(case[key]) for key, text in SHOWN.items() if case.get(key) is not None]
        bar.write("  ".join([case["name"], *texts]), file=sys.stdout)
    row = summarise(measured, pairs.label_names)
    del row["cases"]
    show(row)
    if json is not None:
        write_json(json, {"summary": row, "cases": measured, "provenance": made_by})
        typer.echo(f"written to {json}")
