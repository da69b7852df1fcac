"""``pairdiff run``: the stages of a run, and its measurement."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from pairdiff_core.apps.lines import progress_lines, show
from pairdiff_core.apps.options import DataFolder, DatasetName, ProfileName, Quiet, Seed, chosen_profile
from pairdiff_core.profiles import STAGES


def run(
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
    quiet: Quiet = False,
) -> None:
    """Run the stages of the method up to one of them. Repeated, the command goes on where it stopped.

    Progress is saved after --max-minutes, at Ctrl-C or SIGTERM, and every few minutes against all else. Started by
    torchrun, several processes share the work.

    \b
    Example:
      pairdiff run all --dataset phantom2d --profile quick --run runs/mine
      torchrun --nproc_per_node=2 -m pairdiff_core run all --dataset phantom2d --run-folder runs/two
    """
    settings = chosen_profile(dataset, profile, "quick")
    if pairs is not None:
        settings = replace(settings, synthesis=replace(settings.synthesis, pairs=pairs))
    if device is not None:
        os.environ["PAIRDIFF_DEVICE"] = device

    from pairdiff_core import pipeline
    from pairdiff_core.storage import Saving, write_json
    from pairdiff_core.training import Paused, best_device, distributed, pausing

    with pausing(max_minutes) as reason:
        work = pipeline.Run(dataset, settings, seed, run, data, Saving(save_minutes, reason))
        _ = best_device(), work.train  # a run without its device or data is refused before its folder is made
        try:
            with work.working(), progress_lines(quiet):
                made = pipeline.run_stages(work, STAGES[-1] if stage == "all" else stage)
                measured = pipeline.measure(work, made) if stage == "all" and distributed.rank() == 0 else None
        except Paused as paused:
            if distributed.rank() == 0:
                typer.echo(f"{paused}. {work.path} keeps the progress; the same command goes on from there.", err=True)
            raise typer.Exit(1 if "came" in (reason() or "") else 0) from None  # a signal, or the time that was given
        if measured is not None:
            write_json(work.path / "metrics.json", measured)
            show(measured["summary"])
            typer.echo(f"written to {work.path / 'metrics.json'}")
