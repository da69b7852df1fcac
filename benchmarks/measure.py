"""Time and memory of two ways to do the same, side by side."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """One line of the table. ``ratio`` is how many times better ours is; it should be at least ``target``."""

    name: str
    unit: str
    ours: float
    published: float
    target: float
    less_is_better: bool = True
    note: str = ""

    @property
    def ratio(self) -> float:
        better, worse = (self.published, self.ours) if self.less_is_better else (self.ours, self.published)
        return better / worse

    @property
    def reached(self) -> bool:
        return self.ratio >= self.target

    def described(self) -> dict[str, Any]:
        """As ``bench.json`` holds it."""
        return {**self._asdict(), "ratio": self.ratio, "reached": self.reached}


def seconds_in_turn(
    ours: Callable[[], Any], published: Callable[[], Any], repeats: int = 3
) -> tuple[float, float]:
    """Median seconds of each, run in turn after one untimed run of both: other work then slows both alike."""
    spent: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for times, work in zip(spent, (ours, published), strict=True):
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times.append(time.perf_counter() - started)
    return statistics.median(spent[0]), statistics.median(spent[1])


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
    before = resident_bytes()
    ready()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts it in KiB
    sender.send(max(0, peak - before) / 2**30)


def resident_bytes() -> int:
    """Memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
