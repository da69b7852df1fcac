"""An estimate of a registration's time and memory, printed before long work, and progress bars."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
import typer
from tqdm import tqdm

from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Profile
from pairdiff_core.registration import Watch, coarsening
from pairdiff_core.training import best_device

LONG, MUCH = 60, 1 / 4  # seconds, and share of the machine's memory, above which the estimate is printed


class Cost(NamedTuple):
    """The approximate cost of registering pairs on a CPU."""

    seconds: float
    bytes: float


def expected_cost(pairs: PairSet, profile: Profile, instance: bool = False, threads: int = 1) -> Cost:
    """Estimate the cost of optimisation and file access from the numbers of voxels and labels.

    The constants were measured on one core of an AMD EPYC with AVX-512, on 3 to 33 labels and volumes of 64 x 52 x 64
    to 256 x 208 x 256 voxels.

    Args:
        instance: whether the levels are those of instance optimisation, after a network.
        threads: number of CPU threads.
    """
    settings, dims, labels = profile.registration, pairs.spatial_dims, pairs.num_labels - 1
    voxels = math.prod(pairs.spatial)
    compared = voxels / coarsening(pairs.spatial, profile.spatial) ** dims
    levels = settings.instance if instance else settings.baseline
    steps = sum(level.steps / level.scale**dims for level in levels)  # equivalent steps at full size
    seconds = compared * (steps * (5e-7 + 1e-7 * labels) + 3e-7 * labels) / threads**0.8 + 1e-6 * voxels
    return Cost(len(pairs) * seconds, compared * (100 + 80 * labels) + 100 * voxels)


def note_cost(pairs: PairSet, profile: Profile, instance: bool = False) -> None:
    """Print an estimate to stderr if a registration on a CPU will take long or need much memory."""
    if best_device().type != "cpu":
        return
    cost = expected_cost(pairs, profile, instance, torch.get_num_threads())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if cost.seconds < LONG and cost.bytes < MUCH * memory:
        return
    typer.echo(
        f"note: {' x '.join(map(str, pairs.spatial))} voxels with {pairs.num_labels} labels: about "
        f"{max(1, round(cost.seconds / 60))} min and {cost.bytes / 1e9:.1f} GB of the machine's "
        f"{memory / 1e9:.0f} GB. Coarser or cropped volumes, fewer labels, or fewer --levels and --steps take less.",
        err=True,
    )


def bars() -> Watch:
    """A progress bar for the steps of each level of optimisation, if stderr is a terminal."""
    number = itertools.count(1)

    def watch(steps: range) -> Iterable[int]:
        return tqdm(steps, desc=f"level {next(number)}", unit="step", leave=False, disable=None)

    return watch
