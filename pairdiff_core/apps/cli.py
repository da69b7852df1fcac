"""The command ``pairdiff``: what the library does to files, without writing Python.

Exit codes: 0 good; 1 failed, with one line on stderr that says what is wrong, where, and what to do; 2 wrong use.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel as nib
import torch
import typer
from tqdm import tqdm
from typer.core import TyperGroup

from pairdiff_core import pipeline, registration
from pairdiff_core.apps.export import export_pairs
from pairdiff_core.apps.volume_files import FORMATS, SUFFIXES, VolumePair, read_pair, write_field, write_nifti
from pairdiff_core.data import DATASETS, SPLITS, fetch, grid_affine, load_pairs, lung250m, oasis
from pairdiff_core.errors import DataError, PairDiffError
from pairdiff_core.metrics import mean_dice
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline import Run, open_run
from pairdiff_core.profiles import PROFILES, STAGES, Profile, get_profile, to_json, with_levels
from pairdiff_core.storage import Saving, fingerprint, provenance, write_json
from pairdiff_core.training import Paused, best_device, distributed, fast_in_bfloat16, pausing

DatasetName = Literal[tuple(DATASETS)]
Method = Literal["before", "baseline", "network", "network+instance"]
ProfileName = Literal[tuple(PROFILES[2])]

DataFolder = Annotated[Path | None, typer.Option(help="Folder of the real data; default: the environment variables.")]
Levels = Annotated[int | None, typer.Option(min=1, help="Only the first levels of the optimisation: faster, coarser.")]
NetworkName = Annotated[str | None, typer.Option(help="Which network of the run; default: synthetic.")]
RunOrModel = Annotated[str | None, typer.Option(help="Run folder, or pretrained model such as oasis2d-laptop.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Of everything random.")]
Steps = Annotated[int | None, typer.Option(min=0, help="At each level of the optimisation; 0 for none.")]

SHOWN = {"tre_mm": "TRE {:.2f} mm", "dice": "Dice {:.3f}", "folding_percent": "folding {:.3f} %", "seconds": "{:.1f} s"}
LESS_MEMORY = (
    "memory ran out. Choose a smaller profile (--profile quick), coarser or cropped volumes, or no network; to train "
    "at this profile, lower the stage's batch in pairdiff_core/profiles.py."
)


class Commands(TyperGroup):
    """Commands that report an expected error in one line and end with 1, whichever of them it happens in."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (PairDiffError, FloatingPointError) as error:
            message = str(error)
        except KeyboardInterrupt:
            message = "interrupted"
        except (MemoryError, RuntimeError) as error:  # torch has a class for a full GPU, but none for a full machine
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            message = LESS_MEMORY
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message = f"{where}{error.strerror or error}. Look whether it is there, readable and not full."
        typer.echo(f"pairdiff: {' '.join(message.split())}", err=True)
        raise typer.Exit(1)


summary = "Synthetic pairs of medical images by discrete diffusion, and deformable registration trained on them."
plain = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
app = typer.Typer(cls=Commands, help=summary, no_args_is_help=True, **plain)


@app.command()
def info() -> None:
    """Show versions, devices, profiles, data, pretrained models and free disk space.

    Example: pairdiff info
    """
    device, made_by = best_device(), provenance("", 0, best_device())
    bits = "bfloat16 where a profile allows it" if fast_in_bfloat16(device) else "32 bit throughout"
    runs = Path(os.environ.get("PAIRDIFF_RUNS", "runs"))
    disk = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    versions = ", ".join(f"{name} {version}" for name, version in made_by["versions"].items())
    rows = {
        "versions": f"{versions}, commit {made_by['commit']}",
        "device": f"{device}, {made_by['device']}, {made_by['threads']} threads, {bits}",
        "profiles": f"{', '.join(PROFILES[2])}; chosen: {_or_why_not(lambda: get_profile().name)}",
        "oasis2d": _or_why_not(oasis.find_oasis),
        "lung250m": _or_why_not(lung250m.find_lung250m),
        "models": ", ".join(map(str, pipeline.pretrained_models())) or "none",
        "runs": f"{runs} ({shutil.disk_usage(disk).free / 1e9:.1f} GB free)",
    }
    for name, text in rows.items():
        typer.echo(f"{name:10} {text}")


def _or_why_not(find: Callable[[], Any]) -> str:
    try:
        return str(find())
    except ValueError as error:
        return f"none: {error}"


@app.command("fetch")
def fetch_data(
    dataset: Annotated[Literal["oasis2d", "lung250m"], typer.Argument(help="Which data set.")],
    to: Annotated[Path, typer.Option(help="Folder to put it in; set PAIRDIFF_DATA to it.")] = Path("data"),
) -> None:
    """Download a data set, checked by its hashes; an interrupted download goes on where it stopped.

    Example: pairdiff fetch lung250m --to data
    """
    folder = getattr(fetch, f"fetch_{dataset}")(to, progress=sys.stderr.isatty())
    typer.echo(f"{dataset} is in {folder}; to use it: export PAIRDIFF_DATA={to.absolute()}")


@app.command("run")
def run_stages(
    stage: Annotated[
        Literal[(*STAGES, "all")], typer.Argument(help="The last one, after those before it; all: all, and measure.")
    ],
    dataset: Annotated[DatasetName, typer.Option(help="What to learn from.")],
    # torchrun takes --run for one of its own options
    run: Annotated[Path | None, typer.Option("--run", "--run-folder", help="Default: that of the notebooks.")] = None,
    profile: Annotated[ProfileName | None, typer.Option(help="Default: PAIRDIFF_PROFILE, else quick.")] = None,
    data: DataFolder = None,
    seed: Seed = 0,
    pairs: Annotated[int | None, typer.Option(min=1, help="Synthetic pairs; default: the profile's.")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0, help="Save the progress and end after this time.")] = None,
    save_minutes: Annotated[float, typer.Option(min=0, help="Save the progress this often.")] = 5.0,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: PAIRDIFF_DEVICE, else a GPU or cpu.")
    ] = None,
) -> None:
    """Run the stages of the method up to one of them. Repeated, the command goes on where it stopped.

    Progress is saved after --max-minutes, at Ctrl-C or SIGTERM, and every few minutes against all else. Started by
    torchrun, several processes share the work.

    \b
    Example:
      pairdiff run all --dataset phantom2d --profile quick --run runs/mine
      torchrun --nproc_per_node=2 -m pairdiff_core run all --dataset phantom2d --run-folder runs/two
    """
    if device is not None:
        os.environ["PAIRDIFF_DEVICE"] = device
    settings = _profile(dataset, profile, "quick")
    if pairs is not None:
        settings = replace(settings, synthesis=replace(settings.synthesis, pairs=pairs))
    with pausing(max_minutes) as reason:
        work = Run(dataset, settings, seed, run, data, Saving(save_minutes, reason))
        _ = best_device(), work.train  # a run without its device or data is refused before its folder is made
        try:
            with work.working():
                made = pipeline.run_stages(work, STAGES[-1] if stage == "all" else stage)
                if stage == "all" and distributed.rank() == 0:
                    measured = pipeline.measure(work, made)
                    write_json(work.path / "metrics.json", measured)
                    _show(measured["summary"])
                    typer.echo(f"written to {work.path / 'metrics.json'}")
        except Paused as paused:
            if distributed.rank() == 0:
                typer.echo(f"{paused}. {work.path} keeps the progress; the same command goes on from there.", err=True)
            raise typer.Exit(1 if "came" in (reason() or "") else 0) from None  # a signal, or the time that was given


@app.command()
def register(
    fixed: Annotated[Path, typer.Argument(help="Label or binary volume (NIfTI); one slice is 2D.")],
    moving: Annotated[Path, typer.Argument(help="The volume to bring onto it, on the same grid.")],
    out: Annotated[Path, typer.Option(help="Displacement field to write, .nii.gz or .nii.")],
    run: RunOrModel = None,
    network: NetworkName = None,
    steps: Steps = None,
    levels: Levels = None,
    form: Annotated[Literal[FORMATS], typer.Option("--format", help="itk: mm, LPS; l2r: voxels.")] = "itk",
    warped: Annotated[Path | None, typer.Option(help="Warped moving labels to write, too.")] = None,
) -> None:
    """Register two label volumes of any size and write the displacement field, fixed to moving.

    Example: pairdiff register fixed.nii.gz moving.nii.gz --out field.nii.gz
    """
    _check_outputs({"--out": out, "--warped": warped}, (fixed, moving))
    own, pair = _opened(run, network), read_pair(fixed, moving)
    pairs = pair.pairs(own.profile if own else None)
    profile = with_levels(own.profile if own else get_profile("laptop", pairs.spatial_dims), levels, steps)
    registrar, _ = _registrar(profile, own, network, steps != 0)
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
    typer.echo(f"{out}: Dice {before:.3f} -> {after:.3f}, {seconds:.1f} s")


@app.command()
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
    _check_outputs({"--json": json})
    own = _opened(run, network)
    settings = _profile(dataset, profile, "laptop", own)
    seed = seed if seed is not None else own.seed if own else 0
    registrar, described = None, {}
    if method == "baseline":
        registrar, described = _registrar(with_levels(settings, levels, steps))
    elif method != "before":
        if (own.profile.spatial_dims, own.profile.num_labels) != (settings.spatial_dims, settings.num_labels):
            raise DataError(f"{own.path} knows other axes or labels than {dataset} has. Choose another run or profile.")
        instance = method == "network+instance" and steps != 0
        registrar, described = _registrar(with_levels(own.profile, levels, steps), own, network, instance)
    names = cases.split(",") if cases else None
    pairs = load_pairs(dataset, split, settings, data=data, seed=seed, cases=names)
    made_by = provenance(settings.name, seed, best_device(), {split: fingerprint(pairs.labels)})
    made_by |= {"dataset": dataset, "split": split, "pairs": len(pairs), "method": method, **described}
    measured = []
    for case in (bar := tqdm(pipeline.evaluate(pairs, registrar), total=len(pairs), disable=None)):
        measured.append(case)
        texts = [text.format(case[key]) for key, text in SHOWN.items() if case.get(key) is not None]
        bar.write("  ".join([case["name"], *texts]), file=sys.stdout)
    row = pipeline.summarise(measured, pairs.label_names)
    del row["cases"]
    _show(row)
    if json is not None:
        write_json(json, {"summary": row, "cases": measured, "provenance": made_by})
        typer.echo(f"written to {json}")


@app.command()
def export(
    run: Annotated[str, typer.Option(help="Run folder with synthetic pairs.")],
    to: Annotated[Path, typer.Option(help="Folder to make.")],
) -> None:
    """Write the synthetic pairs of a run as NIfTI with a dataset description in Learn2Reg form.

    Example: pairdiff export --run runs/phantom3d-quick-seed0 --to pairs
    """
    typer.echo(f"{export_pairs(run, to, progress=sys.stderr.isatty())} pairs are in {to}")


def _check_outputs(outputs: dict[str, Path | None], inputs: tuple[Path, ...] = ()) -> None:
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


def _profile(dataset: DatasetName, name: ProfileName | None, default: str, own: Run | None = None) -> Profile:
    """The profile of that name, else the run's if it has the dimensions, else what the environment names."""
    dims = DATASETS[dataset]
    if name is None and own is not None and own.profile.spatial_dims == dims:
        return own.profile
    try:
        return get_profile(name or os.environ.get("PAIRDIFF_PROFILE") or default, dims)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="PAIRDIFF_PROFILE") from error


def _opened(run: str | None, network: str | None) -> Run | None:
    """The run, or pretrained model, that the options name."""
    if run is None and network is not None:
        raise typer.BadParameter(f"{network} is a network of a run: give --run", param_hint="--network")
    return None if run is None else open_run(pipeline.find_model(run))


def _registrar(
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


def _show(numbers: dict[str, Any]) -> None:
    """Numbers, a line each; lists of them are for the file."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            _show({f"{name} {key}": item for key, item in value.items()})
        elif not isinstance(value, list):
            typer.echo(f"{name:26} {'-' if value is None else f'{value:.4g}'}")


def main() -> None:
    """The entry point ``pairdiff``."""
    app(prog_name="pairdiff")
