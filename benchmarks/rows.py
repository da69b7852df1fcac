"""The rows of the table: a function for each part of the method.

``Sizes`` are those of the published procedure, or tiny ones for the tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import published
from benchmarks.measure import Row, peak_gib, seconds_in_turn
from pairdiff_core import absorbing, pipeline, registration, vqae
from pairdiff_core.data.phantom_lungs import lung_pairs
from pairdiff_core.profiles import RegistrationSettings, get_profile, with_levels
from pairdiff_core.training import best_device, new_fabric

BRIEF = {"levels": 2, "steps": 20}  # of the optimiser, if time matters more than tenths of a millimetre
RESULTS = Path(__file__).parent.parent / "book" / "results"
PAPER, LAPTOP = get_profile("paper", 3), get_profile("laptop", 3)


class Sizes(NamedTuple):
    """Sizes of inputs and networks."""

    patch: int = 64  # voxels a side, for the autoencoder
    tokens: tuple[int, ...] = published.TOKENS  # of a whole pair
    spatial: tuple[int, ...] = published.HALF  # voxels, for registration
    layers: int = 12  # of the denoiser
    width: int = 512
    repeats: int = 3


SMALL = Sizes(32, (3, 2, 3), (128, 64, 64), layers=1, width=32, repeats=1)


def on_device(module: nn.Module) -> nn.Module:
    return module.to(best_device())


@cache
def _lungs() -> torch.Tensor:
    return lung_pairs(1, spatial=published.HALF).labels


def pair_of_labels(spatial: tuple[int, ...]) -> torch.Tensor:
    """The middle of a phantom pair at half resolution, uint8 (1, 2, *spatial), on the best device."""
    middle = [
        slice((size - wanted) // 2, (size + wanted) // 2) for size, wanted in zip(published.HALF, spatial, strict=True)
    ]
    return _lungs()[(..., *middle)].contiguous().to(best_device())


def pair_of_maps(sizes: Sizes) -> list[torch.Tensor]:
    """Vessels of that pair, fixed and moving, float (1, 1, *spatial) each."""
    return [registration.label_maps(image, 2) for image in pair_of_labels(sizes.spatial).unbind(1)]


def training_step(model: nn.Module, loss: Callable[[], torch.Tensor], learning_rate: float) -> Callable[[], float]:
    """A function that takes one step of Adam and returns the loss before it."""
    adam = torch.optim.Adam(model.parameters(), learning_rate)

    def step() -> float:
        torch.manual_seed(0)  # for the random numbers of our codebook
        value = loss()
        adam.zero_grad()
        value.backward()
        adam.step()
        return float(value.detach())

    return step


# ---------------------------------------------------------------------------------------------- the autoencoder


def vqae_step(ours: bool, sizes: Sizes, bfloat16: bool = False, channels_last: bool = False) -> Callable[[], float]:
    """One training step of our autoencoder or of the published one, from the same weights, on a patch of a pair."""
    torch.manual_seed(0)
    model = on_device(pipeline.new_vqae(PAPER) if ours else published.Autoencoder())
    if channels_last:
        model = model.to(memory_format=torch.channels_last_3d)
    labels, fabric = pair_of_labels(3 * (sizes.patch,)), new_fabric(bfloat16)

    def loss() -> torch.Tensor:
        with fabric.autocast():
            return vqae.training_loss(model, labels, published.CODES)["loss"] if ours else model.loss(labels)

    return training_step(model, loss, PAPER.vqae.learning_rate)


def autoencoder(sizes: Sizes) -> Iterator[Row]:
    losses: list[float] = []
    ours, theirs = vqae_step(True, sizes, bfloat16=True), vqae_step(False, sizes)
    seconds = seconds_in_turn(lambda: losses.append(ours()), theirs, repeats=3 * sizes.repeats)
    yield Row("one autoencoder training step, 64 x 64 x 64 voxels", "s", *seconds, 1.5)
    in_32_bit = vqae_step(True, sizes)
    off = max(abs(loss / in_32_bit() - 1) for loss in losses)
    name = f"autoencoder loss, first {len(losses)} steps: largest difference from 32 bit"
    yield Row(name, "%", 100 * off, None, 2.0, absolute=True)


def decoding(ours: bool, grid: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """A function that decodes a whole pair, in tiles if it is ours."""
    torch.manual_seed(0)
    model = on_device(pipeline.new_vqae(PAPER)).eval()
    model.codebook.vectors.normal_()
    tokens = torch.randint(published.CODES, (1, *grid), device=best_device())
    if ours:
        return partial(model.decode, tokens)

    @torch.no_grad()
    def whole() -> torch.Tensor:
        return vqae.most_likely(model.network.decode(model.codebook.look_up(tokens)))

    return whole


def decode(sizes: Sizes) -> Iterator[Row]:
    same = (decoding(True, sizes.tokens)() == decoding(False, sizes.tokens)()).double().mean()
    peaks = [peak_gib(decoding, side, sizes.tokens) for side in (True, False)]
    yield Row("decoding a whole pair: peak memory", "GiB", *peaks, 2.0, absolute=True)
    yield Row("decoding a whole pair: voxels with the same label", "%", 100 * float(same), 100.0, 100.0, True, True)


# ------------------------------------------------------------------------------------------------- the denoiser


def new_denoiser(ours: bool, sizes: Sizes) -> nn.Module:
    """Our denoiser or the published one, with the same weights."""
    torch.manual_seed(0)
    model = published.Denoiser(math.prod(sizes.tokens), layers=sizes.layers, width=sizes.width)
    if ours:
        size = {"layers": sizes.layers, "width": sizes.width, "feed_forward": 2 * sizes.width}
        theirs = model.state_dict()
        model = absorbing.Denoiser(replace(PAPER.denoiser, **size), published.CODES, sizes.tokens)
        model.load_state_dict(theirs)
    return on_device(model).eval()


def denoiser_pass(ours: bool, sizes: Sizes) -> Callable[[], torch.Tensor]:
    """One forward pass over all tokens of a pair."""
    model, fabric, length = new_denoiser(ours, sizes), new_fabric(bfloat16=ours), math.prod(sizes.tokens)
    tokens = torch.randint(published.CODES + 1, (1, length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(best_device())  # the same on both sides

    @torch.no_grad()
    def once() -> torch.Tensor:
        with fabric.autocast():
            return model(tokens)

    return once


def denoiser(sizes: Sizes) -> Iterator[Row]:
    ours, theirs = (denoiser_pass(side, sizes) for side in (True, False))
    yield Row("one denoiser pass", "s", *seconds_in_turn(ours, theirs, repeats=sizes.repeats), 3.0)
    off = (ours().float() - theirs()).norm() / theirs().norm()
    yield Row("one denoiser pass: difference from the published one", "%", 100 * float(off), None, 1.0, absolute=True)
    peaks = [peak_gib(denoiser_pass, side, sizes) for side in (True, False)]
    yield Row("one denoiser pass: peak memory", "GiB", *peaks, 2.0)


def sampling_step(ours: bool, sizes: Sizes) -> Callable[[], torch.Tensor]:
    """The first step of a sampler; the others take as long."""
    model, device, length = new_denoiser(ours, sizes), best_device(), math.prod(sizes.tokens)
    if not ours:
        return partial(published.sample, model, length, published.CODES, 1, device=device)
    settings, fabric = LAPTOP.synthesis, new_fabric(bfloat16=True)
    masked = torch.full((1, length), published.CODES, device=device)
    random = torch.Generator(device).manual_seed(0)

    def once() -> torch.Tensor:
        with fabric.autocast():  # the uniform schedule: a cosine may reveal nothing in its first step
            return next(absorbing.reveal(model, masked, published.CODES, random, settings.steps, settings.temperature))

    return once


def sampling(sizes: Sizes) -> Iterator[Row]:
    ours, theirs = seconds_in_turn(*(sampling_step(side, sizes) for side in (True, False)), repeats=sizes.repeats)
    steps = read("sampling")["steps"]["ours"]  # at which the quality was measured
    yield Row(f"sampling a pair, {steps} steps instead of 256", "s", steps * ours, 256 * theirs, 10.0)


# ------------------------------------------------------------------------------------------------- registration


def published_registration_step(sizes: Sizes) -> Callable[[], float]:
    """One training step on one pair."""
    torch.manual_seed(0)
    fixed, moving = pair_of_maps(sizes)
    model = on_device(published.Registration())
    return training_step(model, lambda: published.registration_loss(model, fixed, moving), 1e-3)


def registration_step(sizes: Sizes, settings: RegistrationSettings = LAPTOP.registration) -> Callable[[], float]:
    """The same with our network and loss."""
    torch.manual_seed(0)
    model = on_device(pipeline.new_registration(replace(LAPTOP, registration=settings)))
    labels = pair_of_labels(sizes.spatial)
    return training_step(model, lambda: registration.training_loss(model, labels, 2, settings)["loss"], 1e-3)


def registration_training(sizes: Sizes) -> Iterator[Row]:
    sides = registration_step, published_registration_step
    seconds = seconds_in_turn(*(side(sizes) for side in sides), repeats=sizes.repeats)
    yield Row("one registration training step", "s", *seconds, 5.0)
    peaks = [peak_gib(side, sizes) for side in sides]
    yield Row("one registration training step: peak memory", "GiB", *peaks, 2.0)


def instance_optimisation(sizes: Sizes, **fewer: int) -> Callable[[], registration.Velocities]:
    """Optimisation of one pair without a network, as in the profile ``laptop`` or with fewer levels and steps."""
    fixed, moving = pair_of_maps(sizes)
    settings, zero = with_levels(LAPTOP, **fewer).registration, fixed.new_zeros(1, 3, 1, 1, 1)
    return partial(registration.refine, fixed, moving, (zero,), settings.baseline, settings)


def instance(sizes: Sizes) -> Iterator[Row]:
    ours = {"all levels": {}, "two levels": BRIEF}
    works = [instance_optimisation(sizes, **fewer) for fewer in ours.values()]
    *seconds, step = seconds_in_turn(*works, published_registration_step(sizes), repeats=sizes.repeats)
    for name, spent in zip(ours, seconds, strict=True):
        yield Row(f"instance optimisation of one pair, {name}", "s", spent, 50 * step, 100.0)


# ------------------------------------------------------------------------------------- what was measured before


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def accuracy() -> Iterator[Row]:
    """Accuracy of the measured run on real lungs (validation pairs), compared with the best published number."""
    rows = read("published")["validation"]["rows"]
    best = min(row["instance"] for row in rows)
    methods = {row["method"]: row for row in read("lung250m")["registration"]}
    for what, name in {
        "optimiser without training": "baseline",
        "network, then optimiser": "real, motion + instance",
    }.items():
        row = methods[name]
        yield Row(f"{what}: error at landmarks", "mm", row["tre_mm"], best, 2.65, absolute=True)
        for title, unit, key, target in (
            ("time", "s a pair", "seconds_per_pair", 15.0),
            ("folding", "% of voxels", "folding_percent", 0.05),
            ("inverse-consistency error", "voxels", "inverse_consistency_error", 0.1),
        ):
            yield Row(f"{what}: {title}", unit, row[key], None, target, absolute=True)
    network = methods["real"]["tre_mm"]
    theirs = next(row["network"] for row in rows if row["trained_on"] == "10 real pairs")
    yield Row("network alone, ten real pairs: error at landmarks", "mm", network, theirs, theirs, absolute=True)
    brief = read("brief")["summary"]["tre_mm"]
    yield Row("optimiser without training, two levels: error at landmarks", "mm", brief, best, best, absolute=True)


def sampling_quality() -> Iterator[Row]:
    """Results of ``python -m benchmarks.quality``; ours may be 2 % worse."""
    found = read("sampling")
    ours, theirs = found["ours"], found["published"]
    for name in ("precision", "recall", "coverage"):
        yield Row(f"sampling: {name}", "", ours[name], theirs[name], 0.98, more_is_better=True)
    name = "bits per token under a second model"
    yield Row(f"sampling: {name}", "", ours[name], theirs[name], 0.98)
    for name in ("vessel, % of the voxels", "connected components per image", "share of the largest component"):
        off = 100 * abs(ours[name] - theirs[name]) / theirs[name]
        error = 100 * math.hypot(*(side[f"{name}: standard error"] for side in (ours, theirs))) / theirs[name]
        title = f"sampling: {name}: difference (standard error {error:.1f})"
        yield Row(title, "%", off, None, 2.0, absolute=True)


def codebook() -> Iterator[Row]:
    """Results of ``python -m benchmarks.codebook``."""
    found = read("codebook")
    ours, theirs = found["ours"], found["published"]
    used = 100 * ours["codes_used"], 100 * theirs["codes_used"]
    yield Row("codebook: codes in use", "%", *used, 90.0, absolute=True, more_is_better=True)
    yield Row("codebook: Dice on unseen pairs", "", ours["dice"], theirs["dice"], 1.0, more_is_better=True)


# the result files that each part reads
FILES = {"accuracy": ("published", "lung250m", "brief"), "quality": ("sampling",), "codebook": ("codebook",)}


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
