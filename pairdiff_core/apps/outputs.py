"""What a command is about to write: refused before any computing where it cannot be, or would destroy a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from pairdiff_core.apps.options import SUFFIXES
from pairdiff_core.errors import DataError

ENDINGS = {"--json": (".json", "")}  # of other outputs than images; "" is any


def check_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Sequence[Path] = (),
    overwrite: bool = False,
    suffixes: Sequence[str] = SUFFIXES,
) -> None:
    """Refuse outputs that cannot be written, or that would replace an input, each other, or an existing file.

    Files are compared as files, not by how their names are spelled: links, linked folders and hard links count.

    Args:
        outputs: the option that names it, and the path; None for one that is not wanted.
        inputs: files that are read.
        overwrite: whether outputs that exist may be replaced. Inputs may never be.
        suffixes: how names must end, but for ``--json``.

    Raises:
        typer.BadParameter: for a wrong ending, or a file that is named twice.
        DataError: for what cannot be written, or exists.
    """
    taken = {each for path in inputs for each in _identities(path)}
    for option, path in [(option, path) for option, path in outputs.items() if path]:
        if not path.name.endswith(tuple(ENDINGS.get(option, suffixes))):
            raise typer.BadParameter(f"{path} must end in {' or '.join(suffixes)}", param_hint=option)
        if taken & _identities(path):
            raise typer.BadParameter(f"{path} is named twice; outputs need files of their own", param_hint=option)
        taken |= _identities(path)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise DataError(f"{path} cannot be written: it is a folder, or its folder is missing or read-only.")
        if os.path.lexists(path) and not overwrite:  # a link to nothing exists, too
            raise DataError(f"{path} exists. Give --overwrite to replace it, or another name.")


def _identities(path: Path) -> set[object]:
    """What two paths to one file have in common: where all links lead, and for hard links the file's number."""
    found: set[object] = {os.path.realpath(path)}
    try:
        status = os.stat(path)
    except OSError:  # it does not exist yet
        return found
    return found | {(status.st_dev, status.st_ino)}
