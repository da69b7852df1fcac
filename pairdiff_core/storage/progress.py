"""The saved state of unfinished work, so that the next call can continue it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairdiff_core.errors import CheckpointError
from pairdiff_core.storage.checkpoints import check_config
from pairdiff_core.storage.files import replacing
from pairdiff_core.storage.run_folder import write_log

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Saving:
    """When unfinished work is saved, and when it pauses."""

    every_minutes: float = 5.0
    should_pause: Callable[[], str | None] = lambda: None  # called often; returns a reason to save and stop, or None


class Progress:
    """The progress of a training: a file that is rewritten regularly, and removed when the result is saved.

    Args:
        path: of the file, such as ``vqae.progress``.
        config: everything that the training depends on. A file that was made with another config is refused.
        saving: when to write it.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], saving: Saving) -> None:
        self.path, self.config, self.saving = path, dict(config), saving
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.saved = self.started

    @property
    def seconds(self) -> float:
        """Time spent on the work, including the time before interruptions."""
        return self.seconds_before + time.monotonic() - self.started

    def due(self) -> bool:
        """Whether it is time to write the file again."""
        return time.monotonic() - self.saved >= 60 * self.saving.every_minutes

    def restore(self, fabric: Fabric, state: dict[str, Any]) -> None:
        """Restore the modules, optimisers and values of ``state`` from the file; without a file, do nothing.

        Raises:
            CheckpointError: if the file is damaged or was made with other settings; it is not changed.
        """
        if not self.path.exists():
            return
        try:
            saved = fabric.load(self.path, weights_only=True)
        except Exception as error:  # a damaged zip or pickle raises errors of no common class
            raise CheckpointError(f"{self.path} is damaged ({error}). Delete it to begin this stage again.") from error
        check_config(self.path, saved["config"], self.config)
        self.seconds_before = saved["seconds"]
        for name, item in state.items():
            if hasattr(item, "load_state_dict"):
                item.load_state_dict(saved[name])
            else:
                state[name] = saved[name]

    def save(self, fabric: Fabric, state: Mapping[str, Any]) -> None:
        """Save the current state and the stage's log; every process must call it, the first one writes.

        Raises:
            CheckpointError: if it cannot be written; the existing file is then kept.
        """
        content = {**state, "config": self.config, "seconds": self.seconds}
        with replacing(self.path) if fabric.is_global_zero else nullcontext(self.path) as target:
            fabric.save(target, content)
        if fabric.is_global_zero:
            write_log(self.path.parent, self.path.stem, state["history"])
        self.saved = time.monotonic()
