"""The command ``pairdiff``: its commands, their options, and how they fail.

Exit codes: 0 good; 1 failed, with one line on stderr that says what is wrong, where, and what to do; 2 wrong use.
What a command does is imported when it is called, so that help and wrong use answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pairdiff_core.errors import PairDiffError
from pairdiff_core.profiles import DATASETS, PROFILES, SPLITS, STAGES

DatasetName = Literal[tuple(DATASETS)]
Method = Literal["before", "baseline", "network", "network+instance"]
ProfileName = Literal[tuple(PROFILES[2])]

DataFolder = Annotated[Path | None, typer.Option(help="Folder of the real data; default: the environment variables.")]
Levels = Annotated[int | None, typer.Option(min=1, help="Only the first levels of the optimisation: faster, coarser.")]
NetworkName = Annotated[str | None, typer.Option(help="Which network of the run; default: synthetic.")]
RunOrModel = Annotated[str | None, typer.Option(help="Run folder, or pretrained model such as oasis2d-laptop.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Of everything random.")]
Steps = Annotated[int | None, typer.Option(min=0, help="At each level of the optimisation; 0 for none.")]

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
            full_gpu = type(error).__name__ == "OutOfMemoryError"
            if not isinstance(error, MemoryError) and not full_gpu and "allocate memory" not in str(error):
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
    from pairdiff_core.apps.info import describe

    for name, text in describe().items():
        typer.echo(f"{name:10} {text}")


@app.command()
def fetch(
    dataset: Annotated[Literal["oasis2d", "lung250m"], typer.Argument(help="Which data set.")],
    to: Annotated[Path, typer.Option(help="Folder to put it in; set PAIRDIFF_DATA to it.")] = Path("data"),
) -> None:
    """Download a data set, checked by its hashes; an interrupted download goes on where it stopped.

    Example: pairdiff fetch lung250m --to data
    """
    from pairdiff_core.data import fetch as downloads

    folder = getattr(downloads, f"fetch_{dataset}")(to, progress=typer.get_text_stream("stderr").isatty())
    typer.echo(f"{dataset} is in {folder}; to use it: export PAIRDIFF_DATA={to.absolute()}")


@app.command()
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
) -> None:
    """Run the stages of the method up to one of them. Repeated, the command goes on where it stopped.

    Progress is saved after --max-minutes, at Ctrl-C or SIGTERM, and every few minutes against all else. Started by
    torchrun, several processes share the work.

    \b
    Example:
      pairdiff run all --dataset phantom2d --profile quick --run runs/mine
      torchrun --nproc_per_node=2 -m pairdiff_core run all --dataset phantom2d --run-folder runs/two
    """
    from pairdiff_core.apps.run import run_stages

    run_stages(stage, dataset, run, profile, data, seed, pairs, max_minutes, save_minutes, device)


@app.command()
def register(
    fixed: Annotated[Path, typer.Argument(help="Label or binary volume (NIfTI); one slice is 2D.")],
    moving: Annotated[Path, typer.Argument(help="The volume to bring onto it, on the same grid.")],
    out: Annotated[Path, typer.Option(help="Displacement field to write, .nii.gz or .nii.")],
    run: RunOrModel = None,
    network: NetworkName = None,
    steps: Steps = None,
    levels: Levels = None,
    form: Annotated[Literal["itk", "l2r"], typer.Option("--format", help="itk: mm, LPS; l2r: voxels.")] = "itk",
    warped: Annotated[Path | None, typer.Option(help="Warped moving labels to write, too.")] = None,
) -> None:
    """Register two label volumes of any size and write the displacement field, fixed to moving.

    Example: pairdiff register fixed.nii.gz moving.nii.gz --out field.nii.gz
    """
    from pairdiff_core.apps.register import register_files

    typer.echo(register_files(fixed, moving, out, run, network, steps, levels, form, warped))


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
    from pairdiff_core.apps.evaluate import evaluate_split

    evaluate_split(dataset, split, cases, data, run, method, network, levels, steps, profile, seed, json)


@app.command()
def export(
    run: Annotated[str, typer.Option(help="Run folder with synthetic pairs.")],
    to: Annotated[Path, typer.Option(help="Folder to make.")],
) -> None:
    """Write the synthetic pairs of a run as NIfTI with a dataset description in Learn2Reg form.

    Example: pairdiff export --run runs/phantom3d-quick-seed0 --to pairs
    """
    from pairdiff_core.apps.export import export_pairs

    typer.echo(f"{export_pairs(run, to, progress=typer.get_text_stream('stderr').isatty())} pairs are in {to}")


def main() -> None:
    """The entry point ``pairdiff``."""
    app(prog_name="pairdiff")
