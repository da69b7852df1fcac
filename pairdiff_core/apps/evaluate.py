"""``pairdiff evaluate``: a registration method on held-out pairs, case by case."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pairdiff_core.apps.lines import show
from pairdiff_core.apps.options import (
    DataFolder,
    DatasetName,
    Levels,
    NetworkName,
    ProfileName,
    RunOrModel,
    Seed,
    Steps,
    chosen_profile,
    refuse,
)
from pairdiff_core.apps.register import check_outputs
from pairdiff_core.errors import DataError
from pairdiff_core.profiles import DATASETS, SPLITS, with_levels

SHOWN = {"tre_mm": "TRE {:.2f} mm", "dice": "Dice {:.3f}", "folding_percent": "folding {:.3f} %", "seconds": "{:.1f} s"}

Method = Literal["before", "baseline", "network", "network+instance"]


def evaluate(
    dataset: Annotated[DatasetName, typer.Option(help="Whose pairs.")],
    split: Annotated[Literal[SPLITS[1:]], typer.Option(help="test: official cases of lung250m.")] = "validation",
    cases: Annotated[str | None, typer.Option(help="Only these cases of lung250m, such as 008,054.")] = None,
    data: DataFolder = None,
    run: RunOrModel = None,
    method: Annotated[Method | None, typer.Option(help="Default: network+instance with --run, else baseline.")] = None,
    network: NetworkName = None,
    levels: Levels = None,
    steps: Steps = None,
    profile: Annotated[ProfileName | None, typer.Option(help="Default: the run's, PAIRDIFF_PROFILE or laptop.")] = None,
    seed: Seed = None,
    json: Annotated[Path | None, typer.Option(help="File to write cases and summary to.")] = None,
) -> None:
    """Measure a registration method on held-out pairs of a data set: landmark error, Dice, regularity, time.

    Example: pairdiff evaluate --dataset phantom3d --profile quick
    """
    method = method or ("network+instance" if run else "baseline")
    if method.startswith("network") and run is None:
        raise typer.BadParameter(f"{method} needs a trained network: give --run", param_hint="--method")
    if run is None:
        refuse("names a network of a run: give --run, too", network=network)
    check_outputs({"--json": json})

    from tqdm import tqdm

    from pairdiff_core import registration
    from pairdiff_core.apps.registrars import chosen_registrar, opened
    from pairdiff_core.data import load_pairs
    from pairdiff_core.storage import fingerprint, provenance, write_json
    from pairdiff_core.training import best_device

    own = opened(run)
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
    for case in (bar := tqdm(registration.evaluate(pairs, registrar), total=len(pairs), disable=None)):
        measured.append(case)
        texts = [text.format(case[key]) for key, text in SHOWN.items() if case.get(key) is not None]
        bar.write("  ".join([case["name"], *texts]), file=sys.stdout)
    row = registration.summarise(measured, pairs.label_names)
    del row["cases"]
    show(row)
    if json is not None:
        write_json(json, {"summary": row, "cases": measured, "provenance": made_by})
        typer.echo(f"written to {json}")
