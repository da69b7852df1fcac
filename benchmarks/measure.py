"""Time and memory of two ways to do the same, side by side."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """One line of the table.

    ``ratio`` is how many times less ours is than the published, or how many times more where more is better. The target
    is for the ratio, or, if ``absolute``, for ours.
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
        """As ``bench.json`` holds it."""
        return {**self._asdict(), "ratio": self.ratio, "reached": self.reached}


def seconds_in_turn(*works: Callable[[], Any], repeats: int = 3) -> tuple[float, ...]:
    """Median seconds of each, run in turn after one untimed run of all: other work then slows all alike."""
    spent: tuple[list[float], ...] = tuple([] for _ in works)
    for repeat in range(repeats + 1):
        for times, work in zip(spent, works, strict=True):
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times.append(time.perf_counter() - started)
    return tuple(statistics.median(times) for times in spent)


def peak_gib(work: Callable[..., Any], *arguments: Any) -> float:
    """Memory that ``work(*arguments)`` needs at most, above what there was before, in GiB.

    On a CPU it runs in a new process, whose largest size the operating system knows; ``work`` is a plain function of
    a module, and returns what is to be measured as a function without arguments, when all is prepared.
    """
    if torch.cuda.is_available():
        ready = work(*arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ready()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, torch.get_num_threads(), work, arguments))
    process.start()
    sender.close()
    gib = receiver.recv()
    process.join()
    return gib


def _measure(sender: Any, threads: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    ready = work(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
    before = largest_bytes()
    ready()
    sender.send((largest_bytes() - before) / 2**30)


def largest_bytes() -> int:
    """The largest size that this process has had in memory, as Linux tells it."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return 1024 * int(line.split()[1])
