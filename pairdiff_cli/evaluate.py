"""``pairdiff evaluate``: measure a registration method on held-out pairs, case by case, or on one pair of files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pairdiff_cli.lines import show
from pairdiff_cli.options import (
    DataFolder,
    DatasetName,
    Levels,
    NetworkName,
    Overwrite,
    ProfileName,
    Quiet,
    Resample,
    RunOrModel,
    Seed,
    Steps,
    chosen_profile,
    refuse,
)
from pairdiff_cli.outputs import check_outputs
from pairdiff_core.errors import DataError
from pairdiff_core.profiles import DATASETS, SPLITS, get_profile, with_levels

SHOWN = {"tre_mm": "TRE {:.2f} mm", "dice": "Dice {:.3f}", "folding_percent": "folding {:.3f} %", "seconds": "{:.1f} s"}

Method = Literal["before", "baseline", "network", "network+instance"]


def evaluate(
    dataset: Annotated[DatasetName | None, typer.Option(help="Data set to measure on; or give --pair.")] = None,
    split: Annotated[
        Literal[SPLITS[1:]] | None, typer.Option(help="Default: validation. test: official test cases of lung250m.")
    ] = None,
    cases: Annotated[str | None, typer.Option(help="Only these cases of lung250m, such as 008,054.")] = None,
    data: DataFolder = None,
    pair: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Instead of a data set: a fixed and a moving label volume.")
    ] = None,
    landmarks: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="With --pair: CSV files with x,y,z in mm (RAS), fixed and moving, in the same order."),
    ] = None,
    field: Annotated[
        Path | None, typer.Option(help="With --pair: evaluate this displacement field, of register or others.")
    ] = None,
    resample: Resample = False,
    run: RunOrModel = None,
    method: Annotated[
        Method | None, typer.Option(help="Default: network+instance with --run, else baseline, or before with --pair.")
    ] = None,
    network: NetworkName = None,
    levels: Levels = None,
    steps: Steps = None,
    profile: Annotated[ProfileName | None, typer.Option(help="Default: the run's, PAIRDIFF_PROFILE or laptop.")] = None,
    seed: Seed = None,
    json: Annotated[Path | None, typer.Option(help="File for the results of all cases and their summary.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Measure landmark error, Dice, regularity and time of registration, on held-out pairs or on one pair of files.

    \b
    Example:
      pairdiff evaluate --dataset phantom3d --profile quick
      pairdiff evaluate --pair fixed.nii.gz moving.nii.gz --landmarks fixed.csv moving.csv --field field.nii.gz
    """
    if (dataset is None) == (pair is None):
        raise typer.BadParameter("give either --dataset or --pair", param_hint="--dataset")
    if pair is None:
        refuse("needs --pair", landmarks=landmarks, field=field, resample=resample)
    else:
        of_data_sets = {"split": split, "cases": cases, "data": data, "profile": profile, "seed": seed}
        refuse("needs --dataset and cannot be used with --pair", **of_data_sets)
    if field is not None:
        registering = {"run": run, "method": method, "network": network, "levels": levels, "steps": steps}
        refuse("cannot be used with --field, which is evaluated as it is", **registering)
    method = method or ("network+instance" if run else "baseline" if dataset else "before")
    if method.startswith("network") and run is None:
        raise typer.BadParameter(f"{method} needs a trained network: give --run", param_hint="--method")
    if not method.startswith("network"):
        refuse(f"names a network, but {'--run is missing' if run is None else f'{method} uses none'}", network=network)
    if method == "before":
        refuse("needs a method that registers: give --method", levels=levels, steps=steps)
    read = [*(pair or ()), *(landmarks or ()), *([field] if field else [])]
    check_outputs({"--json": json}, {"--pair": pair, "--landmarks": landmarks, "--field": field}, overwrite)

    from tqdm import tqdm

    from pairdiff_cli.cost import note_cost
    from pairdiff_cli.field_files import read_field
    from pairdiff_cli.one_case import as_case, note_outside, score_case
    from pairdiff_cli.registrars import chosen_registrar, note_differences, opened
    from pairdiff_cli.volume_files import read_pair
    from pairdiff_core import registration
    from pairdiff_core.data import load_pairs
    from pairdiff_core.storage import fingerprint, provenance, write_json
    from pairdiff_core.training import best_device

    own = opened(run)
    if own:
        check_outputs({"--json": json}, {"--run": own.path}, overwrite)
    by_network, volumes = own if method.startswith("network") else None, None
    if pair is not None:
        volumes = read_pair(*pair, resample)
        pairs = as_case(volumes, landmarks)
        settings = by_network.profile if by_network else get_profile("laptop", pairs.spatial_dims)
    elif own and profile is None and (own.dataset == dataset or own.profile.spatial_dims == DATASETS.get(dataset)):
        settings = own.profile
    else:
        settings = chosen_profile(dataset, profile, "laptop", data)
    known = own.profile if by_network else settings
    if (known.spatial_dims, known.num_labels) != (settings.spatial_dims, settings.num_labels):
        raise DataError(f"{own.path} has other axes or labels than {dataset}. Choose another run or profile.")
    registrar, about = None, {"method": "field" if field else method}
    if method != "before":
        instance = method == "network+instance" and steps != 0
        levelled = with_levels(known, levels, steps)
        registrar, described = chosen_registrar(levelled, by_network, network, instance)
        about |= described
    seed = seed if seed is not None else own.seed if own else 0
    if volumes is None:
        split = split or "validation"
        pairs = load_pairs(dataset, split, settings, data=data, seed=seed, cases=cases.split(",") if cases else None)
        about |= {"dataset": dataset}
        measuring = registration.evaluate(pairs, registrar)
    else:
        split, about["files"] = "pair", [str(path) for path in read]
        notes = [*volumes.notes, *(volumes.merged_by(settings) if by_network else [])]
        given = read_field(field) if field else None
        notes += note_outside(volumes, pairs, given) if given or registrar else []
        for note in notes if not quiet else ():
            typer.echo(f"note: {note}", err=True)
        if by_network and not quiet:
            note_differences(volumes, pairs, own)
        measuring = (score_case(volumes, pairs, registrar, by_network, given) for _ in range(1))
    if registrar is not None and not quiet:
        note_cost(pairs, with_levels(levelled, steps=0) if method == "network" else levelled, by_network is not None)
    made_by = provenance(settings.name, seed, best_device(), {split: fingerprint(pairs.labels)})
    made_by |= {"split": split, "pairs": len(pairs), **about}
    measured = []
    for case in (bar := tqdm(measuring, total=len(pairs), disable=quiet or None)):
        warnings = case.pop("warnings", ())
        measured.append(case)
        texts = [text.format(case[key]) for key, text in SHOWN.items() if case.get(key) is not None]
        bar.write("  ".join([case["name"], *texts]), file=sys.stdout)
        for warning in warnings:
            bar.write(f"warning: {warning}", file=sys.stderr)
    row = registration.summarise(measured, pairs.label_names)
    del row["cases"]
    show(row)
    if json is not None:
        write_json(json, {"summary": row, "cases": measured, "provenance": made_by})
        typer.echo(f"written to {json}")
