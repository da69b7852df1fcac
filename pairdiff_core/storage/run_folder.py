"""The files of a run folder besides its checkpoints, and the lock for writing into it.

``config.json`` describes the run. ``logs/`` holds a CSV file for each training and, if TensorBoard is installed, its
events. How a checkpoint was made is stored in the checkpoint itself.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pairdiff_core.errors import CheckpointError
from pairdiff_core.storage.files import UNFINISHED, write_json

IDENTITY = ("dataset", "profile", "seed")  # what must not change in a run folder


@contextmanager
def working_in(folder: Path, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[None]:
    """Keep other processes from working in a run folder, and write ``config.json`` into it.

    The operating system releases the lock when the process ends, even if it is killed.

    Args:
        identity: ``dataset``, ``profile`` (its name) and ``seed``; a folder that exists must have the same.
        settings: everything else that ``config.json`` holds.

    Raises:
        CheckpointError: if another process is using the folder, or it belongs to another run or cannot be written.
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
        path, config = folder / "config.json", {**identity, **settings}
        was = read_config(folder) if path.exists() else config
        different = [f"{key} {was[key]}" for key in IDENTITY if was[key] != identity[key]]
        if different:
            raise CheckpointError(f"{folder} holds another run ({', '.join(different)}). Choose another run folder.")
        if was != config or not path.exists():
            write_json(path, config)
        yield
    finally:
        lock.release()


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a run folder or a pretrained model.

    Raises:
        CheckpointError: if the folder or the file is missing or damaged.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        return {**config, **{key: config[key] for key in IDENTITY}}
    except OSError as error:
        what = "holds no config.json" if Path(folder).is_dir() else "is not a folder"
        raise CheckpointError(f"{folder} {what}. Give a run folder, or the folder of a pretrained model.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). Choose another run folder, or delete it.") from error


def write_log(folder: Path, stage: str, history: Sequence[Mapping[str, float]]) -> None:
    """Write the complete history of a training to ``logs/<stage>``; appending would repeat parts after a pause."""
    from lightning_fabric.loggers import CSVLogger, TensorBoardLogger  # here: its import takes seconds

    loggers: list[Any] = [CSVLogger(folder / "logs", name=stage, version="")]
    if find_spec("tensorboard"):
        for old in (folder / "logs" / stage).glob("events.*"):
            old.unlink()
        loggers.append(TensorBoardLogger(folder / "logs", name=stage, version=""))
    # an old log is replaced without a warning; if the log cannot be written, saving the checkpoint reports it
    with warnings.catch_warnings(action="ignore"), suppress(OSError):
        for logger in loggers:
            for entry in history:
                values = {name: value for name, value in entry.items() if name != "step"}
                logger.log_metrics(values, int(entry["step"]))
            logger.finalize("success")


def measured_once(path: Path, depends_on: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """The result of ``measure()``, stored in a JSON file and measured again when anything it depends on changes."""
    depends_on = json.loads(json.dumps(depends_on))
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("depends_on") != depends_on:
        kept = {"result": measure(), "depends_on": depends_on}
        write_json(path, kept)
        kept = json.loads(path.read_text())  # rounded, as in the next call
    return kept["result"]
