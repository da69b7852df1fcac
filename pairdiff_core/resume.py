"""Work that can be interrupted: what is done so far is kept beside the result and taken up by the next call."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pairdiff_core.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

# In RegistrationProfile: training does not depend on them.
AFTERWARDS = {"instance", "baseline", "repeats", "merge"}


class Paused(RuntimeError):
    """Work stopped because it was asked to; what is done is kept, and the same call goes on from there."""


@contextmanager
def pausing(minutes: float | None = None) -> Iterator[Callable[[], str | None]]:
    """Inside, Ctrl-C and SIGTERM, which a cluster sends before its time limit, ask for a pause instead of killing.

    A second signal acts as ever. Gives a function that tells the reason to pause, or None, as :class:`Bookmark` wants.

    Args:
        minutes: after so many there is a reason, too; None for no limit.
    """
    started, caught = time.monotonic(), []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number).name)
        restore()

    def reason() -> str | None:
        if caught:
            return f"{caught[0]} came"
        over = minutes is not None and time.monotonic() - started >= 60 * minutes
        return f"{minutes:g} minutes are over" if over else None

    for number in signals:
        signal.signal(number, catch)
    try:
        yield reason
    finally:
        restore()


class Bookmark:
    """How far a piece of work is: a checkpoint that is written now and then, and removed when the result is there.

    Args:
        path: of the file, such as ``vqae.part``.
        config: everything that the work depends on, JSON-able. A file that was made with another is refused.
        minutes: between two writings.
        should_pause: asked after each step; a reason to stop, or None.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        minutes: float = 5.0,
        should_pause: Callable[[], str | None] | None = None,
    ) -> None:
        self.path, self.config = path, dict(config)
        self.minutes, self.should_pause = minutes, should_pause
        self.seconds_before = 0.0
        self.begin()
        self.log: Callable[[list[dict[str, float]]], None] = lambda history: (
            None
        )  # called when the file is written

    @property
    def seconds(self) -> float:
        """Time spent on the work, that before interruptions included."""
        return self.seconds_before + time.monotonic() - self.started

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and description as last written; None at the first start.

        Raises:
            CheckpointError: if the file is damaged or was made with other settings; it stays as it is.
        """
        if not self.path.exists():
            return None
        tensors, metadata = load_checkpoint(self.path)
        check_config(self.path, metadata.get("config", {}), self.config)
        self.seconds_before = metadata["seconds"]
        return tensors, metadata

    def begin(self) -> None:
        """Count the seconds from now."""
        self.started = self.written = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self.written >= 60 * self.minutes

    def reason_to_pause(self) -> str | None:
        return self.should_pause() if self.should_pause else None

    def write(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Replace the file by what is done now.

        Raises:
            CheckpointError: if it cannot be written; the last one is then still there.
        """
        save_checkpoint(self.path, tensors, {**metadata, "config": self.config, "seconds": self.seconds})
        self.written = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def check_config(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the settings that a file was made with to those of now.

    Raises:
        CheckpointError: if any differs; the message names them.
    """
    different = [key for key in sorted({*was, *now}) if _plain(was.get(key)) != _plain(now.get(key))]
    if different:
        raise CheckpointError(
            f"{path} was made with other settings ({', '.join(different)} differ from now). It stays as it is: "
            "choose another run folder (PAIRDIFF_RUNS), or delete the file to make it again."
        )


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them; without AFTERWARDS and what is None, as a new setting."""
    if isinstance(value, Mapping):
        return {
            key: _plain(item) for key, item in value.items() if item is not None and key not in AFTERWARDS
        }
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
