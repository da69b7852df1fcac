"""What each change gains by itself: from the published procedure to ours, one after the other.

    python -m benchmarks.steps

The same sizes as ``python -m benchmarks``; each line is the median of its repeats, the lines of a part in turn.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import published, rows
from benchmarks.measure import peak_gib, seconds_in_turn
from benchmarks.rows import RESULTS, SMALL, Sizes
from pairdiff_core import registration
from pairdiff_core.checkpoints import provenance
from pairdiff_core.profiles import Level
from pairdiff_core.results import write_results
from pairdiff_core.training import best_device, fast_in_bfloat16


class Change(NamedTuple):
    """One line: what was changed, and what the work then costs."""

    part: str
    change: str
    seconds: float
    gib: float


class Variant(NamedTuple):
    """One way to do the work; ``prepare(*arguments)`` returns it as a function without arguments."""

    change: str
    prepare: Callable[..., Callable[[], object]]
    arguments: tuple = ()


PUBLISHED_NUMBERS = {
    "channels": (8, 16, 32, 64, 64, 64),
    "squarings": 12,
    "control": 1,
    "coarser": 1,
    "scales": 1,
}


def registration_with(sizes: Sizes, changes: dict) -> Callable[[], float]:
    """``rows.registration_step`` in a form that can be sent to another process."""
    return rows.registration_step(sizes, **changes)


def registration_variants(sizes: Sizes) -> list[Variant]:
    """One training step."""
    changes = PUBLISHED_NUMBERS
    variants = [
        Variant("published", rows.published_registration_step, (sizes,)),
        Variant(
            "fields on the grid of the U-Nets, both directions in one batch",
            registration_with,
            (sizes, changes),
        ),
    ]
    for change, numbers in (
        ("5 squarings instead of 12", {"squarings": 5}),
        ("velocities on a grid twice as coarse", {"control": 2}),
        (
            "the first U-Net sees coarser images, and is wider",
            {"coarser": 2, "channels": (8, 16, 32, 64, 64, 16)},
        ),
        ("images compared at four scales: it learns more", {"scales": 4}),
    ):
        changes = changes | numbers
        variants.append(Variant(change, registration_with, (sizes, changes)))
    return variants


def optimisation(sizes: Sizes, level: Level, near_only: bool) -> Callable[[], object]:
    """A few steps of instance optimisation at one level, from nothing."""
    fixed, moving = rows.pair_of_maps(sizes)
    start = (torch.zeros(1, 3, 1, 1, 1, device=best_device()),)

    def work() -> object:
        usual, registration.LARGE = registration.LARGE, registration.LARGE if near_only else 2**62
        try:
            return registration.optimise(fixed, moving, start, level, smoothness=0.05, squarings=5)
        finally:
            registration.LARGE = usual

    return work


def instance_variants(sizes: Sizes) -> list[Variant]:
    """Ten steps of instance optimisation."""
    steps = 10
    return [
        Variant(
            "no network, a velocity for every voxel", optimisation, (sizes, Level(1, 1, steps, 0.2), False)
        ),
        Variant(
            "velocities on a grid four times as coarse", optimisation, (sizes, Level(1, 4, steps, 0.2), False)
        ),
        Variant(
            "only voxels near vessels are compared", optimisation, (sizes, Level(1, 4, steps, 0.2), True)
        ),
        Variant("at half the resolution", optimisation, (sizes, Level(2, 2, steps, 0.2), True)),
        Variant("at a quarter of the resolution", optimisation, (sizes, Level(4, 2, steps, 0.2), True)),
    ]


def vqae_variants(sizes: Sizes) -> list[Variant]:
    """One training step."""
    variants = [
        Variant("published", rows.vqae_step, (sizes, False)),
        Variant("channels last", rows.vqae_step, (sizes, False, True)),
        Variant("bfloat16", rows.vqae_step, (sizes, True)),
        Variant("bfloat16, channels last", rows.vqae_step, (sizes, True, True)),
    ]
    return variants if fast_in_bfloat16(best_device()) else variants[:2]


def denoiser_with(
    sizes: Sizes, ours: bool = False, some: bool = False, bfloat16: bool = False, compiled: bool = False
) -> Callable[[], torch.Tensor]:
    """One pass over a row of masks; of ``some`` places, as many as one of 48 passes reveals, or of all."""
    model = (rows.our_denoiser if ours else rows.published_denoiser)(sizes)
    length = math.prod(sizes.tokens)
    tokens = torch.full((1, length), published.CODES, device=best_device())

    def predict() -> torch.Tensor:
        if some:
            return model.head(model.blocks(model.token(tokens) + model.position)[:, ::48])
        return model(tokens)

    predict = torch.compile(predict) if compiled else predict

    @torch.no_grad()
    def work() -> torch.Tensor:
        with rows.in_bfloat16(bfloat16):
            return predict()

    if compiled:
        work()  # is compiled now
    return work


def denoiser_variants(sizes: Sizes) -> list[Variant]:
    """One pass over all tokens."""
    variants = [
        Variant("published", denoiser_with, (sizes,)),
        Variant("logits only where they are used", partial(denoiser_with, some=True), (sizes,)),
        Variant("all logits, attention in blocks", partial(denoiser_with, ours=True), (sizes,)),
    ]
    if fast_in_bfloat16(best_device()):
        work = partial(denoiser_with, ours=True, bfloat16=True)
        variants.append(Variant("and bfloat16 where it is safe", work, (sizes,)))
    if shutil.which("c++"):
        work = partial(denoiser_with, ours=True, bfloat16=True, compiled=True)
        variants.append(Variant("the same, compiled", work, (sizes,)))
    return variants


PARTS: dict[str, Callable[[Sizes], list[Variant]]] = {
    "one registration training step": registration_variants,
    "ten steps of instance optimisation": instance_variants,
    "one VQ-AE training step": vqae_variants,
    "one denoiser pass": denoiser_variants,
}


def measure(part: str, sizes: Sizes) -> Iterator[Change]:
    """All variants of a part, in their order."""
    variants = PARTS[part](sizes)
    prepared = [partial(variant.prepare, *variant.arguments) for variant in variants]
    seconds = seconds_in_turn(*(prepare() for prepare in prepared), repeats=sizes.repeats)
    for variant, prepare, spent in zip(variants, prepared, seconds, strict=True):
        yield Change(part, variant.change, spent, peak_gib(prepare))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_steps.json", help="file to write")
    chosen = parser.parse_args()
    started, found = time.perf_counter(), []
    for part in PARTS:
        print(part)
        for change in measure(part, SMALL if chosen.small else Sizes()):
            found.append(change)
            print(f"  {change.change:66} {change.seconds:8.3g} s {change.gib:8.3g} GiB", flush=True)
    made_by = provenance("published sizes", 0, best_device())
    made_by["wall_seconds"] = time.perf_counter() - started
    write_results(chosen.json, {"changes": [change._asdict() for change in found], "provenance": made_by})


if __name__ == "__main__":
    main()
