"""What is compared, a function for each part of the method. Each returns lines of the table.

``Sizes`` are those of the published procedure, or tiny ones, with which the tests see that all of this works.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import published
from benchmarks.measure import Row, peak_gib, seconds_in_turn
from pairdiff_core import pipeline, registration, vqae
from pairdiff_core.data import load_pairs
from pairdiff_core.profiles import get_profile
from pairdiff_core.training import best_device

RESULTS = Path(__file__).parent.parent / "book" / "results"


class Sizes(NamedTuple):
    """How large everything is."""

    patch: int = 64  # voxels a side, for the autoencoder
    tokens: tuple[int, int, int] = (16, 13, 16)  # a whole pair
    spatial: tuple[int, int, int] = (128, 104, 128)  # half resolution, for registration
    phantom: str = "laptop"  # profile whose drawn pairs are registered
    layers: int = 12  # of the denoiser
    width: int = 512
    repeats: int = 3


SMALL = Sizes(32, (3, 2, 3), (128, 64, 64), "quick", layers=1, width=32, repeats=1)


def on_device(module: nn.Module) -> nn.Module:
    return module.to(best_device())


# ---------------------------------------------------------------------------------------------- the autoencoder


def vqae_step(ours: bool, patch: int) -> Callable[[], float]:
    """One training step of the published autoencoder on one patch, in bfloat16 where that is safe if it is ours."""
    torch.manual_seed(0)
    model = on_device(published.Autoencoder())
    adam = torch.optim.Adam(model.parameters(), 5e-4)
    labels = (torch.rand(1, 2, *[patch] * 3, device=best_device()) < 0.03).to(torch.uint8)

    def step() -> float:
        with torch.autocast(best_device().type, torch.bfloat16, enabled=ours):
            loss = model.loss(labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return float(loss.detach())

    return step


def autoencoder(sizes: Sizes) -> Iterator[Row]:
    seconds = seconds_in_turn(vqae_step(True, sizes.patch), vqae_step(False, sizes.patch), sizes.repeats)
    yield Row("one VQ-AE training step, a 64^3 patch", "s", *seconds, 1.5)


def decoding(ours: bool, grid: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """Decoding of a whole pair, in slabs if it is ours."""
    torch.manual_seed(0)
    model = on_device(pipeline.new_vqae(get_profile("paper", 3))).eval()
    model.codebook.vectors.normal_()
    tokens = torch.randint(published.CODES, (1, *grid), device=best_device())
    if ours:
        return partial(model.decode, tokens)

    def whole() -> torch.Tensor:
        with torch.no_grad():
            return vqae.most_likely(model.network.decode(model.codebook.look_up(tokens)))

    return whole


def decode(sizes: Sizes) -> Iterator[Row]:
    same = (decoding(True, sizes.tokens)() == decoding(False, sizes.tokens)()).double().mean()
    peaks = [peak_gib(decoding, side, sizes.tokens) for side in (True, False)]
    yield Row("decode of a full pair: peak memory", "GiB", *peaks, 2.0, absolute=True)
    yield Row("decode of a full pair: voxels alike", "%", 100 * float(same), 100.0, 100.0, True, True)


# ------------------------------------------------------------------------------------------------- the denoiser


def denoiser_pass(ours: bool, sizes: Sizes) -> Callable[[], torch.Tensor]:
    """One pass over all tokens of a pair; ours has its weights, too, in bfloat16."""
    torch.manual_seed(0)
    length = sizes.tokens[0] * sizes.tokens[1] * sizes.tokens[2]
    model = on_device(published.Denoiser(length, layers=sizes.layers, width=sizes.width)).eval()
    tokens = torch.randint(published.CODES + 1, (1, length), device=best_device())
    if ours:
        model = model.bfloat16()

    def once() -> torch.Tensor:
        with torch.inference_mode():
            return model(tokens)

    return once


def denoiser(sizes: Sizes) -> Iterator[Row]:
    ours, theirs = (denoiser_pass(side, sizes) for side in (True, False))
    yield Row("one denoiser pass", "s", *seconds_in_turn(ours, theirs, sizes.repeats), 3.0)
    off = (ours().float() - theirs()).norm() / theirs().norm()
    yield Row("one denoiser pass: relative error", "%", 100 * float(off), None, 1.0, absolute=True)
    peaks = [peak_gib(denoiser_pass, side, sizes) for side in (True, False)]
    yield Row("one denoiser pass: peak memory", "GiB", *peaks, 2.0)


# ------------------------------------------------------------------------------------------------- registration


def pair_of_maps(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Vessels of a drawn pair, fixed and moving, float (1, 1, *spatial)."""
    profile = replace(get_profile(sizes.phantom, 3), max_pairs=1, phantom_subjects=1)
    labels = load_pairs("phantom3d", "train", profile).labels[:1]
    fixed, moving = (
        F.interpolate(registration.label_maps(image, 2), sizes.spatial).to(best_device())
        for image in labels.unbind(1)
    )
    return fixed, moving


def registration_step(ours: bool, sizes: Sizes) -> Callable[[], float]:
    """One training step on one pair."""
    torch.manual_seed(0)
    fixed, moving = pair_of_maps(sizes)
    profile = get_profile("laptop", 3)
    numbers = profile.registration
    model = on_device(pipeline.new_registration(profile) if ours else published.Registration())
    adam = torch.optim.Adam(model.parameters(), 1e-3)

    def loss() -> torch.Tensor:
        if not ours:
            return published.registration_loss(model, fixed, moving)
        coarse = (registration.pool(image, numbers.scale) for image in (fixed, moving))
        deformation = model(fixed, moving)
        return registration.registration_loss(
            deformation, *coarse, numbers.smoothness, scales=numbers.scales or 1
        ).total

    def step() -> float:
        value = loss()
        adam.zero_grad()
        value.backward()
        adam.step()
        return float(value.detach())

    return step


def registration_training(sizes: Sizes) -> Iterator[Row]:
    ours, theirs = (registration_step(side, sizes) for side in (True, False))
    yield Row("one registration training step", "s", *seconds_in_turn(ours, theirs, sizes.repeats), 5.0)
    peaks = [peak_gib(registration_step, side, sizes) for side in (True, False)]
    yield Row("one registration training step: peak memory", "GiB", *peaks, 2.0)


def instance_optimisation(ours: bool, sizes: Sizes) -> Callable[[], object]:
    """Of one pair: ours goes through the levels of its profile; of the published 50 steps, one is taken."""
    if not ours:
        return registration_step(False, sizes)
    fixed, moving = pair_of_maps(sizes)
    profile = get_profile("laptop", 3)
    numbers, model = profile.registration, on_device(pipeline.new_registration(profile))
    return partial(
        registration.register, model, fixed, moving, numbers.instance, smoothness=numbers.smoothness,
        repeats=numbers.repeats or 1,
    )  # fmt: skip


def instance(sizes: Sizes) -> Iterator[Row]:
    ours, step = seconds_in_turn(
        instance_optimisation(True, sizes), instance_optimisation(False, sizes), sizes.repeats
    )
    yield Row("instance optimisation of one pair", "s", ours, 50 * step, 100.0)


# ------------------------------------------------------------------------------------- what was measured before


def accuracy() -> Iterator[Row]:
    """From the files of the measured runs, beside the published figures."""
    found = json.loads((RESULTS / "lung250m.json").read_text())["summary"]
    theirs = json.loads((RESULTS / "published.json").read_text())["validation"]["rows"]
    ten = next(row for row in theirs if row["trained_on"].startswith("10 "))
    best = min(row["instance"] for row in theirs)
    yield Row("error at landmarks: no training", "mm", found["tre_baseline"], best, 2.65, absolute=True)
    optimised = found["tre_network_synthetic_instance"]
    yield Row("error at landmarks: network and instance", "mm", optimised, best, 2.65, absolute=True)
    yield Row(
        "error at landmarks: network from ten real pairs",
        "mm",
        found["tre_network_real"],
        ten["network"],
        1.0,
    )
    yield Row("seconds a pair", "s", found["seconds_per_pair"], None, 15.0, absolute=True)
    yield Row("folding", "% of the voxels", found["folding_percent"], None, 0.05, absolute=True)
    yield Row("inverse-consistency error", "voxels", found["inverse_error_voxel"], None, 0.1, absolute=True)
    yield Row("codes in use", "%", 100 * found["codes_used"], 7.0, 90.0, True, True)


PARTS = {
    "autoencoder": autoencoder,
    "decode": decode,
    "denoiser": denoiser,
    "registration": registration_training,
    "instance": instance,
}
