"""Atomic writing of files: at every moment, a reader sees either the old file or the complete new one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pairdiff_core.errors import CheckpointError

UNFINISHED = ".writing"  # suffix of files that are being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which replaces ``path`` when the block ends without an error.

    Raises:
        CheckpointError: if it cannot be written; an existing file is then kept.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        os.close(number)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # temporary files are private, results are not
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error}). Is the disk full or the folder read-only?"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically, see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, see :func:`replacing`; with six digits, since further ones differ between machines."""
    write_file(Path(path), (json.dumps(rounded(content), indent=1, allow_nan=False) + "\n").encode())


def rounded(value: Any) -> Any:
    """Numbers in nested dictionaries and lists with six digits; NaN becomes None, as JSON has none."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value else None
    return value
