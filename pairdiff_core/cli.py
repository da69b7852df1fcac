"""The command ``pairdiff``: what the library does to files, without writing Python.

Exit codes: 0 good; 1 failed, with one line on stderr that says what is wrong, where, and what to do; 2 wrong use.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from typer.core import TyperGroup

from pairdiff_core import evaluation, pipeline, processes, provided, volume_registration, volumes
from pairdiff_core.checkpoints import CheckpointError, provenance
from pairdiff_core.data import DATASETS, fetch
from pairdiff_core.data.lung250m import find_lung250m
from pairdiff_core.data.oasis import find_oasis
from pairdiff_core.export import export_pairs
from pairdiff_core.metrics import mean_dice
from pairdiff_core.pairs import DataError
from pairdiff_core.profiles import PROFILES, Profile, get_profile
from pairdiff_core.results import measure, write_results
from pairdiff_core.resume import Paused, pausing
from pairdiff_core.runs import Run, open_run
from pairdiff_core.training import best_device, fast_in_bfloat16

StageName = StrEnum("StageName", [(name, name) for name in ("all", *pipeline.STAGES, "evaluate")])
DeviceName = StrEnum("DeviceName", ["cpu", "cuda"])
DatasetName = StrEnum("DatasetName", list(DATASETS))
ProfileName = StrEnum("ProfileName", list(PROFILES[2]))
FormatName = StrEnum("FormatName", list(volumes.FORMATS))
Method = StrEnum("Method", [(name, name) for name in evaluation.METHODS])
Download = StrEnum("Download", ["oasis2d", "lung250m"])


class Commands(TyperGroup):
    """Commands that tell an expected error in one line and end with 1, whichever of them it happens in."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (DataError, CheckpointError, fetch.FetchError) as error:
            _fail(str(error))
        except MemoryError:
            _fail(f"memory ran out. {LESS_MEMORY}")
        except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU there is no name for it
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            _fail(f"memory ran out. {LESS_MEMORY}")
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}. Look whether it is there, readable and not full.")


LESS_MEMORY = (
    "Take a smaller profile (--profile quick), coarser or cropped volumes, or no network; to train at this profile, "
    "lower the stage's batch in pairdiff_core/profiles.py."
)


def _fail(message: str) -> None:
    """Say in one line on stderr what went wrong, and end with 1."""
    typer.echo(f"pairdiff: {' '.join(message.split())}", err=True)
    raise typer.Exit(1)


app = typer.Typer(
    cls=Commands,
    help="New pairs of medical images by discrete diffusion, and deformable registration trained on them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


# -------------------------------------------------------------------------------------------------- info


@app.command()
def info() -> None:
    """Show versions, devices, profiles, data, provided models and free disk space.

    \b
    Example:
      pairdiff info
    """
    made_by = provenance("", 0, best_device())
    versions = ", ".join(f"{name} {version}" for name, version in made_by["versions"].items())
    folder = Path(os.environ.get("PAIRDIFF_RUNS", "runs"))
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        chosen = get_profile().name
    except ValueError as error:
        chosen = f"none: {error}"
    bits = "bfloat16 where a profile allows it" if fast_in_bfloat16(best_device()) else "32 bit throughout"
    rows = {
        "versions": f"{versions}, commit {made_by['commit']}",
        "device": f"{best_device()}, {made_by['device']}, {made_by['threads']} threads, {bits}",
        "profiles": f"{', '.join(PROFILES[2])}; chosen: {chosen}",
        "oasis2d": _where(find_oasis),
        "lung250m": _where(find_lung250m),
        "models": ", ".join(map(str, provided.folders())) or "none",
        "runs": f"{folder} ({shutil.disk_usage(there).free / 1e9:.1f} GB free)",
    }
    for name, text in rows.items():
        typer.echo(f"{name:10} {text}")


def _where(find: Any) -> str:
    """The folder that a data set is found in, or why it is not."""
    try:
        return str(find())
    except DataError as error:
        return f"not found: {error}"


# ------------------------------------------------------------------------------------------------- fetch


@app.command("fetch")
def fetch_data(
    dataset: Annotated[Download, typer.Argument(help="Which data set.")],
    to: Annotated[Path, typer.Option(help="Folder to put it in; set PAIRDIFF_DATA to it.")] = Path("data"),
) -> None:
    """Download a data set, checked by its hashes; an interrupted download goes on where it stopped.

    \b
    Example:
      pairdiff fetch lung250m --to data
    """
    download = {"oasis2d": fetch.fetch_oasis2d, "lung250m": fetch.fetch_lung250m}[dataset.value]
    folder = download(to, progress=sys.stderr.isatty())
    typer.echo(f"{dataset.value} is in {folder}; to use it: export PAIRDIFF_DATA={to.absolute()}")


# --------------------------------------------------------------------------------------------------- run


@app.command("run")
def run_stages(
    stage: Annotated[StageName, typer.Argument(help="The last one; what is missing before it is made, too.")],
    dataset: Annotated[DatasetName, typer.Option(help="What to learn from.")],
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            "--run-folder",  # torchrun takes --run for one of its own options
            help="Run folder, made if it is not there; default: the one that the notebooks use.",
        ),
    ] = None,
    profile: Annotated[
        ProfileName | None, typer.Option(help="How large; default: PAIRDIFF_PROFILE, else quick.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the real data; default: the environment variables.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="New pairs to make; default: the profile's.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Keep what is done and end after so many.")
    ] = None,
    save_minutes: Annotated[float, typer.Option(min=0, help="Keep what is done every so many.")] = 5.0,
    device: Annotated[
        DeviceName | None, typer.Option(help="Default: PAIRDIFF_DEVICE, else a GPU if there is one.")
    ] = None,
) -> None:
    """Run the stages of the method up to one of them. Repeated, the command goes on where it stopped.

    What was reached is kept after --max-minutes, Ctrl-C or SIGTERM, and every few minutes against all else. Started by
    torchrun, several processes share the work.

    \b
    Example:
      pairdiff run all --dataset phantom2d --profile quick --run runs/mine
      torchrun --nproc_per_node=2 -m pairdiff_core run all --dataset phantom2d --run-folder runs/two
    """
    if device is not None:
        os.environ["PAIRDIFF_DEVICE"] = device.value
    try:
        best_device()
    except ValueError as error:
        _fail(str(error))
    numbers = _profile(dataset.value, profile, default="quick")
    if pairs is not None:
        numbers = replace(numbers, synthesis=replace(numbers.synthesis, pairs=pairs))
    with pausing(max_minutes) as reason:
        work = Run(dataset.value, numbers, seed, run, data, save_minutes, reason)
        try:
            with work.working():
                _run(work, stage.value)
        except FloatingPointError as error:
            _fail(str(error))
        except Paused as paused:
            if processes.rank() == 0:
                typer.echo(
                    f"{paused}. {work.path} keeps what is done; the same command goes on from there.",
                    err=True,
                )
            raise typer.Exit(
                1 if "came" in (reason() or "") else 0
            ) from None  # a signal, or the time that was given


def _run(work: Run, stage: str) -> None:
    made = pipeline.make(work, stage if stage in pipeline.STAGES else pipeline.STAGES[-1])
    if stage in ("all", "evaluate") and processes.rank() == 0:
        measured = measure(work, made)
        write_results(work.path / "metrics.json", measured)
        for name, value in measured["summary"].items():
            typer.echo(f"{name:26} {'-' if value is None else f'{value:.4g}'}")
        typer.echo(f"written to {work.path / 'metrics.json'}")


# ---------------------------------------------------------------------------------------------- register


@app.command()
def register(
    fixed: Annotated[Path, typer.Argument(help="Label or binary volume (NIfTI); one slice is 2D.")],
    moving: Annotated[Path, typer.Argument(help="The volume to bring onto it, on the same grid.")],
    out: Annotated[Path, typer.Option(help="Displacement field to write, .nii.gz or .nii.")],
    run: Annotated[
        str | None, typer.Option(help="Run folder, or provided model such as oasis2d-laptop.")
    ] = None,
    network: Annotated[str, typer.Option(help="Which network of the run.")] = "synthetic",
    steps: Annotated[
        int | None,
        typer.Option(min=0, help="At each level of the optimisation; with --run, 0: network alone."),
    ] = None,
    levels: Annotated[
        int | None,
        typer.Option(min=1, help="Of the optimisation, the first so many: faster, and coarser."),
    ] = None,
    form: Annotated[
        FormatName, typer.Option("--format", help="itk: mm, LPS; l2r: voxels, Learn2Reg.")
    ] = FormatName.itk,
    warped: Annotated[Path | None, typer.Option(help="Warped moving labels to write, too.")] = None,
) -> None:
    """Register two label volumes of any size and write the displacement field, fixed to moving.

    \b
    Example:
      pairdiff register fixed.nii.gz moving.nii.gz --out field.nii.gz --warped warped.nii.gz
    """
    _check_outputs({"--out": out, "--warped": warped}, (fixed, moving))
    trained = None if run is None else volume_registration.load_trained(run, network)
    pair = volumes.read_pair(fixed, moving)
    labels, num_labels = pair.labels, len(pair.values)
    if trained is not None:
        labels, num_labels = volume_registration.network_labels(pair, trained), trained.profile.num_labels
        for difference in volume_registration.differences(pair, trained):
            typer.echo(f"note: {difference}", err=True)
    if sys.stderr.isatty():  # volumes of CT take minutes
        size = " x ".join(map(str, pair.spatial))
        typer.echo(f"registering {size} voxels, {num_labels} labels ...", err=True)
    started = time.perf_counter()
    if trained is None:
        profile = volume_registration.with_levels(get_profile("laptop", len(pair.spatial)), levels, steps)
        found = volume_registration.register_without_training(labels, num_labels, profile)
    else:
        chosen = volume_registration.with_levels(trained.profile, levels, steps)
        instance = () if steps == 0 else chosen.registration.instance
        found = volume_registration.register_by_network(labels, pair.spacing, trained, instance)
    seconds, displacement = time.perf_counter() - started, found.displacement[0]
    volumes.write_field(out, pair, displacement, form.value)
    if warped is not None:
        volumes.write_nifti(warped, volumes.warp_moving(pair, displacement), pair.affine)
    before, after = (
        float(mean_dice(image[None], labels[:1], num_labels))
        for image in (labels[1], volumes.warp_labels(labels[1:], found.displacement)[0])
    )
    typer.echo(f"{out}: Dice {before:.3f} -> {after:.3f}, {seconds:.1f} s")


def _check_outputs(outputs: dict[str, Path | None], inputs: tuple[Path, ...] = ()) -> None:
    """Refuse before any computing what could not be written, or would overwrite what is read."""
    taken = {path.absolute() for path in inputs}
    for option, path in outputs.items():
        if path is None:
            continue
        if option != "--json" and not path.name.endswith(volumes.SUFFIXES):
            raise typer.BadParameter(f"{path} must end in {' or '.join(volumes.SUFFIXES)}", param_hint=option)
        if path.absolute() in taken:
            raise typer.BadParameter(
                f"{path} is named twice; outputs need names of their own", param_hint=option
            )
        taken.add(path.absolute())
        volumes.check_writable(path)


# ---------------------------------------------------------------------------------------------- evaluate


@app.command()
def evaluate(
    dataset: Annotated[DatasetName, typer.Option(help="Whose test pairs.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the real data; default: the environment variables.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Run folder, or name of a provided model.")] = None,
    method: Annotated[
        Method | None, typer.Option(help="Default: network+instance with --run, else baseline.")
    ] = None,
    network: Annotated[
        str, typer.Option(help="Which network of the run, as real or synthetic.")
    ] = "synthetic",
    levels: Annotated[
        int | None,
        typer.Option(min=1, help="Of the optimisation, the first so many: faster, and coarser."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="At each level of the optimisation.")] = None,
    profile: Annotated[
        ProfileName | None, typer.Option(help="Default: the run's, else PAIRDIFF_PROFILE, else laptop.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: the run's, else 0.")] = None,
    json: Annotated[Path | None, typer.Option(help="File to write cases and summary to.")] = None,
) -> None:
    """Measure a registration method on the test pairs of a data set: landmark error, Dice, regularity, time.

    \b
    Example:
      pairdiff evaluate --dataset phantom3d --profile quick --method baseline
    """
    chosen = (method or (Method["network+instance"] if run else Method.baseline)).value
    if chosen != "baseline" and run is None:
        raise typer.BadParameter(f"{chosen} needs a trained network: give --run", param_hint="--method")
    _check_outputs({"--json": json})
    own = None if run is None else open_run(provided.find(run))
    trained = None if chosen == "baseline" else volume_registration.load_trained(run, network)
    measured = Run(
        dataset.value,
        volume_registration.with_levels(_profile(dataset.value, profile, own), levels, steps),
        seed if seed is not None else own.seed if own else 0,
        data=data,
    )
    if trained is not None:
        evaluation.check_network(measured, trained)
    cases = []
    bar = tqdm(evaluation.evaluate(measured, chosen, trained), total=len(measured.test), disable=None)
    for case in bar:
        cases.append(case)
        bar.write(_line(case), file=sys.stdout)
    summary = evaluation.summarise(cases)
    for name, value in summary.items():
        typer.echo(f"{name:20} {'-' if value is None else f'{value:.4g}'}")
    if json is not None:
        described = evaluation.describe(measured, chosen, trained)
        write_results(json, {"summary": summary, "cases": cases, "provenance": described})
        typer.echo(f"written to {json}")


def _profile(
    dataset: str, name: ProfileName | None, own: Run | None = None, default: str = "laptop"
) -> Profile:
    """The profile of that name, else the run's if it has the dimensions, else what the environment names."""
    dims = DATASETS[dataset]
    if name is None and own is not None and DATASETS[own.dataset] == dims:
        return own.profile
    try:
        return get_profile(name.value if name else os.environ.get("PAIRDIFF_PROFILE") or default, dims)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="PAIRDIFF_PROFILE") from error


def _line(case: dict[str, Any]) -> str:
    """A case in one line."""
    parts = [case["name"]]
    if "tre" in case:
        parts.append(f"TRE {case['tre_before']:.2f} -> {case['tre']:.2f} mm")
    if case["dice"] is not None:
        parts.append(f"Dice {case['dice_before']:.3f} -> {case['dice']:.3f}")
    return "  ".join([*parts, f"folding {case['folding_percent']:.3f} %", f"{case['seconds']:.1f} s"])


# ------------------------------------------------------------------------------------------------ export


@app.command()
def export(
    run: Annotated[str, typer.Option(help="Run folder with synthetic pairs.")],
    to: Annotated[Path, typer.Option(help="Folder to make.")],
) -> None:
    """Write the synthetic pairs of a run as NIfTI with a dataset description in Learn2Reg form.

    \b
    Example:
      pairdiff export --run runs/phantom3d-quick-seed0 --to pairs
    """
    folder = export_pairs(run, to, progress=sys.stderr.isatty())
    typer.echo(f"{len(list(folder.glob('imagesTr/*'))) // 2} pairs are in {folder}")


def main() -> None:
    """The entry point ``pairdiff``."""
    app(prog_name="pairdiff")


if __name__ == "__main__":
    main()
