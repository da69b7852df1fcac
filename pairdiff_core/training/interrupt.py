"""Pausing work: on Ctrl-C, on the SIGTERM that a cluster sends before its time limit, or after some time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Paused(Exception):
    """Work stopped on request; its progress is saved, and the same call continues it."""


@contextmanager
def pausing(minutes: float | None = None) -> Iterator[Callable[[], str | None]]:
    """Within the block, SIGINT and SIGTERM ask for a pause and do not kill the process; a second signal acts as usual.

    Yields a function that returns the reason to pause, or None, for :class:`pairdiff_core.storage.Saving`.

    Args:
        minutes: time after which there is a reason to pause; None for no limit.
    """
    started, caught = time.monotonic(), []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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

    for number in before:
        signal.signal(number, catch)
    try:
        yield reason
    finally:
        restore()
