"""``pairdiff apply``: apply a displacement field to an image, to labels, or to landmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pairdiff_cli.options import SUFFIXES, Overwrite, Quiet, refuse
from pairdiff_cli.outputs import check_outputs


def apply(
    field: Annotated[Path, typer.Argument(help="Displacement field from fixed to moving, as written by register.")],
    moving: Annotated[Path, typer.Argument(help="Image or labels to warp, or landmarks to move (CSV: x, y, z).")],
    out: Annotated[Path, typer.Option(help="File to write, .nii.gz or .nii; .csv for landmarks.")],
    interpolation: Annotated[
        Literal["linear", "nearest"] | None, typer.Option(help="Default: nearest for labels and integers, else linear.")
    ] = None,
    onto: Annotated[Path | None, typer.Option(help="Image whose grid the result has. Default: the field's.")] = None,
    voxels: Annotated[bool, typer.Option("--voxels", help="Landmarks are in voxels of the field, not mm.")] = False,
    form: Annotated[
        Literal["itk", "l2r"] | None, typer.Option("--format", help="Format of the field. Default: from its shape.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Apply a displacement field to an image, to labels, or to landmarks.

    Images and labels are warped from moving to fixed: the result at voxel x of the fixed grid is moving(x + u(x)), or 0
    if that point is outside the moving image. Landmarks move the other way, from fixed to moving: a landmark p of the
    fixed image becomes p + u(p), the same location in the moving image. Landmarks outside the field are not moved. All
    are in mm (RAS, as SimpleITK reads the image) or, with --voxels, in voxels of the field's grid.

    \b
    Example:
      pairdiff apply field.nii.gz scan.nii.gz --out warped.nii.gz
      pairdiff apply field.nii.gz fixed_points.csv --out points_in_moving.csv
    """
    landmarks = moving.suffix.lower() == ".csv"
    if landmarks:
        refuse("is for images, not for landmarks", interpolation=interpolation, onto=onto)
    else:
        refuse("is for landmarks (.csv)", voxels=voxels)
    inputs = {"FIELD": field, "MOVING": moving, "--onto": onto}
    check_outputs({"--out": out}, inputs, overwrite, (".csv",) if landmarks else SUFFIXES)

    from pairdiff_cli.field_files import move_landmarks, read_field, warp_image

    given = read_field(field, form)
    if landmarks:
        line, notes = move_landmarks(given, moving, out, voxels)
    else:
        line, notes = warp_image(given, moving, out, interpolation, onto)
    for note in notes if not quiet else ():
        typer.echo(f"note: {note}", err=True)
    typer.echo(line)
