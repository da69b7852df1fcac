"""Measure time and memory of two ways to do the same work."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Work = Callable[[], Any]


class Row(NamedTuple):
    """One row of the table.

    ``ratio`` is published / ours, or the inverse if more is better. ``target`` is for it or, if ``absolute``, for ours.
    """

    name: str
    unit: str
    ours: float
    published: float | None
    target: float
    absolute: bool = False
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        if self.published is None or not self.ours or not self.published:
            return None
        return self.ours / self.published if self.more_is_better else self.published / self.ours

    @property
    def reached(self) -> bool:
        if not self.absolute:
            return self.ratio is not None and self.ratio >= self.target
        return self.ours >= self.target if self.more_is_better else self.ours <= self.target

    def described(self) -> dict[str, Any]:
        """The row as it is stored in ``bench.json``."""
        return {**self._asdict(), "ratio": self.ratio, "reached": self.reached}


def synchronise() -> None:
    """Wait until the GPU, if one is in use, has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_in_turn(*works: Work, repeats: int = 3) -> tuple[float, ...]:
    """Median seconds of each, run in turn after one untimed run of all, so that other load slows all alike."""
    spent: tuple[list[float], ...] = tuple([] for _ in works)
    for repeat in range(repeats + 1):
        for times, work in zip(spent, works, strict=True):
            synchronise()
            started = time.perf_counter()
            work()
            synchronise()
            if repeat:
                times.append(time.perf_counter() - started)
    return tuple(statistics.median(times) for times in spent)


def peak_gib(prepare: Callable[..., Work], *arguments: Any) -> float:
    """Peak memory of ``prepare(*arguments)()`` in GiB, above what is in use after the preparation.

    Unless a GPU is in use, it runs in a new process, whose peak memory the operating system reports; ``prepare`` and
    its arguments must be picklable.

    Raises:
        EOFError: if the work fails in that process.
    """
    if torch.cuda.is_initialized():
        work = prepare(*arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, torch.get_num_threads(), prepare, arguments))
    process.start()
    sender.close()
    gib = receiver.recv()
    process.join()
    return gib


def _send_peak(sender: Any, threads: int, prepare: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    work = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _largest_bytes()
    work()
    sender.send((_largest_bytes() - before) / 2**30)


def _largest_bytes() -> int:
    """The peak memory of this process, as Linux reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
