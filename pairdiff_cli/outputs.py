"""Checks of a command's outputs before anything is computed: they must be writable and must not destroy a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import typer

from pairdiff_cli.options import SUFFIXES
from pairdiff_core.errors import DataError

ENDINGS = {"--json": (".json",)}  # of outputs that are not images
HALVES = (".hdr", ".img", ".hdr.gz", ".img.gz")  # of images in two files
HEADERS = (".nhdr", ".mhd")  # of headers that name the files with the voxels


def check_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Mapping[str, Path | Iterable[Path] | None] = MappingProxyType({}),
    overwrite: bool = False,
    suffixes: Sequence[str] = SUFFIXES,
) -> None:
    """Refuse outputs that cannot be written, or that would replace an input, each other, or an existing file.

    Files are compared, not the spelling of their names: links, linked folders and hard links are followed. All files of
    a folder, and of an image in two files, count as inputs.

    Args:
        outputs: the path for each option; None for an output that is not wanted.
        inputs: for each option or argument, the files or folders that are read.
        overwrite: whether existing outputs may be replaced. Inputs are never replaced.
        suffixes: allowed endings of names, except for ``--json``.

    Raises:
        typer.BadParameter: for a wrong ending, or a file that is named twice.
        DataError: for an output that cannot be written or already exists.
    """
    taken: dict[object, tuple[str, Path, Path]] = {}  # by identity of the file: option, its path, file
    for option, paths in inputs.items():
        for path in [paths] if isinstance(paths, Path) else paths or ():
            for file in [*_parts(path), path]:
                taken |= dict.fromkeys(_identities(file), (option, path, file))
    for option, path in [(option, path) for option, path in outputs.items() if path]:
        endings = ENDINGS.get(option, suffixes)
        if not path.name.endswith(tuple(endings)):
            raise typer.BadParameter(f"{path} must end in {' or '.join(endings)}", param_hint=option)
        for same in taken.keys() & _identities(path):
            raise typer.BadParameter(_named_twice(option, path, *taken[same]), param_hint=option)
        taken |= dict.fromkeys(_identities(path), (option, path, path))
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise DataError(f"{path} cannot be written: it is a folder, or its folder is missing or read-only.")
        if path.exists() and not path.is_file():
            raise DataError(f"{path} cannot be written: it is a device or a pipe, not a file. Give another name.")
        if os.path.lexists(path) and not overwrite:  # a broken link counts as existing
            raise DataError(f"{path} exists. Give --overwrite to replace it, or another name.")


def _named_twice(option: str, path: Path, other: str, named: Path, file: Path) -> str:
    """Why an output is refused: it is ``file``, which option ``other`` names, directly or as a part of ``named``."""
    if file != named:
        why = f"{path} ({option}) belongs to {named} ({other})"
    elif str(path) == str(named):
        why = f"{path} is named twice, by {option} and {other}"
    else:
        why = f"{path} ({option}) and {named} ({other}) are the same file"
    return f"{why}; each output needs its own file"


def _parts(path: Path) -> Iterator[Path]:
    """The files of a folder, both halves of an image in two files, or the files that a header names."""
    name = path.name.lower()
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())
    elif name.endswith(HALVES):
        stem = path.name[: -len(next(ending for ending in HALVES[::-1] if name.endswith(ending)))]
        for ending in HALVES:
            yield from (path.with_name(stem + ending), path.with_name(stem + ending.upper()))
    elif name.endswith(HEADERS) and path.is_file():
        for line in path.read_bytes().decode("latin-1").splitlines():
            value = line.replace("=", ":").partition(":")[2]
            for words in {line.strip(), value.strip(), *value.split()} - {"", "."}:
                if len(words) < 256 and "\0" not in words:
                    yield path.parent / words


def _identities(path: Path) -> set[object]:
    """What identifies a file: its path with all links resolved and, for hard links, device and inode numbers."""
    found: set[object] = {os.path.realpath(path)}
    try:
        status = os.stat(path)
    except OSError:  # it does not exist yet
        return found
    return found | {(status.st_dev, status.st_ino)}
