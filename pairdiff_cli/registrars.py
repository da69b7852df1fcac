"""How the commands register: with a network of a run, by optimisation, or with both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import nibabel as nib
import numpy as np
import typer

from pairdiff_cli.volume_files import VolumePair
from pairdiff_core import pipeline, registration
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline import Run, open_run
from pairdiff_core.profiles import Profile, to_json


def opened(run: str | None) -> Run | None:
    """The run or pretrained model of this name or folder; None for None."""
    return None if run is None else open_run(pipeline.find_model(run))


def chosen_registrar(
    profile: Profile,
    own: Run | None = None,
    network: str | None = None,
    instance: bool = True,
    watch: registration.Watch = iter,
) -> tuple[Callable[[PairSet], registration.Deformation], dict[str, Any]]:
    """The registration method, with a network of a run or by optimisation alone, and its description for JSON."""
    options, described = {"watch": watch}, {"settings": to_json(profile.registration)}
    if own:
        name = f"registration-{network}" if network else pipeline.default_network(own.path)
        trained = pipeline.load_model(own.path, name)
        options |= {"network": trained.model, "instance": instance, "trained_spacing": _trained_grid(own)[1]}
        described |= {"run": str(own.path), "network": trained.fingerprint}
    return partial(registration.register, profile=profile, **options), described


def _trained_grid(own: Run) -> tuple[Any, list[float]]:
    """Voxel-to-world matrix (4, 4) and voxel size in mm of the grid that the networks of a run were trained on."""
    return own.description.directions, list(own.description.spacing(own.profile.spatial_dims))


def note_differences(pair: VolumePair, pairs: PairSet, own: Run) -> None:
    """Print notes to stderr if a volume differs from the training data, which makes the network less accurate."""
    affine, spacing = _trained_grid(own)
    if not registration.sampling(pairs.spatial, pairs.spacing, own.profile, spacing).as_trained:
        compared, unit = (spacing, pairs.spacing), "mm"
        if np.allclose(*compared, rtol=0.05):  # then the size differs
            compared, unit = (own.profile.spatial, pairs.spatial), "voxels"
        at, here = (" x ".join(f"{number:.3g}" for number in each) for each in compared)
        what = "voxels" if unit == "mm" else "images"
        typer.echo(
            f"note: the network was trained on {what} of {at} {unit}, but these have {here} {unit}, so it may be less "
            "accurate. Compare it with the optimiser alone.",
            err=True,
        )
    axes, expected = ("".join(nib.aff2axcodes(each)) for each in (pair.affine, affine))
    if pairs.spatial_dims == 3 and axes != expected:
        typer.echo(
            f"note: the network was trained on volumes with axes {expected}, but these have {axes}, so it may be less "
            f"accurate. Turn both volumes to {expected}.",
            err=True,
        )
