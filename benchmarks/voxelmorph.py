"""Train MONAI's VoxelMorph with the pairs, the loss and the training time of our lung network.

    python -m benchmarks.voxelmorph --data DIR --run FOLDER --json book/results/voxelmorph.json

Only the network differs: it sees the pairs at 4 mm, moved by other people's breaths, and is trained for as long as
ours. Like ours, it registers in both directions at once, but it is not inverse consistent by construction. An
interrupted training goes on if the command is repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import VoxelMorph, VoxelMorphUNet
from torch import nn

from pairdiff_core.augmentation import WarpedPairs
from pairdiff_core.data.breathing import load_motions
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline import Run, new_registration
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import Deformation, evaluate, label_maps, pool, summarise, training_loss
from pairdiff_core.storage import Progress, Saving, provenance, write_json
from pairdiff_core.training import Samples, best_device, fit

SCALE, LEVELS = 2, 4  # pooling of the maps that it sees; halvings in its U-Net
WARM, TIMED = 1, 4  # steps of each network that are timed


class VoxelMorphBothWays(nn.Module):
    """VoxelMorph (Balakrishnan et al., 2019) as in MONAI, applied to (A, B) and to (B, A)."""

    def __init__(self) -> None:
        super().__init__()
        unet = VoxelMorphUNet(
            spatial_dims=3, in_channels=2, unet_out_channels=32,
            channels=(16, 32, 32, 32, 32, 32, 32, 32), final_conv_channels=(16, 16),
        )  # fmt: skip
        self.network = VoxelMorph(unet, integration_steps=7, half_res=True, spatial_dims=3)

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> Deformation:
        """Register maps (N, 1, *spatial); the deformation is on the pooled grid, in its voxels."""
        images = pool(torch.cat([fixed, moving]), SCALE)
        grid = images.shape[2:]
        images = F.pad(images, [side for size in reversed(grid) for side in (0, -size % 2**LEVELS)])
        fixed, moving = images.chunk(2)
        _, displacement = self.network(torch.cat([moving, fixed]), torch.cat([fixed, moving]))
        return Deformation.from_both(displacement).cropped(grid)


def seconds_a_step(model: nn.Module, loss: Callable[..., Any], batches: WarpedPairs) -> float:
    """Measure the seconds per training step on a few steps, which change the model."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for step in range(WARM + TIMED):
        if step == WARM:
            started = time.perf_counter()
        optimiser.zero_grad()
        loss(model, batches(step))["loss"].backward()
        optimiser.step()
    return (time.perf_counter() - started) / TIMED


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.voxelmorph", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data; default: PAIRDIFF_DATA")
    parser.add_argument("--run", type=Path, required=True, help="folder for the training's progress")
    parser.add_argument("--json", type=Path, default=Path("book/results/voxelmorph.json"))
    chosen = parser.parse_args()
    run = Run("lung250m", get_profile("laptop", 3), folder=chosen.run, data=chosen.data)
    settings, pairs = run.profile.registration, run.train

    def loss(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return training_loss(model, labels, pairs.num_labels, settings)

    samples = Samples(len(pairs), settings.batch, run.seed_of("registration"))
    motions = load_motions(run.dataset, run.data, run.seed)
    batches = WarpedPairs(pairs.labels, samples, settings.breathing, motions)
    torch.manual_seed(run.seed)
    model, timed = VoxelMorphBothWays().to(best_device()), chosen.run / "steps"
    if timed.exists():
        steps = int(timed.read_text())
    else:
        ours, theirs = (seconds_a_step(each, loss, batches) for each in (new_registration(run.profile), model))
        steps = round(settings.steps * ours / theirs)
        chosen.run.mkdir(parents=True, exist_ok=True)
        timed.write_text(str(steps))
    settings_of_fit = replace(settings, steps=steps, learning_rate=1e-3)
    progress = Progress(chosen.run / "voxelmorph.progress", {"steps": steps}, Saving())
    history = fit(model, loss, batches, settings_of_fit, progress=progress, description="VoxelMorph")

    @torch.no_grad()
    def register(pair: PairSet) -> Deformation:
        maps = (label_maps(image, pair.num_labels) for image in (pair.fixed, pair.moving))
        return model(*maps).resized(pair.spatial)

    row = {"method": "VoxelMorph (MONAI)", "steps": steps} | summarise(
        list(evaluate(run.validation, register)), pairs.label_names
    )
    print({key: row[key] for key in ("tre_mm", "folding_percent", "inverse_consistency_error", "seconds_per_pair")})
    made_by = provenance("laptop", run.seed, best_device())
    write_json(chosen.json, {"rows": [row], "history": history, "provenance": made_by})


if __name__ == "__main__":
    main()
