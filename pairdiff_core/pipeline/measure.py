"""Measure a whole run: one JSON file with its provenance, the source of all numbers in the text."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pairdiff_core import absorbing, metrics, vqae
from pairdiff_core.data import data_files
from pairdiff_core.data.breathing import box_of_vessels, laid, load_motions
from pairdiff_core.pairs import PairSet, pack_labels
from pairdiff_core.pipeline.models import Trained
from pairdiff_core.pipeline.run import Run
from pairdiff_core.pipeline.stages import (
    StageResults,
    decode_pairs,
    fixed_with_itself,
    motions_for,
    run_stages,
    sample_pairs,
    warped_copies,
)
from pairdiff_core.profiles import Profile, to_json
from pairdiff_core.registration import evaluate, register, summarise, used_as_start
from pairdiff_core.storage import (
    code_hash,
    fingerprint,
    load_checkpoint,
    measured_once,
    provenance,
    write_file,
    write_json,
)
from pairdiff_core.training import best_device

SHOWN = {2: 4, 3: 1}  # pairs stored in the file as pictures, by dimensions
COMPARED, COMPARED_VOXELS = 48, 2**27  # limits for comparing displacements: pairs of each set, their voxels
PARTNERS = 6  # moving images that are drawn for one fixed image
CANDIDATES = 3  # training images that are registered to each image of the audit after registration
BITS_PAIRS = 64  # largest number of pairs whose bits per token are measured
METRICS, FINISHED = "metrics.json", "finished"  # files of a run folder
log = logging.getLogger(__name__)
QUOTED = {  # rows of the registration table that the text quotes, by their names there
    "before": "before",
    "optimiser": "baseline",
    "network_real": "real",
    "network_random_warps": "real, warped",
    "network_motion": "real, motion",
    "network_motion_instance": "real, motion + instance",
    "network_synthetic": "synthetic",
    "network_synthetic_instance": "synthetic + instance",
}


def methods(profile: Profile, networks: dict[str, Trained]) -> dict[str, tuple[partial | None, list[str]]]:
    """The methods that are compared, and the fingerprints of the networks that they depend on.

    They are: no registration; the baseline without training, also with one more level at full size if its last is
    coarser; and each network without and with instance optimisation.
    """
    found: dict[str, tuple[partial | None, list[str]]] = {"before": (None, [])}
    found["baseline"] = (partial(register, profile=profile), [])
    levels = profile.registration.baseline
    if levels[-1].scale > 1:
        finer = replace(profile.registration, baseline=(*levels, levels[-1]._replace(scale=1)))
        found["baseline, full size"] = (partial(register, profile=replace(profile, registration=finer)), [])
    for name, network in networks.items():
        by_network = partial(register, profile=profile, network=network.model)
        found[name] = (partial(by_network, instance=False), [network.fingerprint])
        found[f"{name} + instance"] = (by_network, [network.fingerprint])
    return found


def measure(run: Run, made: StageResults | None = None) -> dict[str, Any]:
    """Run (or load) every stage and measure it on the validation pairs, on which nothing was trained or chosen.

    Each part of the measurement is saved in the run's folder ``measured``, so that an interruption loses at most one
    part; it is measured again when code, settings, data or the stages it depends on have changed.

    Args:
        made: results of the stages, if they have been run already.

    Returns:
        ``summary`` (the numbers that the text quotes), ``registration`` (one row per method), ``vqae``, ``denoiser``,
        ``synthetic``, ``partners`` (if the denoiser may be given fixed images), ``histories``, ``pictures``,
        ``stages`` (seconds and machine of each), ``provenance``.
    """
    made = made or run_stages(run)
    autoencoder, denoiser, synthetic = made.autoencoder, made.denoiser, made.synthetic
    splits = {"train": run.train, "validation": run.validation}
    data = {name: fingerprint(pairs.labels) for name, pairs in splits.items()}
    common = {"code": code_hash(), "profile": to_json(run.profile), "seed": run.seed, "data": data}
    started = time.perf_counter()

    def once(name: str, depends_on: list[str], measure_part: Callable[..., Any], *arguments: Any) -> Any:
        run.pause_if_asked("measuring")
        path = run.path / "measured" / f"{re.sub('[^a-z0-9]+', '-', name)}.json"
        with run.working():
            log.info("measuring: %s", name)
            return measured_once(path, common | {"on": depends_on}, partial(measure_part, *arguments))

    def one_method(method: partial | None) -> dict[str, Any]:
        row = summarise(list(evaluate(run.validation, method)), run.validation.label_names)
        options = method.keywords if method else {}
        if "network" in options and options.get("instance", True):
            row["used_as_start"] = sum(used_as_start(run.validation, **options))
        return row

    made_from = [autoencoder.fingerprint, denoiser.fingerprint]
    measured: dict[str, Any] = {
        "registration": [
            {"method": name} | once(f"registration {name}", depends_on, one_method, method)
            for name, (method, depends_on) in methods(run.profile, made.networks).items()
        ],
        "vqae": {
            split: once(f"vqae {split}", made_from[:1], describe_vqae, run, autoencoder, pairs)
            for split, pairs in splits.items()
        },
        "denoiser": {
            split: once(f"denoiser {split}", made_from, describe_denoiser, run, autoencoder, denoiser, pairs)
            for split, pairs in splits.items()
        },
    }
    made_from.append(fingerprint(synthetic.labels))
    measured["synthetic"] = once("synthetic", made_from, describe_synthetic, run, autoencoder, synthetic)
    measured["synthetic"]["memorisation"]["registered images"] = once(
        "audit after registration", made_from, audit_after_registration, run, autoencoder, synthetic
    )
    partners = None
    if denoiser.model.given is not None:
        partners = _partners(run, autoencoder, denoiser, run.validation[:1], PARTNERS)
        measured["partners"] = once("partners", made_from, describe_partners, run, partners)
    models = {"vqae": autoencoder, "denoiser": denoiser, **made.networks}
    measured["histories"] = {name: model.history for name, model in models.items()}
    some = run.validation[: SHOWN[run.profile.spatial_dims]]
    pictures = {"synthetic": synthetic[: len(some)], "reconstructed": _decoded(autoencoder, some), "validation": some}
    if partners is not None:
        pictures["partners"] = partners
    measured["pictures"] = {name: pack_labels(pairs.labels) for name, pairs in pictures.items()}
    measured["stages"] = {path.stem: _made_by(path) for path in sorted(run.path.glob("*.safetensors"))}
    made_by = provenance(run.profile.name, run.seed, best_device(), data) | {"dataset": run.dataset}
    made_by["pairs"] = {name: len(pairs) for name, pairs in splits.items()}
    spent = [time.perf_counter() - started, *(stage["seconds"] for stage in measured["stages"].values())]
    made_by["wall_seconds"] = sum(spent)
    return {"summary": _quoted(measured), **measured, "provenance": made_by}


def keep_measured(run: Run, measured: dict[str, Any]) -> None:
    """Write what :func:`measure` returns to ``metrics.json``, and mark the run as finished."""
    write_json(run.path / METRICS, measured)
    write_file(run.path / FINISHED, _state(run).encode())


def read_measured(run: Run) -> dict[str, Any] | None:
    """What :func:`keep_measured` wrote; None if there is nothing, or code, settings, data or results have changed.

    The files of the data are listed but not read, and no pair is decoded.

    Raises:
        DataError: if the data are missing.
    """
    finished = run.path / FINISHED
    if not finished.is_file() or finished.read_text() != _state(run):
        return None
    return json.loads((run.path / METRICS).read_text())


def _state(run: Run) -> str:
    """SHA-256 of the results of a run and all they depend on; data files count by name, size and time."""
    digest = hashlib.sha256(json.dumps([run.dataset, to_json(run.profile), run.seed, code_hash()]).encode())
    for path in data_files(run.dataset, run.data):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    for path in sorted([*run.path.glob("*.safetensors"), *run.path.glob(METRICS)]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _made_by(path: Path) -> dict[str, Any]:
    """What made a result: ``seconds``, commit, date, device and threads."""
    description = load_checkpoint(path)[1]
    made_by = description["provenance"]
    return {"seconds": description["seconds"]} | {key: made_by[key] for key in ("commit", "date", "device", "threads")}


def _quoted(measured: dict[str, Any]) -> dict[str, float | None]:
    """The numbers that the text quotes; the last are of the network "real, motion", else of "synthetic"."""
    rows = {row["method"]: row for row in measured["registration"]}
    real, synthetic = (rows[name]["dice"] - rows["before"]["dice"] for name in ("real", "synthetic"))
    summary = {
        "vqae_dice": measured["vqae"]["validation"]["dice"],
        "codes_used": measured["vqae"]["train"]["codes_used"],
        "bits_per_token": measured["denoiser"]["validation"]["bits_per_token"],
        "gain_synthetic_over_real": synthetic / real if real else None,
    }
    for short, name in (("dice", "dice"), ("hd95", "hd95_mm"), ("tre", "tre_mm"), ("seconds", "seconds_per_pair")):
        summary |= {f"{short}_{quoted}": rows[row][name] for quoted, row in QUOTED.items() if name in rows.get(row, ())}
    found = measured["synthetic"]
    lengths, pieces = found["displacements"], found["components"]
    reconstructed = measured["vqae"]["validation"]
    summary |= {
        "motion_ratio": _ratio(lengths, "mean"),
        "motion_ratio_95": _ratio(lengths, "percentile_95"),
        "pieces_ratio": _ratio(pieces, "number"),
        "both_lungs_share": found["sixths"]["synthetic"],
        "recall": found["quality"]["synthetic"]["recall"],
        "precision": found["quality"]["synthetic"]["precision"],
        "audit_closer_percent": 100 * found["memorisation"]["registered images"]["closer"],
        "pair_overlap_shift": reconstructed["pair_dice_decoded"] - reconstructed["pair_dice_real"],
    }
    network = "real, motion" if "real, motion" in rows else "synthetic"
    summary["network_used_as_start"] = rows[f"{network} + instance"]["used_as_start"]
    return summary | {name: rows[network][name] for name in ("folding_percent", "inverse_consistency_error", "hd95_mm")}


def _ratio(compared: dict[str, dict[str, float]], name: str) -> float | None:
    return compared["synthetic"][name] / compared["real"][name] if compared["real"][name] else None


def _decoded(autoencoder: Trained, pairs: PairSet) -> PairSet:
    """The pairs as reconstructed by the autoencoder."""
    return replace(
        pairs, labels=vqae.decode_labels(autoencoder.model, vqae.encode_pairs(autoencoder.model, pairs.labels))
    )


def describe_vqae(run: Run, autoencoder: Trained, pairs: PairSet) -> dict[str, Any]:
    """Reconstruction (``dice``, ``dice_per_structure``) and codebook health (``codes_used``, ``perplexity``) on pairs.

    ``pair_dice_real`` and ``pair_dice_decoded`` are the overlap of fixed and moving before and after reconstruction. It
    increases if the autoencoder encodes the average of both images.
    """
    tokens = vqae.encode_pairs(autoencoder.model, pairs.labels)
    decoded = vqae.decode_labels(autoencoder.model, tokens)
    dice = metrics.dice(decoded.flatten(0, 1), pairs.labels.flatten(0, 1), pairs.num_labels)
    use = metrics.codebook_use(tokens, run.profile.vqae.codes)
    structures = map(metrics.mean_over_pairs, dice.unbind(1))
    described = {
        "dice": metrics.mean_over_pairs(dice.nanmean(1)),
        "dice_per_structure": dict(zip(pairs.label_names[1:], structures, strict=True)),
        "codes_used": use.used,
        "perplexity": use.perplexity,
    }
    for name, labels in {"real": pairs.labels, "decoded": decoded}.items():
        overlap = metrics.mean_dice(labels[:, 0], labels[:, 1], pairs.num_labels)
        described[f"pair_dice_{name}"] = metrics.mean_over_pairs(overlap)
    return described


def describe_denoiser(run: Run, autoencoder: Trained, denoiser: Trained, pairs: PairSet) -> dict[str, float]:
    """``bits_per_token``: the exact bound on at most 64 pairs, spread over the set, with its standard error."""
    device = best_device()
    tokens = vqae.encode_pairs(autoencoder.model, pairs.labels[:: -(-len(pairs) // BITS_PAIRS)])
    sequences = tokens.flatten(1).long().to(device)  # (N, *grid) -> (N, L)
    generator = run.generator("bits per token", device)
    bits = absorbing.bits_per_token(denoiser.model, sequences, denoiser.model.mask_token, generator)
    return {"bits_per_token": float(bits.mean()), "standard_error": float(bits.std() / len(bits) ** 0.5)}


def describe_synthetic(run: Run, autoencoder: Trained, synthetic: PairSet) -> dict[str, Any]:
    """Compare synthetic with real pairs: :func:`metrics.compare_sets`, and ``displacements`` by the baseline.

    Displacements are compared with those of the warped copies that the denoiser learned from.
    """
    number = min(_compared(run), len(synthetic), (run.profile.denoiser.copies - 1) * len(run.train))
    some = len(run.train) + torch.randperm(number, generator=run.generator("compare"))
    motions = motions_for(run, run.profile.vqae.augmentation)
    learned = replace(synthetic[:number], labels=warped_copies(run, some.tolist(), motions))
    found = (register(pairs, run.profile).displacement for pairs in (learned, synthetic[:number]))
    decoded = {"train": _decoded(autoencoder, run.train), "validation": _decoded(autoencoder, run.validation)}
    compared = metrics.compare_sets(run.train, decoded | {"synthetic": synthetic}, run.generator("quality"))
    return compared | {"displacements": metrics.compare_displacements(*found)}


def audit_after_registration(run: Run, autoencoder: Trained, synthetic: PairSet) -> dict[str, Any]:
    """The memorisation audit of single images, after the baseline has registered training images to them.

    A training image that was moved is a copy, too. Only the ``CANDIDATES`` nearest training images are registered.
    """
    random, sets = (
        run.generator("audit"),
        [synthetic, *(_decoded(autoencoder, each) for each in (run.train, run.validation))],
    )
    samples, training, held_out = (pairs.labels.flatten(0, 1).unique(dim=0)[:, None] for pairs in sets)
    samples, held_out = (
        each[torch.randperm(len(each), generator=random)[: _compared(run)]] for each in (samples, held_out)
    )

    def distances(images: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        before = metrics.pair_distances(images, known)
        after = torch.full_like(before, math.inf)
        for image, row, candidates in zip(images, after, before.argsort(1)[:, :CANDIDATES], strict=True):
            pairs = torch.cat([image.expand(len(candidates), *image.shape), known[candidates]], 1)
            pair_set = PairSet(pairs, synthetic.label_names, synthetic.spacing, ("",) * len(pairs))
            moved = register(pair_set, run.profile).warp_labels(pairs[:, 1])
            row[candidates] = metrics.pair_distances(image[None], moved[:, None])[0]
        return after

    return metrics.audit_as_json(metrics.memorisation_audit(samples, training, held_out, distances))


def _partners(run: Run, autoencoder: Trained, denoiser: Trained, pair: PairSet, number: int) -> PairSet:
    """The fixed image of one pair with ``number`` drawn moving images."""
    work = replace(run, profile=replace(run.profile, synthesis=replace(run.profile.synthesis, pairs=number)))
    known = vqae.encode_pairs(autoencoder.model, fixed_with_itself(pair.labels))
    drawn = decode_pairs(run, autoencoder, sample_pairs(work, denoiser, 0, known))
    return replace(drawn, labels=torch.stack([pair.fixed.expand_as(drawn.fixed), drawn.moving], 1))


def describe_partners(run: Run, partners: PairSet) -> dict[str, Any]:
    """How far moving images that were drawn for one fixed image move, beside other people's motions in the same lung.

    Returns:
        ``drawn_mm`` and ``motions_mm``: for each partner and for each motion, the mean length of the displacement at
        the vessels of the fixed image in mm; ``dice``, of fixed and moving image, before and after registration.
    """
    vessels, mm = partners.fixed[0] > 0, partners.spacing[0]
    found = register(partners, run.profile)
    motions, box = load_motions(run.dataset, run.data, run.seed), box_of_vessels(partners.fixed[0])
    lengths = [laid(motion, box, partners.spatial).norm(dim=0)[vessels].mean() for motion in motions.displacement]
    images = {"before": partners.moving, "after": found.warp_labels(partners.moving)}
    return {
        "drawn_mm": (mm * found.displacement.norm(dim=1)[:, vessels].mean(1)).tolist(),
        "motions_mm": [mm * float(length) for length in lengths],
        "dice": {
            name: metrics.mean_dice(partners.fixed, moving, partners.num_labels).tolist()
            for name, moving in images.items()
        },
    }


def _compared(run: Run) -> int:
    return min(COMPARED, max(2, COMPARED_VOXELS // math.prod(run.train.spatial)))
