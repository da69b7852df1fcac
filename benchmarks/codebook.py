"""Compare the published codebook with ours in the same autoencoder, trained with the same steps and batches.

    python -m benchmarks.codebook runs/lungs --data DIR --json book/results/codebook.json

``runs/lungs`` is a finished run. The other autoencoder is trained in its folder ``plain``, and goes on if interrupted.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import on_run, published
from pairdiff_core import pipeline, storage, vqae
from pairdiff_core.augmentation import PatchesOfPairs, WarpedPairs
from pairdiff_core.pipeline import Run, Trained
from pairdiff_core.pipeline.models import as_trained
from pairdiff_core.profiles import Profile, trained_settings
from pairdiff_core.training import Samples, best_device, fit, new_fabric


class PlainCodebook(published.VectorQuantiser):
    """The published codebook in place of ``vqae.Codebook``; its loss has the weight of the commitment loss, 0.1."""

    def forward(self, latent: torch.Tensor) -> vqae.Quantised:
        """As in ``vqae.Codebook``."""
        return vqae.Quantised(*super().forward(latent))


def plain_vqae(profile: Profile) -> vqae.PairedVQAE:
    """The untrained autoencoder of a profile, with the published codebook."""
    model = pipeline.new_vqae(profile)
    model.codebook = PlainCodebook(profile.vqae.codes, profile.vqae.channels[-1])
    return model


def train_plain(run: Run) -> Trained:
    """Train that autoencoder as ``pipeline.train_vqae`` trains ours, or load it if it was trained before."""
    settings, labels, seed = run.profile.vqae, run.train.labels, run.seed_of("vqae")
    other = replace(run, folder=run.path / "plain")
    path = other.path / "vqae.safetensors"
    config = {"settings": trained_settings(settings), "inputs": {"pairs": storage.fingerprint(labels)}}
    with other.working(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model, loaded = plain_vqae(run.profile), path.exists()
        if loaded:
            tensors, description = storage.load_checkpoint(path)
            storage.check_config(path, description["config"], config)
            model.load_state_dict(tensors)
        else:
            batches: Any = WarpedPairs(labels, Samples(len(labels), settings.batch, seed), settings.augmentation)
            if settings.patches is not None:
                batches = PatchesOfPairs(batches, settings.patches)
            loss = partial(vqae.training_loss, codes=settings.codes)
            fabric = new_fabric("vqae" in run.profile.mixed_precision)
            progress = storage.Progress(path.with_suffix(".progress"), config, run.saving)
            history = fit(model, loss, batches, settings, seed=seed, fabric=fabric, progress=progress)
            description = {"config": config, "seconds": progress.seconds, "history": history}
            storage.save_checkpoint(path, model.state_dict(), description)
            progress.path.unlink(missing_ok=True)
    return as_trained(model, description, loaded=loaded)


def measure(run: Run) -> dict[str, Any]:
    """Measure Dice on the validation pairs and the codes that tokens of training pairs use, for both codebooks."""
    measured: dict[str, Any] = {}
    for name, stage in {"ours": pipeline.train_vqae(run), "published": train_plain(run)}.items():
        use, unseen = (pipeline.describe_vqae(run, stage, pairs) for pairs in (run.train, run.validation))
        measured[name] = {"dice": unseen["dice"], "codes_used": use["codes_used"], "perplexity": use["perplexity"]}
        measured[name]["seconds"] = stage.seconds
    data = {name: storage.fingerprint(getattr(run, name).labels) for name in ("train", "validation")}
    made_by = storage.provenance(run.profile.name, run.seed, best_device(), data) | {"dataset": run.dataset}
    return {**measured, "provenance": made_by}


if __name__ == "__main__":
    on_run.command("codebook", __doc__, measure)
