"""``pairdiff register``: two label volumes in, a displacement field out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import typer

from pairdiff_core import pipeline, registration
from pairdiff_core.apps.volume_files import SUFFIXES, VolumePair, read_pair, write_field, write_nifti
from pairdiff_core.data import grid_affine
from pairdiff_core.errors import DataError
from pairdiff_core.metrics import mean_dice
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline import Run, open_run
from pairdiff_core.profiles import Profile, get_profile, to_json, with_levels


def register_files(
    fixed: Path,
    moving: Path,
    out: Path,
    run: str | None,
    network: str | None,
    steps: int | None,
    levels: int | None,
    form: str,
    warped: Path | None,
) -> str:
    """Register and write; the arguments are the options of ``pairdiff register``. Returns a line with Dice and time."""
    check_outputs({"--out": out, "--warped": warped}, (fixed, moving))
    own, pair = opened(run, network), read_pair(fixed, moving)
    pairs = pair.pairs(own.profile if own else None)
    profile = with_levels(own.profile if own else get_profile("laptop", pairs.spatial_dims), levels, steps)
    registrar, _ = chosen_registrar(profile, own, network, steps != 0)
    if own:
        _note_differences(pair, pairs, own)
    if sys.stderr.isatty():  # volumes of CT take minutes
        typer.echo(f"registering {' x '.join(map(str, pairs.spatial))} voxels, {pairs.num_labels} labels ...", err=True)
    started = time.perf_counter()
    found = registrar(pairs)
    seconds, displacement = time.perf_counter() - started, found.displacement[0]
    write_field(out, pair, displacement, form)
    if warped is not None:
        write_nifti(warped, pair.warped_moving(displacement), pair.affine)
    images = (pairs.moving, found.warp_labels(pairs.moving))
    before, after = (float(mean_dice(image, pairs.fixed, pairs.num_labels)) for image in images)
    return f"{out}: Dice {before:.3f} -> {after:.3f}, {seconds:.1f} s"


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


def opened(run: str | None, network: str | None) -> Run | None:
    """The run, or pretrained model, that the options name."""
    if run is None and network is not None:
        raise typer.BadParameter(f"{network} is a network of a run: give --run", param_hint="--network")
    return None if run is None else open_run(pipeline.find_model(run))


def chosen_registrar(
    profile: Profile, own: Run | None = None, network: str | None = None, instance: bool = True
) -> tuple[Callable[[PairSet], registration.Deformation], dict[str, Any]]:
    """How to register, by a network of a run or by optimisation alone, and its description for JSON."""
    options, described = {}, {"settings": to_json(profile.registration)}
    if own:
        trained = pipeline.load_model(own.path, f"registration-{network or 'synthetic'}")
        options = {"network": trained.model, "instance": instance, "trained_spacing": _trained_grid(own)[1]}
        described |= {"run": str(own.path), "network": trained.fingerprint}
    return partial(registration.register, profile=profile, **options), described


def _trained_grid(own: Run) -> tuple[Any, list[float]]:
    """Voxel-to-world matrix (4, 4) and millimetres a voxel of the grid that the networks of a run were trained on."""
    affine = grid_affine(own.dataset, own.profile.spatial)
    return affine, nib.affines.voxel_sizes(affine)[: own.profile.spatial_dims].tolist()


def _note_differences(pair: VolumePair, pairs: PairSet, own: Run) -> None:
    """Say on stderr where a volume differs from what the network was trained on; it then does less well."""
    affine, spacing = _trained_grid(own)
    if not registration.sampling(pairs.spatial, pairs.spacing, own.profile, spacing).as_trained:
        at, here = (" x ".join(f"{mm:.3g}" for mm in each) for each in (spacing, pairs.spacing))
        typer.echo(f"note: the network was trained at {at} mm; these voxels of {here} mm do not fit that.", err=True)
    axes, expected = ("".join(nib.aff2axcodes(each)) for each in (pair.affine, affine))
    if pairs.spatial_dims == 3 and axes != expected:
        typer.echo(f"note: the network was trained on axes that run to {expected}, these run to {axes}.", err=True)
