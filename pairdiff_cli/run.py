"""``pairdiff run``: the stages of a run, and its measurement."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pairdiff_cli.lines import progress_lines, show
from pairdiff_cli.options import DataFolder, DatasetName, ProfileName, Quiet, Seed, chosen_profile, refuse
from pairdiff_core.profiles import IMAGE_STAGES, STAGES

if TYPE_CHECKING:
    from pairdiff_core.pipeline import Run


def run(
    stage: Annotated[
        Literal[(*STAGES, *IMAGE_STAGES, "all")],
        typer.Argument(
            help="Last stage to run; earlier ones run first if missing. 'all' runs the first five and measures."
        ),
    ],
    dataset: Annotated[DatasetName | None, typer.Option(help="Data set to train on; required without --model.")] = None,
    # torchrun takes --run for one of its own options
    run: Annotated[Path | None, typer.Option("--run", "--run-folder", help="Default: the notebooks' folder.")] = None,
    profile: Annotated[ProfileName | None, typer.Option(help="Default: PAIRDIFF_PROFILE, else quick.")] = None,
    data: DataFolder = None,
    seed: Seed = 0,
    model: Annotated[
        str | None, typer.Option(help="With synthesis: draw pairs from this pretrained model alone, without data.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="With --model: folder to create for the pairs, as NIfTI.")] = None,
    given: Annotated[
        Path | None, typer.Option(help="With --model: a label volume that is the fixed image of all pairs.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Number of synthetic pairs. Default: the profile's.")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0, help="Save progress and stop after this time.")] = None,
    save_minutes: Annotated[float, typer.Option(min=0, help="Save the progress this often.")] = 5.0,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: PAIRDIFF_DEVICE, else a GPU if there is one.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run the stages of the method, or of diffusion on images, up to one. The same command continues a paused run.

    Progress is saved after --max-minutes, on Ctrl-C or SIGTERM, and every few minutes in case of a crash. If torchrun
    starts several processes, they share the work.

    \b
    Example:
      pairdiff run all --dataset phantom2d --profile quick --run runs/mine
      pairdiff run rectified_flow --dataset phantom2d
      pairdiff run synthesis --model oasis2d-laptop --pairs 4 --to pairs
      pairdiff run synthesis --model lung250m-laptop --given fixed.nii.gz --pairs 6 --to partners
      torchrun --nproc_per_node=2 -m pairdiff_core run all --dataset phantom2d --run-folder runs/two
    """
    if model is not None or to is not None or given is not None:
        own = {"dataset": dataset, "run": run, "profile": profile, "data": data, "max_minutes": max_minutes}
        refuse("cannot be used with --model and --to, which need only --pairs, --seed and --given", **own)
        if stage != "synthesis" or model is None or to is None:
            use = "pairdiff run synthesis --model oasis2d-laptop --to pairs"
            raise typer.BadParameter(f"--model and --to need each other and synthesis: {use}", param_hint="--model")
    elif dataset is None:
        raise typer.BadParameter("give --dataset or, for synthesis, --model", param_hint="--dataset")
    else:
        settings = chosen_profile(dataset, profile, "quick", data)
    if device is not None:
        os.environ["PAIRDIFF_DEVICE"] = device
    if model is not None:
        from pairdiff_cli.export import make_pairs

        progress = not quiet and typer.get_text_stream("stderr").isatty()
        typer.echo(f"{make_pairs(model, to, pairs, seed, given, progress=progress)} pairs are in {to}")
        return
    if pairs is not None:
        settings = replace(settings, synthesis=replace(settings.synthesis, pairs=pairs))

    from pairdiff_core import pipeline
    from pairdiff_core.storage import Saving
    from pairdiff_core.training import Paused, best_device, distributed, pausing

    with pausing(max_minutes) as reason:
        work = pipeline.Run(dataset, settings, seed, run, data, Saving(save_minutes, reason))
        best_device()  # a run without its device or data is refused before its folder is made
        measured = pipeline.read_measured(work) if stage == "all" else None
        if measured and not quiet and distributed.rank() == 0:
            typer.echo(f"{work.path} is already complete; nothing to do")
        if stage in IMAGE_STAGES:
            pipeline.new_kl_autoencoder(settings)  # refused for volumes
        first = IMAGE_STAGES[0] if stage in IMAGE_STAGES else STAGES[0]
        if measured is None and not pipeline.chosen_model(dataset, settings, first):
            _ = work.train
        try:
            with progress_lines(quiet):
                measured = measured or _worked(work, stage)
        except Paused as paused:
            if distributed.rank() == 0:
                typer.echo(
                    f"{paused}. The progress is saved in {work.path}: run the same command again to continue.", err=True
                )
            raise typer.Exit(1 if "came" in (reason() or "") else 0) from None  # a signal, or the time that was given
    if measured is not None and distributed.rank() == 0:
        show(measured["summary"])
        typer.echo(f"written to {work.path / 'metrics.json'}")


def _worked(work: Run, stage: str) -> dict[str, Any] | None:
    """Run the stages up to one, or all stages and the measurement, whose result the first process returns."""
    from pairdiff_core import pipeline
    from pairdiff_core.training import distributed

    with work.working():
        if stage in IMAGE_STAGES:
            pipeline.run_image_stages(work, stage)
            return None
        made = pipeline.run_stages(work, STAGES[-1] if stage == "all" else stage)
        if stage != "all" or distributed.rank():
            return None
        measured = pipeline.measure(work, made)
        pipeline.keep_measured(work, measured)
        return measured
