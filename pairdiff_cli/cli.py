"""The command ``pairdiff``: its subcommands, their options, and how they report errors.

Exit codes: 0 is success. 1 is a failure; one line on stderr says what is wrong, where, and what to do. 2 is wrong use.
A subcommand imports its code when it is called, so that help and usage errors appear at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pairdiff_cli.apply import apply
from pairdiff_cli.evaluate import evaluate
from pairdiff_cli.prepare import prepare
from pairdiff_cli.register import register
from pairdiff_cli.run import run
from pairdiff_core.errors import PairDiffError

LESS_MEMORY = {  # advice for each command when memory runs out
    "run": "Choose a smaller profile (--profile quick), or reduce the stage's batch in pairdiff_core/profiles.py.",
    "register": "Use coarser or cropped volumes, or fewer labels.",
    "evaluate": "Choose a smaller profile (--profile quick) or, with --pair, coarser or cropped volumes.",
    "prepare": "Give a coarser --spacing or a smaller --size.",
    "apply": "Use a coarser or cropped grid; for images, choose it with --onto.",
}


class Commands(TyperGroup):
    """A command group that reports expected errors of all its commands in one line and exits with 1."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (PairDiffError, FloatingPointError) as error:
            message = str(error)
        except KeyboardInterrupt:
            message = "interrupted"
        except (MemoryError, RuntimeError) as error:  # torch has a class for a full GPU, but not for full RAM
            full_gpu = type(error).__name__ == "OutOfMemoryError"
            if not isinstance(error, MemoryError) and not full_gpu and "allocate memory" not in str(error):
                raise
            advice = LESS_MEMORY.get(ctx.invoked_subcommand or "", "Close other programs, or use a larger machine.")
            message = f"memory ran out. {advice}"
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message = f"{where}{error.strerror or error}. Check the path, its permissions and free disk space."
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
    from pairdiff_cli.info import describe

    for name, text in describe().items():
        typer.echo(f"{name:10} {text}")


@app.command()
def fetch(
    dataset: Annotated[Literal["oasis2d", "lung250m"], typer.Argument(help="Which data set.")],
    to: Annotated[Path, typer.Option(help="Folder to save it in; set PAIRDIFF_DATA to it.")] = Path("data"),
    motions: Annotated[
        bool, typer.Option("--motions/--no-motions", help="With lung250m: motions of 74 more patients, 22 MB.")
    ] = True,
) -> None:
    """Download a data set and check its hashes. After an interruption, finished files are not downloaded again.

    Example: pairdiff fetch lung250m --to data
    """
    from pairdiff_core.data import fetch as downloads

    options = {"progress": typer.get_text_stream("stderr").isatty()}
    if dataset == "lung250m":
        options["motions"] = motions
    elif not motions:
        raise typer.BadParameter(f"{dataset} has no motions to leave out", param_hint="--no-motions")
    folder = getattr(downloads, f"fetch_{dataset}")(to, **options)
    typer.echo(f"{dataset} is in {folder}; to use it: export PAIRDIFF_DATA={to.absolute()}")


for command in (prepare, run, register, apply, evaluate):  # each has its own file
    app.command()(command)


@app.command()
def export(
    run: Annotated[str, typer.Option(help="Run folder with synthetic pairs.")],
    to: Annotated[Path, typer.Option(help="Folder to create.")],
) -> None:
    """Write the synthetic pairs of a run as NIfTI files, with a dataset description as in Learn2Reg.

    Example: pairdiff export --run runs/phantom3d-quick-seed0 --to pairs
    """
    from pairdiff_cli.export import export_pairs

    typer.echo(f"{export_pairs(run, to, progress=typer.get_text_stream('stderr').isatty())} pairs are in {to}")


def main() -> None:
    """The entry point ``pairdiff``."""
    app(prog_name="pairdiff")
