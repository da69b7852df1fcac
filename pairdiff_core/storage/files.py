"""Files that are whole or not there: at every moment a reader sees the old one or the new one."""

from __future__ import annotations

import base64
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pairdiff_core.errors import CheckpointError

UNFINISHED = ".writing"  # how the names of files end while they are being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which takes the place of ``path`` when the block ends without an error.

    Raises:
        CheckpointError: if it cannot be written; the old file is then still there.
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
    """Write a whole file, see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, see :func:`replacing`; floats to six digits, since the rest differs between machines."""
    write_file(Path(path), (json.dumps(_rounded(content), indent=1, allow_nan=False) + "\n").encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value else None  # JSON has no NaN
    return value


def pack_labels(labels: torch.Tensor) -> dict[str, Any]:
    """Label maps uint8 of any shape as text that fits into JSON: ``shape`` and zlib-packed base85 ``bytes``."""
    packed = base64.b85encode(zlib.compress(labels.contiguous().numpy().tobytes(), 9)).decode()
    return {"shape": list(labels.shape), "bytes": packed}


def unpack_labels(packed: dict[str, Any]) -> torch.Tensor:
    """The label maps that :func:`pack_labels` packed."""
    content = np.frombuffer(zlib.decompress(base64.b85decode(packed["bytes"])), dtype=np.uint8)
    return torch.from_numpy(content.copy()).reshape(packed["shape"])
