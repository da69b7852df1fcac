"""Options that several commands share. This module imports nothing slow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pairdiff_core.profiles import DATASETS, OWN, PROFILES, Profile, get_profile

SUFFIXES = (".nii.gz", ".nii")  # of the volumes that are written

DatasetName = Literal[(*DATASETS, OWN)]
ProfileName = Literal[tuple(PROFILES[2])]

DataFolder = Annotated[
    Path | None, typer.Option(help="Folder of the real data, or of prepare. Default: the environment variables.")
]
Levels = Annotated[int | None, typer.Option(min=1, help="Use only the first levels of optimisation: faster, coarser.")]
NetworkName = Annotated[str | None, typer.Option(help="Which network. Default: real-motion, else synthetic.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only results, warnings and errors: no bars, notes or progress.")]
Resample = Annotated[
    bool, typer.Option("--resample", help="Resample a moving volume on another grid by nearest neighbour.")
]
RunOrModel = Annotated[str | None, typer.Option(help="Run folder, or pretrained model such as oasis2d-laptop.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Seed of all random numbers.")]
Steps = Annotated[int | None, typer.Option(min=0, help="Steps at each level of optimisation; 0 for none.")]


def refuse(why: str, **given: Any) -> None:
    """Raise a usage error for the first of these options that was given; its text is the option, then ``why``."""
    for name, value in given.items():
        if value is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{option} {why}", param_hint=option)


def chosen_profile(dataset: str, name: str | None, default: str, data: Path | None = None) -> Profile:
    """The profile of that name, else the one that PAIRDIFF_PROFILE names, else the default.

    For the data set "own", it has the grid and the labels of the folder ``data``.

    Raises:
        typer.BadParameter: if PAIRDIFF_PROFILE names no profile.
        DataError: for "own", as :func:`pairdiff_core.pipeline.profile_for`.
    """
    if dataset == OWN:
        from pairdiff_core.data import read_own
        from pairdiff_core.pipeline import profile_for

        return profile_for(data, named_profile(name, default, len(read_own(data).spatial)))
    return named_profile(name, default, DATASETS[dataset])


def named_profile(name: str | None, default: str, spatial_dims: int) -> Profile:
    """As :func:`chosen_profile`, for slices or volumes, with the profile's own grid and labels."""
    try:
        return get_profile(name or os.environ.get("PAIRDIFF_PROFILE") or default, spatial_dims)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="PAIRDIFF_PROFILE") from error
