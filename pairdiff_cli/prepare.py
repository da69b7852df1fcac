"""``pairdiff prepare``: check label maps of your own, and write them as a data set to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pairdiff_cli.options import ProfileName, Quiet, named_profile, refuse
from pairdiff_core.profiles import OWN


def prepare(
    fixed: Annotated[Path | None, typer.Argument(help="Folder of fixed label images.")] = None,
    moving: Annotated[
        Path | None, typer.Argument(help="Folder of moving images, paired with the fixed ones by file-name order.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Instead of folders: a CSV file with columns fixed, moving and, if any, split.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to create. Without it, only the report is printed.")] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Images are probabilities, one map per label along the last axis.")
    ] = False,
    names: Annotated[Path | None, typer.Option(help="Text file with a label and its name on each line.")] = None,
    spacing: Annotated[str | None, typer.Option(help="Voxel size in mm, such as 2,2,5. Default: the median.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Voxels of the grid, such as 96,96,32. Default: the largest.")
    ] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Resample moving images on other grids by nearest neighbour.")
    ] = False,
    profile: Annotated[
        ProfileName | None,
        typer.Option(help="Profile whose networks the grid must fit. Default: PAIRDIFF_PROFILE, else quick."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Check pairs of label images, print what was found and what changes, and with --to write them to train on.

    Pairs may differ in grid, orientation and voxel size; the two images of a pair may not, unless --resample is given.
    All are brought to the most common orientation and to one voxel size, and padded or cropped to one grid. Labels are
    numbered from 0. Without a column split, the last fifth of the pairs is held out for validation.

    \b
    Example:
      pairdiff prepare scans/fixed scans/moving
      pairdiff prepare scans/fixed scans/moving --to prepared
      pairdiff run all --dataset own --data prepared
    """
    if csv is None and (fixed is None or moving is None):
        raise typer.BadParameter("give two folders, FIXED and MOVING, or --csv", param_hint="FIXED")
    if csv is not None and fixed is not None:
        refuse("replaces the two folders: give either", csv=csv)
    wanted = numbers(spacing, "--spacing", float), numbers(size, "--size", int)

    from pairdiff_cli.common_grid import read_pairs
    from pairdiff_cli.learn2reg import unused_folder, write_data_set
    from pairdiff_cli.pair_files import in_both_splits, pairs_of_csv, pairs_of_folders, with_splits
    from pairdiff_cli.prepared import fit_together, read_names

    to = to and unused_folder(to)
    files = with_splits(pairs_of_csv(csv) if csv else pairs_of_folders(fixed, moving))
    found = read_pairs(files, probabilities, resample)
    for given, option in zip(wanted, ("--spacing", "--size"), strict=True):
        if given and len(given) != found.spatial_dims:
            raise typer.BadParameter(f"give {found.spatial_dims} numbers for these images", param_hint=option)
    known = read_names(names) if names else {}
    made = fit_together(found, named_profile(profile, "quick", found.spatial_dims), known, *wanted)
    shared = [f"{path} is in pairs of training and in held-out pairs." for path in in_both_splits(files)]
    notes = [*found.notes, *made.notes, *shared]
    typer.echo(made.table)
    for note in notes if not quiet else ():
        typer.echo(f"note: {note}", err=True)
    if to is None:
        typer.echo("nothing was written; --to FOLDER writes the prepared pairs")
        return
    number = write_data_set(to, f"PairDiff-{OWN}", made.pairs, made.described, made.about)
    typer.echo(f"{number} pairs are in {to}; to train: pairdiff run all --dataset {OWN} --data {to}")


def numbers(text: str | None, option: str, kind: type) -> list | None:
    """Numbers above 0 from "2,2,5"; a usage error for anything else."""
    if text is None:
        return None
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < 1e6 for number in found):
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers above 0 with commas between them", param_hint=option
        )
    return found
