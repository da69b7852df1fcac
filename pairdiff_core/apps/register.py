"""``pairdiff register``: two label volumes in, a displacement field out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from pairdiff_core.apps.options import SUFFIXES, Levels, NetworkName, Quiet, RunOrModel, Steps, refuse
from pairdiff_core.errors import DataError


def register(
    fixed: Annotated[Path, typer.Argument(help="Label or binary volume (NIfTI); one slice is 2D.")],
    moving: Annotated[Path, typer.Argument(help="The volume to bring onto it, on the same grid.")],
    out: Annotated[Path, typer.Option(help="Displacement field to write, .nii.gz or .nii.")],
    inverse: Annotated[Path | None, typer.Option(help="Field from moving to fixed to write, too.")] = None,
    warped: Annotated[Path | None, typer.Option(help="Warped moving labels to write, too.")] = None,
    form: Annotated[Literal["itk", "l2r"], typer.Option("--format", help="itk: mm, LPS; l2r: voxels.")] = "itk",
    run: RunOrModel = None,
    network: NetworkName = None,
    steps: Steps = None,
    levels: Levels = None,
    quiet: Quiet = False,
) -> None:
    """Register two label volumes of any size and write the displacement field, fixed to moving.

    Example: pairdiff register fixed.nii.gz moving.nii.gz --out field.nii.gz
    """
    if run is None:
        refuse("names a network of a run: give --run, too", network=network)
    check_outputs({"--out": out, "--inverse": inverse, "--warped": warped}, (fixed, moving))

    from pairdiff_core.apps.registrars import chosen_registrar, note_differences, opened
    from pairdiff_core.apps.volume_files import read_pair, write_field, write_nifti
    from pairdiff_core.metrics import mean_dice
    from pairdiff_core.profiles import get_profile, with_levels

    own, pair = opened(run), read_pair(fixed, moving)
    pairs = pair.pairs(own.profile if own else None)
    profile = with_levels(own.profile if own else get_profile("laptop", pairs.spatial_dims), levels, steps)
    registrar, _ = chosen_registrar(profile, own, network, steps != 0)
    if own and not quiet:
        note_differences(pair, pairs, own)
    started = time.perf_counter()
    found = registrar(pairs)
    seconds, displacement = time.perf_counter() - started, found.displacement[0]
    write_field(out, pair, displacement, form)
    if inverse is not None:
        write_field(inverse, pair, found.inverse[0], form)
    if warped is not None:
        write_nifti(warped, pair.warped_moving(displacement), pair.affine)
    images = (pairs.moving, found.warp_labels(pairs.moving))
    before, after = (float(mean_dice(image, pairs.fixed, pairs.num_labels)) for image in images)
    typer.echo(f"{out}: Dice {before:.3f} -> {after:.3f}, {seconds:.1f} s")


def check_outputs(outputs: dict[str, Path | None], inputs: tuple[Path, ...] = ()) -> None:
    """Refuse before any computing what could not be written, or would overwrite what is read."""
    taken = {path.absolute() for path in inputs}
    for option, path in [(option, path) for option, path in outputs.items() if path]:
        if option != "--json" and not path.name.endswith(SUFFIXES):
            raise typer.BadParameter(f"{path} must end in {' or '.join(SUFFIXES)}", param_hint=option)
        if path.absolute() in taken:
            raise typer.BadParameter(f"{path} is named twice; outputs need names of their own", param_hint=option)
        taken.add(path.absolute())
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise DataError(f"{path} cannot be written: it is a folder, or its folder is missing or read-only.")
