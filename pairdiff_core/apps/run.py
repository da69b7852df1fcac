"""``pairdiff run``: the stages of a run, and its measurement."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from pairdiff_core import pipeline
from pairdiff_core.pipeline import Run
from pairdiff_core.profiles import DATASETS, STAGES, Profile, get_profile
from pairdiff_core.storage import Saving, write_json
from pairdiff_core.training import Paused, best_device, distributed, pausing


def run_stages(
    stage: str,
    dataset: str,
    folder: Path | None,
    profile: str | None,
    data: Path | None,
    seed: int,
    pairs: int | None,
    max_minutes: float | None,
    save_minutes: float,
    device: str | None,
) -> None:
    """Run the stages up to one, or "all" and measure; the arguments are the options of ``pairdiff run``."""
    if device is not None:
        os.environ["PAIRDIFF_DEVICE"] = device
    settings = chosen_profile(dataset, profile, "quick")
    if pairs is not None:
        settings = replace(settings, synthesis=replace(settings.synthesis, pairs=pairs))
    with pausing(max_minutes) as reason:
        run = Run(dataset, settings, seed, folder, data, Saving(save_minutes, reason))
        _ = best_device(), run.train  # a run without its device or data is refused before its folder is made
        try:
            with run.working():
                made = pipeline.run_stages(run, STAGES[-1] if stage == "all" else stage)
                if stage == "all" and distributed.rank() == 0:
                    measured = pipeline.measure(run, made)
                    write_json(run.path / "metrics.json", measured)
                    show(measured["summary"])
                    typer.echo(f"written to {run.path / 'metrics.json'}")
        except Paused as paused:
            if distributed.rank() == 0:
                typer.echo(f"{paused}. {run.path} keeps the progress; the same command goes on from there.", err=True)
            raise typer.Exit(1 if "came" in (reason() or "") else 0) from None  # a signal, or the time that was given


def chosen_profile(dataset: str, name: str | None, default: str) -> Profile:
    """The profile of that name, else the one that PAIRDIFF_PROFILE names, else the default.

    Raises:
        typer.BadParameter: if PAIRDIFF_PROFILE names none.
    """
    try:
        return get_profile(name or os.environ.get("PAIRDIFF_PROFILE") or default, DATASETS[dataset])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="PAIRDIFF_PROFILE") from error


def show(numbers: dict[str, Any]) -> None:
    """Print numbers, a line each; lists of them are for the file."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            show({f"{name} {key}": item for key, item in value.items()})
        elif not isinstance(value, list):
            typer.echo(f"{name:26} {'-' if value is None else f'{value:.4g}'}")
