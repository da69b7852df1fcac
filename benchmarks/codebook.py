"""The published kind of codebook and ours in the same autoencoder, trained for as many steps on the same batches.

    python -m benchmarks.codebook runs/lungs --data DIR --json book/results/codebook.json

``runs/lungs`` is a finished run. The other autoencoder is trained in its folder ``plain`` and goes on where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import published
from pairdiff_core import pipeline, results, vqae
from pairdiff_core.checkpoints import provenance
from pairdiff_core.profiles import Profile
from pairdiff_core.runs import Run, fingerprint, open_run
from pairdiff_core.training import best_device


class PlainCodebook(published.VectorQuantiser):
    """The published codebook in the place of ``vqae.Codebook``; its loss is weighted as the commitment is, by 0.1."""

    def forward(self, latent: torch.Tensor) -> vqae.Quantised:
        """As that of ``vqae.Codebook``."""
        return vqae.Quantised(*super().forward(latent))


def plain_vqae(profile: Profile) -> vqae.PairedVQAE:
    """The untrained autoencoder of a profile, but for its codebook."""
    model = pipeline.new_vqae(profile)
    model.codebook = PlainCodebook(profile.vqae.codes, profile.vqae.channels[-1])
    return model


def measure(run: Run) -> dict[str, Any]:
    """Dice of both kinds on the test pairs, and the share of their codes that the training pairs' tokens use."""
    stages = {
        "ours": pipeline.train_vqae(run),
        "published": pipeline.train_vqae(replace(run, folder=run.path / "plain"), plain_vqae),
    }
    measured: dict[str, Any] = {}
    for name, stage in stages.items():
        use, unseen = (results.describe_vqae(run, stage, pairs) for pairs in (run.train, run.test))
        measured[name] = {
            "dice": unseen["dice"],
            "codes_used": use["codes_used"],
            "perplexity": use["perplexity"],
            "seconds": stage.seconds,
        }
    data = {"train pairs": fingerprint(run.train.labels), "test pairs": fingerprint(run.test.labels)}
    made_by = provenance(run.profile.name, run.seed, best_device(), data) | {"dataset": run.dataset}
    return {**measured, "provenance": made_by}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codebook", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    chosen = parser.parse_args()
    measured = measure(open_run(chosen.run, chosen.data))
    results.write_results(chosen.json, measured)
    for name, value in measured["ours"].items():
        print(f"{name:12} {value:8.4g} {measured['published'][name]:8.4g}")


if __name__ == "__main__":
    main()
