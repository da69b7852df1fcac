"""What each change from the published procedure to ours gains, one after the other.

    python -m benchmarks.steps

Sizes are those of ``python -m benchmarks``. The variants of a part run in turn; each number is a median of repeats.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import published, rows
from benchmarks.measure import peak_gib, seconds_in_turn
from benchmarks.rows import LAPTOP, RESULTS, SMALL, Sizes
from pairdiff_core import registration
from pairdiff_core.profiles import Level, UNetSettings
from pairdiff_core.storage import provenance, write_json
from pairdiff_core.training import best_device, fast_in_bfloat16, new_fabric

# From the description of a change to a function that prepares the work and returns it as a function.
Variants = dict[str, Callable[[], Callable[[], Any]]]


def registration_variants(sizes: Sizes) -> Variants:
    """One training step, which returns the loss before it."""
    unets = 2 * (UNetSettings(2, (8, 16, 32, 64, 64, 64)),)
    settings = replace(LAPTOP.registration, unets=unets, correlation=None, control=2, squarings=12, scales=1)
    variants: Variants = {"published": partial(rows.published_registration_step, sizes)}
    for change, changed in {
        "fields on the grid of the U-Nets, both directions in one batch": {},
        "5 squarings instead of 12": {"squarings": 5},
        "velocities on a grid twice as coarse": {"control": 4},
        "a correlation layer instead of the first U-Net, and the other one on patches": {
            "unets": LAPTOP.registration.unets,
            "correlation": LAPTOP.registration.correlation,
        },
        "images compared at four scales: it learns more": {"scales": 4},
    }.items():
        settings = replace(settings, **changed)
        variants[change] = partial(rows.registration_step, sizes, settings)
    return variants


def optimisation(sizes: Sizes, level: Level, only_near: bool) -> Callable[[], registration.Velocities]:
    """Instance optimisation at one level, from the identity."""
    fixed, moving = rows.pair_of_maps(sizes)
    zero = fixed.new_zeros(1, 3, 1, 1, 1)
    return partial(
        registration.optimise, fixed, moving, (zero,), level, smoothness=0.05, squarings=5, only_near=only_near
    )


def instance_variants(sizes: Sizes, steps: int = 10) -> Variants:
    """Some steps of instance optimisation; the work returns the velocities."""
    return {
        change: partial(optimisation, sizes, Level(scale, control, steps, 0.2), only_near)
        for change, scale, control, only_near in (
            ("no network, a velocity for every voxel", 1, 1, False),
            ("velocities on a grid four times as coarse", 1, 4, False),
            ("only voxels near vessels are compared", 1, 4, True),
            ("at half the resolution", 2, 2, True),
            ("at a quarter of the resolution", 4, 2, True),
        )
    }


def vqae_variants(sizes: Sizes) -> Variants:
    """One training step of the published autoencoder, which returns the loss before it."""
    variants: Variants = {
        "published": partial(rows.vqae_step, False, sizes),
        "channels last": partial(rows.vqae_step, False, sizes, channels_last=True),
    }
    if fast_in_bfloat16(best_device()):
        variants["bfloat16"] = partial(rows.vqae_step, False, sizes, bfloat16=True)
        variants["bfloat16, channels last"] = partial(rows.vqae_step, False, sizes, bfloat16=True, channels_last=True)
    return variants


def denoiser_with(
    sizes: Sizes, ours: bool = False, some: bool = False, bfloat16: bool = False, compiled: bool = False
) -> Callable[[], torch.Tensor]:
    """Logits of a row of masks: of all tokens, or of ``some``, as many as one of 48 sampling steps reveals."""
    model, fabric = rows.new_denoiser(ours, sizes), new_fabric(bfloat16)
    tokens = torch.full((1, math.prod(sizes.tokens)), published.CODES, device=best_device())

    def predict() -> torch.Tensor:
        if some:
            return model.head(model.blocks(model.token(tokens) + model.position)[:, ::48])
        return model(tokens)

    predict = torch.compile(predict) if compiled else predict

    @torch.no_grad()
    def work() -> torch.Tensor:
        with fabric.autocast():
            return predict()

    if compiled:
        work()  # this compiles it
    return work


def denoiser_variants(sizes: Sizes) -> Variants:
    """One forward pass over all tokens; the work returns the logits."""
    variants: Variants = {
        "published": partial(denoiser_with, sizes),
        "logits only where they are used": partial(denoiser_with, sizes, some=True),
        "all logits, attention in blocks": partial(denoiser_with, sizes, ours=True),
    }
    if fast_in_bfloat16(best_device()):
        variants["and bfloat16 where it is safe"] = partial(denoiser_with, sizes, ours=True, bfloat16=True)
    if shutil.which("c++"):
        variants["the same, compiled"] = partial(denoiser_with, sizes, ours=True, bfloat16=True, compiled=True)
    return variants


PARTS: dict[str, Callable[[Sizes], Variants]] = {
    "one registration training step": registration_variants,
    "ten steps of instance optimisation": instance_variants,
    "one autoencoder training step": vqae_variants,
    "one denoiser pass": denoiser_variants,
}


def measure(part: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Measure all variants of a part, in order: ``part``, ``change``, ``seconds`` and ``gib``."""
    variants = PARTS[part](sizes)
    seconds = seconds_in_turn(*(prepare() for prepare in variants.values()), repeats=sizes.repeats)
    for (change, prepare), spent in zip(variants.items(), seconds, strict=True):
        yield {"part": part, "change": change, "seconds": spent, "gib": peak_gib(prepare)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_steps.json", help="file to write")
    chosen = parser.parse_args()
    started, changes = time.perf_counter(), []
    for part in PARTS:
        print(part)
        for found in measure(part, SMALL if chosen.small else Sizes()):
            changes.append(found)
            print(f"  {found['change']:66} {found['seconds']:8.3g} s {found['gib']:8.3g} GiB", flush=True)
    made_by = provenance("published sizes", 0, best_device()) | {"wall_seconds": time.perf_counter() - started}
    write_json(chosen.json, {"changes": changes, "provenance": made_by})


if __name__ == "__main__":
    main()
