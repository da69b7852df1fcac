"""Do fewer passes make worse pairs? The published number of them and ours with the same networks, judged alike.

    python -m benchmarks.quality runs/lungs --data DIR --json book/results/sampling.json

``runs/lungs`` is a finished run. On a CPU, 256 passes for each pair take most of an hour, and the training of the
second denoiser, which judges both, takes longer. Both are kept in the folder and go on where they stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pairdiff_core import absorbing, metrics, pipeline, vqae
from pairdiff_core.checkpoints import provenance
from pairdiff_core.results import write_results
from pairdiff_core.runs import Run, fingerprint, open_run
from pairdiff_core.training import best_device

PASSES, NUMBER = 256, 64  # as published; pairs of each


def judge(run: Run, second: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Tokens and the images that they stand for, beside the real training pairs."""
    device = best_device()
    bits = absorbing.bits_per_token(
        second, tokens.flatten(1).long().to(device), second.mask_token, run.generator("second", device)
    )
    real = run.train.labels
    cells = [max(2, size // 16) for size in run.train.spatial]
    features = [
        metrics.pair_features(each.flatten(0, 1)[:, None], run.train.num_labels, cells)
        for each in (real, labels)
    ]
    pieces = [metrics.compare_components(real[:1], pair[None])["synthetic"] for pair in labels]
    vessels = {
        "vessel, % of the voxels": 100 * (labels > 0).float().flatten(1).mean(1),
        "pieces of vessel an image": torch.tensor([each["number"] for each in pieces]),
        "share of the largest piece": torch.tensor([each["largest"] for each in pieces]),
    }
    return {
        **mean_and_error("bits per token under a second model", bits),
        **metrics.precision_recall_density_coverage(*features)._asdict(),
        **{key: value for name, each in vessels.items() for key, value in mean_and_error(name, each).items()},
    }


def mean_and_error(name: str, values: torch.Tensor) -> dict[str, float]:
    """Over the pairs (N,), with the standard error of the mean."""
    return {name: float(values.mean()), f"{name}: standard error": float(values.std() / len(values) ** 0.5)}


def measure(run: Run, number: int = NUMBER) -> dict[str, Any]:
    """Both samplers' figures, and how they were made."""
    made = pipeline.make(run, "synthesise")
    other = replace(run, seed=run.seed + 1, folder=run.path / "second")
    second = pipeline.train_denoiser(other, made.tokens).model
    numbers = replace(run.profile.synthesis, steps=PASSES, schedule=None, pairs=number)
    longer = replace(run, profile=replace(run.profile, synthesis=numbers), folder=run.path / "published")
    sets = {
        name: pipeline.synthesise(each, made.autoencoder, made.denoiser)[:number]
        for name, each in {"ours": run, "published": longer}.items()
    }
    figures = {
        name: judge(run, second, tokens, vqae.decode_labels(made.autoencoder.model, tokens))
        for name, tokens in sets.items()
    }
    passes = {"ours": run.profile.synthesis.steps, "published": PASSES}
    data = {"train pairs": fingerprint(run.train.labels)} | {
        name: fingerprint(tokens) for name, tokens in sets.items()
    }
    made_by = provenance(run.profile.name, run.seed, best_device(), data) | {
        "dataset": run.dataset,
        "pairs": number,
    }
    return {"passes": passes, **figures, "provenance": made_by}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    chosen = parser.parse_args()
    measured = measure(open_run(chosen.run, chosen.data))
    write_results(chosen.json, measured)
    for name, value in measured["ours"].items():
        print(f"{name:40} {value:8.4g} {measured['published'][name]:8.4g}")


if __name__ == "__main__":
    main()
