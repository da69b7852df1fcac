"""Check that every part runs on a GPU and agrees with the CPU, and measure its time and memory.

    python -m benchmarks.on_gpu

It uses untrained networks and a phantom pair of lungs, so no data are needed. Time and memory are those of a 3D
profile. The results of GPU and CPU are compared at a small size, in 32 bit without TF32. If a part fails, this is
reported and the others are still checked. Without a GPU everything runs on the CPU, and the comparison means nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import seconds_in_turn, synchronise
from benchmarks.rows import RESULTS, pair_of_labels
from pairdiff_core import absorbing, registration, vqae
from pairdiff_core.data.phantom_lungs import lung_pairs
from pairdiff_core.pipeline.models import NEW_MODEL
from pairdiff_core.profiles import Level, Profile, get_profile
from pairdiff_core.storage import provenance, write_json
from pairdiff_core.training import best_device, fit, generator, new_fabric

STEPS = 5  # of each training; the first is not timed
AT_ONCE = 8  # pairs that are sampled together, as in the pipeline
# How far a result on the device may be from that on the CPU, as a share of its largest value.
TOLERANCE = {
    "vqae: logits": 1e-3,
    "denoiser: logits": 1e-3,
    "registration network: displacement": 1e-3,
    "instance optimisation: displacement": 1e-2,  # Adam magnifies the rounding of small gradients
    "sampler: tokens": 0.0,
}


def training_step(profile: Profile, stage: str, loss: Callable[..., Any], batch: Any) -> float:
    """Median seconds of a step of the training loop, the transfer of its batch included."""
    started: list[float] = []

    def timed(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        synchronise()
        started.append(time.perf_counter())
        return loss(model, batch)

    settings, fabric = replace(getattr(profile, stage), steps=STEPS), new_fabric(stage in profile.mixed_precision)
    fit(NEW_MODEL[stage](profile), timed, lambda step: batch, settings, fabric=fabric, description=stage)
    return statistics.median(after - before for before, after in pairwise(started[1:]))


def costs(profile: Profile) -> dict[str, Callable[[], float]]:
    """The timed parts: by name, a function that returns the seconds."""
    device, codes, sampler = best_device(), profile.vqae.codes, profile.synthesis
    pair = lung_pairs(1, spatial=profile.spatial)
    patches = pair.labels[(..., *map(slice, profile.vqae.patches.size))].repeat(profile.vqae.batch, 1, 1, 1, 1)
    pairs = pair.labels.repeat(profile.registration.batch, 1, 1, 1, 1)
    tokens = torch.randint(codes, (profile.denoiser.batch, *NEW_MODEL["denoiser"](profile).grid))
    masked = absorbing.training_batch(tokens.flatten(1), codes, [generator(index) for index in range(len(tokens))])
    vqae_loss = partial(vqae.training_loss, codes=codes)
    registration_loss = partial(registration.training_loss, num_labels=2, settings=profile.registration)

    def sample(model: nn.Module) -> torch.Tensor:
        masks, random = torch.full((AT_ONCE, model.length), codes, device=device), generator(0, device=device)
        with new_fabric("synthesis" in profile.mixed_precision).autocast():
            return next(absorbing.reveal(model, masks, codes, random, sampler.steps, sampler.temperature))

    def use(stage: str, work: Callable[[nn.Module], Any]) -> float:
        return seconds_in_turn(partial(work, NEW_MODEL[stage](profile).to(device).eval()), repeats=1)[0]

    return {
        "vqae: one training step": lambda: training_step(profile, "vqae", vqae_loss, patches),
        "denoiser: one training step": lambda: training_step(profile, "denoiser", absorbing.training_loss, masked),
        "registration: one training step": lambda: training_step(profile, "registration", registration_loss, pairs),
        f"denoiser: one sampling step, {AT_ONCE} pairs": lambda: use("denoiser", sample),
        "registration: one pair, network and instance": lambda: use(
            "registration", partial(registration.register, pair, profile)
        ),
        "vqae: encoding of one pair": lambda: use("vqae", lambda model: vqae.encode_pairs(model, pair.labels)),
        "vqae: decoding of one pair": lambda: use("vqae", lambda model: vqae.decode_labels(model, tokens[:1])),
    }


def results(device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """The compared results: by name, a function that computes one on a device, from the same weights and input."""
    profile = get_profile("quick", 3)
    profile = replace(profile, denoiser=replace(profile.denoiser, layers=2))  # quick itself has no attention
    codes, labels = profile.vqae.codes, pair_of_labels((64, 32, 32)).to(device)
    fixed, moving = (registration.label_maps(image, 2) for image in labels.unbind(1))

    def new(stage: str) -> nn.Module:
        model = NEW_MODEL[stage](profile)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and not tensor.any():  # zeros would hide errors in the layers before
                nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5)
        return model.to(device).eval()

    def optimised() -> torch.Tensor:
        level, zero = (
            Level(scale=1, control=4, steps=12, learning_rate=0.2, bending=0.5),
            fixed.new_zeros(1, 3, 1, 1, 1),
        )
        found = registration.optimise(fixed, moving, (zero,), level, smoothness=0.05, squarings=5, only_near=True)
        return registration.integrate(found, 5).displacement

    def sampled() -> torch.Tensor:
        logits = 100.0 * torch.rand(2, 200, codes).argsort(2).to(device)  # makes draws certain: random numbers differ
        return absorbing.sample(lambda tokens: logits, 2, 200, codes, generator(0, device=device), steps=8)

    few = labels[..., -16:, -16:, -16:]  # among many tokens, rounding may decide between two codes
    functions = (
        lambda: new("vqae")(few).logits,
        lambda: new("denoiser")(torch.randint(codes + 1, (1, 3328)).to(device)),
        lambda: new("registration")(fixed, moving).displacement,
        optimised,
        sampled,
    )
    return dict(zip(TOLERANCE, functions, strict=True))


def compare(name: str) -> dict[str, Any]:
    """The largest difference between the device and the CPU, and whether it is within the tolerance."""
    found = []
    for device in (best_device(), torch.device("cpu")):
        torch.manual_seed(0)
        found.append(results(device)[name]().detach().cpu().double())
    allowed, difference = TOLERANCE[name] * float(found[1].abs().max()), float((found[0] - found[1]).abs().max())
    agrees = difference <= allowed
    return {"device": best_device().type, "largest_difference": difference, "allowed": allowed, "agrees": agrees}


def cost(part: Callable[[], float]) -> dict[str, Any]:
    """Seconds and, on a GPU, the peak memory in GiB."""
    cuda = best_device().type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    return {"seconds": part(), "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}


def measure(profile: Profile) -> Iterator[dict[str, Any]]:
    """Yield a row for each timed part and each comparison; if it fails, it has an ``error`` instead of numbers."""
    parts = {name: partial(cost, part) for name, part in costs(profile).items()}
    for name, part in (parts | {name: partial(compare, name) for name in TOLERANCE}).items():
        torch.backends.cudnn.allow_tf32 = name not in TOLERANCE
        torch.manual_seed(0)
        try:
            row = part()
        except Exception as error:  # whatever goes wrong on this machine
            row = {"error": f"{type(error).__name__}: {error}"}
        yield {"name": name} | row
        gc.collect()
        with suppress(RuntimeError):  # after some errors CUDA refuses everything
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=("quick", "paper"), default="paper", help="settings of the timed parts")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json", help="file to write")
    chosen = parser.parse_args()
    started, rows, made_by = time.perf_counter(), [], provenance(chosen.profile, 0, best_device())
    for row in measure(get_profile(chosen.profile, 3)):
        if "error" in row:
            text = row["error"].splitlines()[0]
        elif "seconds" in row:
            text = f"{row['seconds']:9.3g} s" + ("" if row["peak_gib"] is None else f"{row['peak_gib']:9.3g} GiB")
        else:
            text = f"{row['device']} {'agrees' if row['agrees'] else 'DIFFERS'}: difference "
            text += f"{row['largest_difference']:.2g}, {row['allowed']:.2g} allowed"
        print(f"{row['name']:45} {text}", flush=True)
        rows.append(row)
        made_by["wall_seconds"] = time.perf_counter() - started
        write_json(chosen.json, {"rows": rows, "provenance": made_by})


if __name__ == "__main__":
    main()
