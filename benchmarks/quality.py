"""Are pairs worse after fewer sampling steps? Compares the published number of steps with ours, same networks.

    python -m benchmarks.quality runs/lungs --data DIR --json book/results/sampling.json

``runs/lungs`` is a finished run. On a CPU, 256 steps for each pair take most of an hour, and the training of the second
denoiser, which judges both sets of pairs, takes longer. Both are kept in the folder; an interrupted command goes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks import on_run
from pairdiff_core import absorbing, metrics, pipeline, vqae
from pairdiff_core.pipeline import Run
from pairdiff_core.storage import fingerprint, provenance
from pairdiff_core.training import best_device


def judge(run: Run, second: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Compare tokens (N, *grid) and their decoded pairs (N, 2, *spatial) with the real training pairs.

    Returns:
        ``bits per token under a second model``, precision, recall, density and coverage of the images, and what the
        vessels look like; means over the pairs come with their standard error.
    """
    device, real = best_device(), run.train.labels
    sequences = tokens.flatten(1).long().to(device)
    bits = absorbing.bits_per_token(second, sequences, second.mask_token, run.generator("second", device))
    cells = [max(2, size // 16) for size in run.train.spatial]
    images = (each.flatten(0, 1)[:, None] for each in (real, labels))
    features = [metrics.pair_features(each, run.train.num_labels, cells) for each in images]
    components = [metrics.compare_components(real[:1], pair[None])["synthetic"] for pair in labels]
    vessels = {
        "vessel, % of the voxels": 100 * (labels > 0).float().flatten(1).mean(1),
        "connected components per image": torch.tensor([each["number"] for each in components]),
        "share of the largest component": torch.tensor([each["largest"] for each in components]),
    }
    judged = mean_and_error("bits per token under a second model", bits)
    judged |= metrics.precision_recall_density_coverage(*features)
    for name, values in vessels.items():
        judged |= mean_and_error(name, values)
    return judged


def mean_and_error(name: str, values: torch.Tensor) -> dict[str, float]:
    """The mean of values (N,), one per pair, and its standard error."""
    return {name: float(values.mean()), f"{name}: standard error": float(values.std() / len(values) ** 0.5)}


def measure(run: Run, number: int = 64, steps: int = 256) -> dict[str, Any]:
    """Apply :func:`judge` to ``number`` pairs of each sampler, and record how they were made.

    Args:
        steps: of the published sampler.
    """
    made = pipeline.run_stages(run, "synthesis")
    other = replace(run, seed=run.seed + 1, folder=run.path / "second")
    second = pipeline.train_denoiser(other, made.tokens).model
    settings = replace(run.profile.synthesis, steps=steps, schedule="uniform", pairs=number)
    longer = replace(run, profile=replace(run.profile, synthesis=settings), folder=run.path / "published")
    judged: dict[str, Any] = {"steps": {"ours": run.profile.synthesis.steps, "published": steps}}
    data = {"train": fingerprint(run.train.labels)}
    for name, each in {"ours": run, "published": longer}.items():
        tokens = pipeline.synthesise(each, made.autoencoder, made.denoiser)[:number]
        judged[name] = judge(run, second, tokens, vqae.decode_labels(made.autoencoder.model, tokens))
        data[name] = fingerprint(tokens)
    made_by = provenance(run.profile.name, run.seed, best_device(), data)
    return judged | {"provenance": made_by | {"dataset": run.dataset, "pairs": number}}


if __name__ == "__main__":
    on_run.command("quality", __doc__, measure)
