"""What commands print besides errors: numbers, and progress lines of long work."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import typer


def show(numbers: dict[str, Any]) -> None:
    """Print numbers, one per line; lists are skipped, since they are only for the file."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            show({f"{name} {key}": item for key, item in value.items()})
        elif not isinstance(value, list):
            typer.echo(f"{name:26} {'-' if value is None else f'{value:.4g}'}")


@contextmanager
def progress_lines(quiet: bool = False) -> Iterator[None]:
    """Within the block, the package's log goes to stderr; with ``quiet``, nothing at all is printed."""
    if quiet:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
        return
    package, handler = logging.getLogger("pairdiff_core"), logging.StreamHandler()
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
