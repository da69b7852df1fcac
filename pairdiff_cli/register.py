"""``pairdiff register``: register two label volumes and write the displacement field."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from pairdiff_cli.options import Levels, NetworkName, Overwrite, Quiet, Resample, RunOrModel, Steps, refuse
from pairdiff_cli.outputs import check_outputs


def register(
    fixed: Annotated[Path, typer.Argument(help="Label or binary volume; a single slice is 2D.")],
    moving: Annotated[Path, typer.Argument(help="Volume to align with it; see --resample.")],
    out: Annotated[Path, typer.Option(help="Displacement field to write, .nii.gz or .nii.")],
    inverse: Annotated[Path | None, typer.Option(help="Also write the field from moving to fixed.")] = None,
    warped: Annotated[Path | None, typer.Option(help="Also write the warped moving labels.")] = None,
    form: Annotated[Literal["itk", "l2r"], typer.Option("--format", help="itk: mm, LPS; l2r: voxels.")] = "itk",
    run: RunOrModel = None,
    network: NetworkName = None,
    steps: Steps = None,
    levels: Levels = None,
    resample: Resample = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Register two label volumes of any size and write the displacement field, fixed to moving.

    Example: pairdiff register fixed.nii.gz moving.nii.gz --out field.nii.gz
    """
    if run is None:
        refuse("names a network of a run: also give --run", network=network)
    outputs = {"--out": out, "--inverse": inverse, "--warped": warped}
    check_outputs(outputs, {"FIXED": fixed, "MOVING": moving}, overwrite)

    import monai.networks.layers  # noqa: F401 - here, so that the clock below does not time its import
    import numpy as np

    from pairdiff_cli.cost import bars, note_cost
    from pairdiff_cli.registrars import chosen_registrar, note_differences, opened
    from pairdiff_cli.volume_files import read_pair, write_field, write_nifti
    from pairdiff_core.profiles import get_profile, with_levels

    own, pair = opened(run), read_pair(fixed, moving, resample)
    pairs = pair.pairs(own.profile, own.description.label_values) if own else pair.pairs()
    profile = with_levels(own.profile if own else get_profile("laptop", pairs.spatial_dims), levels, steps)
    registrar, _ = chosen_registrar(profile, own, network, steps != 0, iter if quiet else bars())
    if not quiet:
        for note in [*pair.notes, *(pair.merged_by(own.profile) if own else [])]:
            typer.echo(f"note: {note}", err=True)
        if own:
            note_differences(pair, pairs, own)
        if form == "itk" and pair.grids[0].tilted:
            typer.echo(
                f"note: {fixed} is not an axial slice, and a 2D image of ITK cannot hold the position of such a slice. "
                "The field follows the slice's own axes. To warp an image with ITK, give it the direction (1, 0, 0, 1)"
                + (f" and resample it to the grid of {fixed}." if not np.allclose(pair.to_moving, np.eye(4)) else "."),
                err=True,
            )
        note_cost(pairs, profile, own is not None)
    started = time.perf_counter()
    found = registrar(pairs)
    seconds, displacement = time.perf_counter() - started, found.displacement[0]
    write_field(out, pair, displacement, form)
    if inverse is not None:
        write_field(inverse, pair, found.inverse[0], form, inverse=True)
    if warped is not None:
        write_nifti(warped, pair.warped_moving(displacement), pair.affine, header=pair.grids[0].header)
    before, after, warnings = pair.judged(displacement)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{out}: Dice {before:.3f} -> {after:.3f}, {seconds:.1f} s")
