"""Measured results: one run through all stages, scored on unseen pairs, as one JSON file with its provenance.

``pairdiff run evaluate`` measures a run; the files in ``book/results`` come from there.
"""

from __future__ import annotations

import base64
import json
import re
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pairdiff_core
from pairdiff_core import absorbing, metrics, pipeline, run_folder, vqae
from pairdiff_core.checkpoints import folder_hash, provenance
from pairdiff_core.fields import warp_labels
from pairdiff_core.pairs import PairSet
from pairdiff_core.registration import Deformation
from pairdiff_core.runs import Run, Stage, fingerprint
from pairdiff_core.training import best_device

SHOWN = {2: 4, 3: 1}  # pairs kept in the file as pictures, by dimensions
COMPARED = 48  # at most so many pairs of each set have their displacements compared


def measure(run: Run, made: pipeline.Made | None = None) -> dict[str, Any]:
    """Run (or load) every stage and measure it on the test pairs, which nothing was trained or chosen on.

    Args:
        made: by the stages, if they were run already.

    Returns:
        ``summary`` (the numbers that the text quotes), ``registration`` (a row a method), ``vqae``, ``denoiser``,
        ``synthetic``, ``histories``, ``pictures``, ``stages`` (seconds and machine of each, see :meth:`Run.stages`),
        ``provenance``, whose ``wall_seconds`` are those of all stages and the measuring. Shares are 0 to 1 unless a
        name ends in ``_percent``; lengths are in voxels (``_px``) or millimetres (``_mm``).
    """
    made = made or pipeline.make(run)
    autoencoder, denoiser, networks = made.autoencoder, made.denoiser, made.networks
    shown, keep = SHOWN[run.train.spatial_dims], _Kept(run)
    stages = {"vqae": autoencoder, "denoiser": denoiser, **networks}
    measured = {
        "registration": compare_methods(run, run.test, networks, keep),
        "vqae": {
            split: keep(f"vqae {split}", [autoencoder], partial(describe_vqae, run, autoencoder, pairs))
            for split, pairs in _splits(run)
        },
        "denoiser": {
            split: keep(
                f"denoiser {split}",
                [autoencoder, denoiser],
                partial(describe_denoiser, run, autoencoder, denoiser, pairs),
            )
            for split, pairs in _splits(run)
        },
        "synthetic": keep(
            "synthetic",
            [autoencoder, denoiser],
            partial(describe_synthetic, run, autoencoder, made.synthetic),
        ),
        "histories": {name: stage.history for name, stage in stages.items()},
        "pictures": {
            "synthetic": pack_labels(made.synthetic.labels[:shown]),
            "reconstructed": pack_labels(_reconstruct(autoencoder, run.test.labels[:shown])),
            "test": pack_labels(run.test.labels[:shown]),
        },
        "stages": run.stages(),
    }
    data = {"train pairs": fingerprint(run.train.labels), "test pairs": fingerprint(run.test.labels)}
    made_by = provenance(run.profile.name, run.seed, best_device(), data)
    made_by |= {"dataset": run.dataset, "pairs": {"train": len(run.train), "test": len(run.test)}}
    made_by["wall_seconds"] = keep.seconds + sum(stage["seconds"] for stage in measured["stages"].values())
    return {"summary": summarise(measured), **measured, "provenance": made_by}


class _Kept:
    """Parts of a measurement, each kept in the run's folder ``measured`` when it is done, so that an interruption
    loses one part at most. What was measured by other code, on other pairs or of other stages is measured anew.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.seconds = run, 0.0  # of all parts
        self.code = folder_hash(Path(pairdiff_core.__file__).parent, "**/*.py")

    def __call__(self, name: str, stages: Sequence[Stage], measure: Callable[[], Any]) -> Any:
        path = self.run.path / "measured" / f"{re.sub('[^a-z0-9]+', '-', name)}.json"
        depends = [self.code, fingerprint(self.run.test.labels), *(stage.fingerprint for stage in stages)]
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("depends") != depends:
            self.run.pause_if_asked()
            started = time.perf_counter()
            kept = {"result": measure(), "seconds": time.perf_counter() - started, "depends": depends}
            with self.run.working():
                run_folder.write_json(path, kept)
        self.seconds += kept["seconds"]
        return kept["result"]


def _splits(run: Run) -> list[tuple[str, PairSet]]:
    return [("train", run.train), ("test", run.test)]


def summarise(measured: dict[str, Any]) -> dict[str, float | None]:
    """The handful of numbers that the text quotes; regularity is that of the network trained on synthetic pairs."""
    rows = {row["method"]: row for row in measured["registration"]}
    gain = {name: rows[name]["dice"] - rows["before"]["dice"] for name in ("real", "synthetic")}
    summary = {
        "vqae_dice": measured["vqae"]["test"]["dice"],
        "codes_used": measured["vqae"]["train"]["codes_used"],
        "bits_per_token": measured["denoiser"]["test"]["bits_per_token"],
        "dice_before": rows["before"]["dice"],
        "dice_baseline": rows["baseline"]["dice"],
        "dice_real": rows["real"]["dice"],
        "dice_synthetic": rows["synthetic"]["dice"],
        "dice_synthetic_instance": rows["synthetic + instance"]["dice"],
        "gain_synthetic_over_real": gain["synthetic"] / gain["real"] if gain["real"] else None,
        "folding_percent": rows["synthetic"]["folding_percent"],
        "inverse_error_px": rows["synthetic"]["inverse_error_px"],
    }
    if "tre_mm" in rows["before"]:
        summary |= {f"tre_{name}": rows[name]["tre_mm"] for name in ("before", "baseline")}
        networks = {"real": "real", "augmented": "real, warped", "synthetic": "synthetic"}
        for name, row in networks.items():
            summary[f"tre_network_{name}"] = rows[row]["tre_mm"]
            summary[f"tre_network_{name}_instance"] = rows[f"{row} + instance"]["tre_mm"]
        summary["inverse_error_voxel"] = rows["synthetic"]["inverse_error_px"]
        summary["seconds_per_pair"] = rows["synthetic + instance"]["seconds_per_pair"]
    return summary


def compare_methods(
    run: Run,
    pairs: PairSet,
    networks: dict[str, Stage],
    keep: Callable[[str, Sequence[Stage], Callable[[], Any]], Any] = lambda name, stages, measure: measure(),
) -> list[dict[str, Any]]:
    """One row a method: before, the no-training baseline (where its last level is coarser than the images, also with
    one more at full size), and each network without and with instance optimisation. ``keep`` may keep the rows."""
    register = partial(pipeline.register_pairs, run, pairs)
    methods: dict[str, tuple[Sequence[Stage], Callable[[], Deformation]]] = {"baseline": ([], register)}
    if run.profile.registration.baseline[-1].scale > 1:
        methods["baseline, full size"] = ([], partial(register, full_size=True))
    for name, stage in networks.items():
        methods[name] = ([stage], partial(register, stage))
        methods[f"{name} + instance"] = ([stage], partial(register, stage, instance=True))
    rows = [{"method": "before", **score(pairs)}]
    for name, (stages, method) in methods.items():
        rows.append({"method": name, **keep(f"registration {name}", stages, partial(_row, pairs, method))})
    return rows


def _row(pairs: PairSet, method: Callable[[], Deformation]) -> dict[str, Any]:
    started = time.perf_counter()
    deformation = method()
    seconds = (time.perf_counter() - started) / len(pairs)
    return {**score(pairs, deformation), "seconds_per_pair": seconds}


def score(pairs: PairSet, deformation: Deformation | None = None) -> dict[str, Any]:
    """How well pairs are registered; without a deformation, how well they overlap before.

    Returns:
        ``dice`` (mean over pairs of the mean over structures), ``dice_per_pair``, ``dice_per_structure``; of a
        deformation also ``folding_percent``, ``log_jacobian_sd`` and ``inverse_error_px`` (means over pairs); where
        landmarks are known, ``tre_mm`` (mean over pairs of the mean over landmarks), over all landmarks of all pairs
        ``tre_all`` and ``tre_percentiles`` (0 to 100), and ``cases``: name, errors and regularity of each pair.
        Errors are described by :func:`metrics.describe_errors`.
    """
    displacement = torch.zeros(len(pairs), pairs.spatial_dims, *pairs.spatial)
    regular: dict[str, torch.Tensor] = {}
    if deformation is not None:
        displacement = deformation.displacement
        regular = {
            "folding_percent": metrics.folding_percent(displacement),
            "log_jacobian_sd": metrics.log_jacobian_sd(displacement),
            "inverse_error_px": metrics.inverse_consistency_error(*deformation),
        }
    dice = metrics.dice(warp_labels(pairs.moving, displacement), pairs.fixed, pairs.num_labels)
    found = {"dice": float(dice.nanmean(1).mean()), "dice_per_pair": dice.nanmean(1).tolist(),
             "dice_per_structure": _per_structure(pairs, dice)}  # fmt: skip
    found |= {name: float(values.mean()) for name, values in regular.items()}
    return found | _score_landmarks(pairs, displacement, regular)


def _score_landmarks(
    pairs: PairSet, displacement: torch.Tensor, regular: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """``tre_mm``, ``tre_all`` and ``cases`` of the pairs that have landmarks; empty if none has."""
    cases, errors = [], []
    for index, points in enumerate(pairs.landmarks or ()):
        if len(points):
            errors.append(metrics.target_registration_error(displacement[index], points, pairs.spacing))
            measured = {name: float(values[index]) for name, values in regular.items()}
            cases.append({"name": pairs.names[index], "tre": metrics.describe_errors(errors[-1]), **measured})
    if not cases:
        return {}
    mean = sum(case["tre"]["mean"] for case in cases) / len(cases)
    together = torch.cat(errors).double()
    curve = together.quantile(torch.linspace(0, 1, 101, dtype=torch.float64)).tolist()
    return {
        "tre_mm": mean,
        "tre_all": metrics.describe_errors(together),
        "tre_percentiles": curve,
        "cases": cases,
    }


def describe_vqae(run: Run, autoencoder: Stage, pairs: PairSet) -> dict[str, Any]:
    """Reconstruction (``dice``, ``dice_per_structure``) and codebook health (``codes_used``, ``perplexity``) on pairs.

    ``pair_dice_real`` and ``pair_dice_decoded`` are the overlap of fixed and moving before and after: an autoencoder
    that encodes the average of both images makes them overlap more.
    """
    tokens = vqae.encode_pairs(autoencoder.model, pairs.labels)
    decoded = vqae.decode_labels(autoencoder.model, tokens)
    dice = metrics.dice(decoded.flatten(0, 1), pairs.labels.flatten(0, 1), pairs.num_labels)
    use = metrics.codebook_use(tokens, run.profile.vqae.codes)
    return {
        "dice": float(dice.nanmean(1).mean()),
        "dice_per_structure": _per_structure(pairs, dice),
        "pair_dice_real": float(metrics.mean_dice(pairs.fixed, pairs.moving, pairs.num_labels).mean()),
        "pair_dice_decoded": float(metrics.mean_dice(decoded[:, 0], decoded[:, 1], pairs.num_labels).mean()),
        "codes_used": use.used,
        "perplexity": use.perplexity,
    }


def _reconstruct(autoencoder: Stage, labels: torch.Tensor) -> torch.Tensor:
    return vqae.decode_labels(autoencoder.model, vqae.encode_pairs(autoencoder.model, labels))


def _per_structure(pairs: PairSet, dice: torch.Tensor) -> dict[str, float]:
    return dict(zip(pairs.label_names[1:], dice.nanmean(0).tolist(), strict=True))


def describe_denoiser(run: Run, autoencoder: Stage, denoiser: Stage, pairs: PairSet) -> dict[str, float]:
    """``bits_per_token``: the exact bound on at most 64 pairs, spread over the set, with its standard error."""
    device = best_device()
    labels = pairs.labels[:: -(-len(pairs) // 64)]
    sequences = (
        vqae.encode_pairs(autoencoder.model, labels).flatten(1).long().to(device)
    )  # (N, *grid) -> (N, L)
    generator = run.generator("bits per token", device)
    bits = absorbing.bits_per_token(denoiser.model, sequences, denoiser.model.mask_token, generator)
    return {"bits_per_token": float(bits.mean()), "standard_error": float(bits.std() / len(bits) ** 0.5)}


def describe_synthetic(run: Run, autoencoder: Stage, synthetic: PairSet) -> dict[str, Any]:
    """Synthetic pairs beside the real training pairs, with held-out real pairs beside the same as the yardstick.

    ``areas``, ``components`` (connected pieces) and ``displacements`` (by the no-training baseline) compare sizes;
    ``quality`` has precision, recall, density and coverage of single images, in the feature space of
    :func:`metrics.pair_features` with one cell per 16 voxels; ``memorisation`` the audit against training pairs and
    images. Quality and audit see real pairs after the autoencoder, as the synthetic ones are: otherwise its blur would
    pass for novelty. Quality is not asked of pairs: thousands of real pairs are made of a few images, which puts their
    nearest neighbours so close that nothing new, held-out real pairs included, is ever among them.
    """
    compared = min(COMPARED, len(run.train), len(synthetic))
    some = torch.randperm(len(run.train), generator=run.generator("compare"))[:compared].tolist()
    real, new = (
        pipeline.register_pairs(run, pairs).displacement for pairs in (run.train[some], synthetic[:compared])
    )
    seen = {name: _reconstruct(autoencoder, pairs.labels) for name, pairs in _splits(run)} | {
        "synthetic": synthetic.labels
    }
    images = {
        name: labels.flatten(0, 1)[:, None] for name, labels in seen.items()
    }  # (N, 2, *s) -> (2N, 1, *s)
    return {
        "pairs": len(synthetic),
        "areas": metrics.compare_areas(run.train.labels, synthetic.labels, run.train.label_names),
        "components": metrics.compare_components(_each_image(run.train), synthetic.labels),
        "displacements": metrics.compare_displacements(real, new),
        "quality": _quality(run, images),
        "memorisation": {
            "pairs": _audit(seen["synthetic"], seen["train"], seen["test"]),
            "images": _audit(images["synthetic"], images["train"], images["test"]),
        },
    }  # fmt: skip


def _quality(run: Run, images: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Precision, recall, density and coverage of as many synthetic images as there are held-out ones."""
    cells = [max(2, size // 16) for size in run.train.spatial]
    chosen = {name: images[name][_each_image_once(pairs)] for name, pairs in _splits(run)}
    order = torch.randperm(len(images["synthetic"]), generator=run.generator("quality"))
    chosen["synthetic"] = images["synthetic"][order[: len(chosen["test"])]]
    features = {
        name: metrics.pair_features(labels, run.train.num_labels, cells) for name, labels in chosen.items()
    }
    neighbours = min(5, *(len(images) - 1 for images in chosen.values()))
    return {
        name: metrics.precision_recall_density_coverage(
            features["train"], features[name], neighbours
        )._asdict()
        for name in ("synthetic", "test")
    } | {"images": len(chosen["test"]), "neighbours": neighbours}


def _each_image(pairs: PairSet) -> torch.Tensor:
    """Each image once, uint8 (N, 1, *spatial)."""
    return pairs.labels.flatten(0, 1)[_each_image_once(pairs)][:, None]


def _each_image_once(pairs: PairSet) -> list[int]:
    """Indices into the 2N images of N pairs: the first occurrence of each, by name."""
    names = [image for pair in pairs.names for image in pair.split("~")]
    return [names.index(name) for name in dict.fromkeys(names)]


def _audit(samples: torch.Tensor, training: torch.Tensor, held_out: torch.Tensor) -> dict[str, Any]:
    audit = metrics.memorisation_audit(samples, training, held_out)
    return {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in audit._asdict().items()
    }


def pack_labels(labels: torch.Tensor) -> dict[str, Any]:
    """Label maps uint8 of any shape as text that fits into JSON: ``shape`` and zlib-packed base64 ``bytes``."""
    packed = base64.b85encode(zlib.compress(labels.contiguous().numpy().tobytes(), 9)).decode()
    return {"shape": list(labels.shape), "bytes": packed}


def unpack_labels(packed: dict[str, Any]) -> torch.Tensor:
    """The label maps that :func:`pack_labels` packed."""
    content = np.frombuffer(zlib.decompress(base64.b85decode(packed["bytes"])), dtype=np.uint8)
    return torch.from_numpy(content.copy()).reshape(packed["shape"])


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write results as JSON, one value a line down to lists of numbers; an older file is replaced at the very end."""
    run_folder.write_json(Path(path), _rounded(results))


def _rounded(value: Any) -> Any:
    """Floats to six digits: what is beyond differs between machines and would only make the file long."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
