"""What a run folder tells beside its checkpoints, and who may write into it.

``config.json`` says what the run is, ``log.csv`` how the training went (with TensorBoard events beside it where
TensorBoard is installed), and ``provenance.json`` what made each result.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pairdiff_core.checkpoints import UNFINISHED, CheckpointError, write_file

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # it is optional
    SummaryWriter = None


@contextmanager
def working_in(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Keep other processes from working in a run folder, which is made and described by ``config.json`` if it is new.

    The operating system frees the folder when the process ends, however it ends.

    Args:
        config: ``dataset``, ``profile`` and ``seed``, which a folder that is there must have, and more to tell.

    Raises:
        CheckpointError: if another process works there, the folder is that of another run, or cannot be written.
    """
    lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"{folder} is in use: another process works in it. Wait until it is done, or choose another run folder."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}). Choose another run folder.") from error
    try:
        for left_over in folder.rglob(f".*{UNFINISHED}"):  # of a process that was killed while it wrote
            left_over.unlink()
        _claim(folder / "config.json", config)
        yield
    finally:
        lock.release()


def _claim(path: Path, config: Mapping[str, Any]) -> None:
    if not path.exists():
        return write_json(path, config)
    try:
        was = json.loads(path.read_text())
        different = [f"{key} {was[key]}" for key in ("dataset", "profile", "seed") if was[key] != config[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}). Choose another run folder, or delete it."
        ) from error
    if different:
        raise CheckpointError(
            f"{path.parent} holds another run ({', '.join(different)}). Choose another run folder."
        )
    return None


def write_log(folder: Path, stage: str, history: list[dict[str, float]]) -> None:
    """Bring the lines of a stage in ``log.csv`` (stage, step, name, value) in line with its history so far."""
    path = folder / "log.csv"
    rows = [["stage", "step", "name", "value"]]
    if path.exists():
        with path.open(newline="") as file:
            rows += [row for row in csv.reader(file) if row[0] not in ("stage", stage)]
    for entry in history:
        rows += [[stage, entry["step"], name, value] for name, value in entry.items() if name != "step"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_file(path, text.getvalue().encode())
    if SummaryWriter is not None:
        _write_events(folder / "tensorboard" / stage, history)


def _write_events(folder: Path, history: list[dict[str, float]]) -> None:
    """All events of the stage in one new file: those of an interrupted training would otherwise come twice."""
    for old in folder.glob("events.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as events:
        for entry in history:
            for name, value in entry.items():
                if name != "step":
                    events.add_scalar(name, value, int(entry["step"]))


def write_provenance(folder: Path, stage: str, made_by: Mapping[str, Any]) -> None:
    """Add to ``provenance.json`` where the result of a stage comes from."""
    path = folder / "provenance.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**told, stage: dict(made_by)})


def write_json(path: Path, content: Any) -> None:
    """Write JSON, by :func:`pairdiff_core.checkpoints.write_file`."""
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())
