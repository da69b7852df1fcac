"""What is compared, a function for each part of the method. Each returns lines of the table.

``Sizes`` are those of the published procedure, or tiny ones, with which the tests see that all of this works.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import published
from benchmarks.measure import Row, peak_gib, seconds_in_turn
from pairdiff_core import absorbing, pipeline, registration, vqae
from pairdiff_core.data import load_pairs
from pairdiff_core.profiles import get_profile
from pairdiff_core.training import best_device, fast_in_bfloat16
from pairdiff_core.volume_registration import with_levels

BRIEF = {"levels": 2, "steps": 20}  # of the optimiser, where time counts more than tenths of a millimetre
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


def pair_of_maps(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Vessels of a drawn pair, fixed and moving, float (1, 1, *spatial)."""
    profile = replace(get_profile(sizes.phantom, 3), max_pairs=1, phantom_subjects=1)
    labels = load_pairs("phantom3d", "train", profile).labels[:1]
    fixed, moving = (
        F.interpolate(registration.label_maps(image, 2), sizes.spatial).to(best_device())
        for image in labels.unbind(1)
    )
    return fixed, moving


# ---------------------------------------------------------------------------------------------- the autoencoder


def vqae_step(sizes: Sizes, bfloat16: bool, channels_last: bool = False) -> Callable[[], float]:
    """One training step of the published autoencoder on a piece of a drawn pair."""
    torch.manual_seed(0)
    model = on_device(published.Autoencoder())
    if channels_last:
        model = model.to(memory_format=torch.channels_last_3d)
    middle = [slice((size - sizes.patch) // 2, (size + sizes.patch) // 2) for size in sizes.spatial]
    labels = torch.cat(pair_of_maps(sizes), 1)[(..., *middle)].to(torch.uint8)  # (1, 2, *patch)

    def loss() -> torch.Tensor:
        with in_bfloat16(bfloat16):
            return model.loss(labels)

    return training_step(model, loss, 5e-4)


def training_step(
    model: nn.Module, loss: Callable[[], torch.Tensor], learning_rate: float
) -> Callable[[], float]:
    """One step of Adam; it returns the loss before it."""
    adam = torch.optim.Adam(model.parameters(), learning_rate)

    def step() -> float:
        value = loss()
        adam.zero_grad()
        value.backward()
        adam.step()
        return float(value.detach())

    return step


def autoencoder(sizes: Sizes) -> Iterator[Row]:
    losses: tuple[list[float], list[float]] = ([], [])

    def work(kept: list[float], bfloat16: bool) -> Callable[[], None]:
        step = vqae_step(sizes, bfloat16)
        return lambda: kept.append(step())

    ours, theirs = (work(kept, bfloat16) for kept, bfloat16 in zip(losses, (True, False), strict=True))
    seconds = seconds_in_turn(ours, theirs, repeats=3 * sizes.repeats)
    yield Row("one VQ-AE training step, a 64^3 patch", "s", *seconds, 1.5)
    off = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    yield Row(
        f"the loss of the first {len(losses[0])} steps: largest difference", "%", 100 * off, None, 2.0, True
    )


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


def published_denoiser(sizes: Sizes) -> published.Denoiser:
    torch.manual_seed(0)
    model = published.Denoiser(math.prod(sizes.tokens), layers=sizes.layers, width=sizes.width)
    return on_device(model).eval()


def our_denoiser(sizes: Sizes) -> nn.Module:
    """With the same weights."""
    model = absorbing.Denoiser(published.CODES, sizes.tokens, sizes.layers, sizes.width, 16, 2 * sizes.width)
    model.load_state_dict(published_denoiser(sizes).state_dict())
    return on_device(model).eval()


def in_bfloat16(wanted: bool = True) -> torch.autocast:
    """What a profile's ``mixed_precision`` switches on, if the device is fast in it."""
    device = best_device()
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and fast_in_bfloat16(device))


def denoiser_pass(ours: bool, sizes: Sizes) -> Callable[[], torch.Tensor]:
    """One pass over all tokens of a pair."""
    model = our_denoiser(sizes) if ours else published_denoiser(sizes)
    tokens = torch.randint(published.CODES + 1, (1, math.prod(sizes.tokens)), device=best_device())

    @torch.no_grad()
    def once() -> torch.Tensor:
        with in_bfloat16(ours):
            return model(tokens)

    return once


def denoiser(sizes: Sizes) -> Iterator[Row]:
    ours, theirs = (denoiser_pass(side, sizes) for side in (True, False))
    yield Row("one denoiser pass", "s", *seconds_in_turn(ours, theirs, repeats=sizes.repeats), 3.0)
    off = (ours().float() - theirs()).norm() / theirs().norm()
    yield Row("one denoiser pass: relative error", "%", 100 * float(off), None, 1.0, absolute=True)
    peaks = [peak_gib(denoiser_pass, side, sizes) for side in (True, False)]
    yield Row("one denoiser pass: peak memory", "GiB", *peaks, 2.0)


def sampling_pass(ours: bool, sizes: Sizes) -> Callable[[], torch.Tensor]:
    """The first pass of a sampler, which costs as much as each of the others."""
    device, length = best_device(), math.prod(sizes.tokens)
    if not ours:
        return partial(published.sample, published_denoiser(sizes), length, published.CODES, 1, device=device)
    model, numbers = our_denoiser(sizes), get_profile("laptop", 3).synthesis
    masked = torch.full((1, length), published.CODES, device=device)
    random = torch.Generator(device).manual_seed(0)

    def once() -> torch.Tensor:
        with in_bfloat16():
            return next(
                absorbing.reveal(model, masked, published.CODES, random, numbers.steps, numbers.temperature)
            )

    return once


def sampling(sizes: Sizes) -> Iterator[Row]:
    ours, theirs = seconds_in_turn(
        *(sampling_pass(side, sizes) for side in (True, False)), repeats=sizes.repeats
    )
    passes = get_profile("laptop", 3).synthesis.steps
    yield Row(f"sampling a pair, {passes} passes instead of 256", "s", passes * ours, 256 * theirs, 10.0)


# ------------------------------------------------------------------------------------------------- registration


def published_registration_step(sizes: Sizes) -> Callable[[], float]:
    """One training step on one pair."""
    torch.manual_seed(0)
    fixed, moving = pair_of_maps(sizes)
    model = on_device(published.Registration())
    return training_step(model, lambda: published.registration_loss(model, fixed, moving), 1e-3)


def registration_step(sizes: Sizes, **changes: Any) -> Callable[[], float]:
    """The same with the network and loss of the profile ``laptop``, with changes to its numbers."""
    torch.manual_seed(0)
    fixed, moving = pair_of_maps(sizes)
    profile = get_profile("laptop", 3)
    profile = replace(profile, registration=replace(profile.registration, **changes))
    numbers, model = profile.registration, on_device(pipeline.new_registration(profile))

    def loss() -> torch.Tensor:
        coarse = (registration.pool(image, numbers.scale) for image in (fixed, moving))
        return registration.registration_loss(
            model(fixed, moving), *coarse, numbers.smoothness, scales=numbers.scales or 1
        ).total

    return training_step(model, loss, 1e-3)


def registration_training(sizes: Sizes) -> Iterator[Row]:
    sides = registration_step, published_registration_step
    seconds = seconds_in_turn(*(side(sizes) for side in sides), repeats=sizes.repeats)
    yield Row("one registration training step", "s", *seconds, 5.0)
    peaks = [peak_gib(side, sizes) for side in sides]
    yield Row("one registration training step: peak memory", "GiB", *peaks, 2.0)


def instance_optimisation(sizes: Sizes, **fewer: int) -> Callable[[], object]:
    """Of one pair from nothing, by the profile ``laptop``, or with fewer ``levels`` and ``steps``."""
    fixed, moving = pair_of_maps(sizes)
    numbers = with_levels(get_profile("laptop", 3), **fewer).registration
    return partial(
        registration.register_multilevel, fixed, moving, numbers.baseline, smoothness=numbers.smoothness,
        squarings=numbers.squarings,
    )  # fmt: skip


def instance(sizes: Sizes) -> Iterator[Row]:
    ours = {"all levels": {}, "briefly": BRIEF}
    works = (
        *(instance_optimisation(sizes, **fewer) for fewer in ours.values()),
        published_registration_step(sizes),
    )
    *seconds, step = seconds_in_turn(*works, repeats=sizes.repeats)
    for name, spent in zip(ours, seconds, strict=True):
        yield Row(f"instance optimisation of one pair, {name}", "s", spent, 50 * step, 100.0)


# ------------------------------------------------------------------------------------- what was measured before


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def accuracy() -> Iterator[Row]:
    """Of the measured run on real lungs, validation pairs, beside the best published figure."""
    best = min(row["instance"] for row in read("published")["validation"]["rows"])
    methods = {row["method"]: row for row in read("lung250m")["registration"]}
    for what, name in {"no training": "baseline", "network and instance": "synthetic + instance"}.items():
        row = methods[name]
        yield Row(f"{what}: error at landmarks", "mm", row["tre_mm"], best, 2.65, absolute=True)
        yield Row(f"{what}: time", "s a pair", row["seconds_per_pair"], None, 15.0, absolute=True)
        yield Row(f"{what}: folding", "% of voxels", row["folding_percent"], None, 0.05, absolute=True)
        yield Row(f"{what}: inverse error", "voxels", row["inverse_error_px"], None, 0.1, absolute=True)
    rows = {row["trained_on"]: row["network"] for row in read("published")["validation"]["rows"]}
    network, theirs = methods["real"]["tre_mm"], rows["10 real pairs"]
    yield Row("network alone, ten real pairs: error at landmarks", "mm", network, theirs, theirs, True)
    brief = read("brief")["summary"]["tre_mean"]
    yield Row("no training, briefly: error at landmarks", "mm", brief, best, best, absolute=True)


def sampling_quality() -> Iterator[Row]:
    """Of ``python -m benchmarks.quality``: ours may be 2 % worse."""
    found = read("sampling")
    ours, theirs = found["ours"], found["published"]
    for name in ("precision", "recall", "coverage"):
        yield Row(f"sampling: {name}", "", ours[name], theirs[name], 0.98, more_is_better=True)
    name = "bits per token under a second model"
    yield Row(f"sampling: {name}", "", ours[name], theirs[name], 0.98)
    for name in ("vessel, % of the voxels", "pieces of vessel an image", "share of the largest piece"):
        off = 100 * abs(ours[name] - theirs[name]) / theirs[name]
        error = 100 * math.hypot(*(side[f"{name}: standard error"] for side in (ours, theirs))) / theirs[name]
        title = f"sampling: {name}: difference (standard error {error:.1f})"
        yield Row(title, "%", off, None, 2.0, absolute=True)


def codebook() -> Iterator[Row]:
    """Of ``python -m benchmarks.codebook``."""
    found = read("codebook")
    ours, theirs = found["ours"], found["published"]
    used = 100 * ours["codes_used"], 100 * theirs["codes_used"]
    yield Row("codes in use", "%", *used, 90.0, absolute=True, more_is_better=True)
    yield Row("codebook: Dice on unseen pairs", "", ours["dice"], theirs["dice"], 1.0, more_is_better=True)


FILES = {
    "accuracy": ("published", "lung250m", "brief"),
    "quality": ("sampling",),
    "codebook": ("codebook",),
}  # that these read


def missing_results(part: str) -> list[Path]:
    return [path for name in FILES[part] if not (path := RESULTS / f"{name}.json").exists()]


MEASURED = {"accuracy": accuracy, "quality": sampling_quality, "codebook": codebook}
PARTS = {
    "autoencoder": autoencoder,
    "decode": decode,
    "denoiser": denoiser,
    "sampling": sampling,
    "registration": registration_training,
    "instance": instance,
}
