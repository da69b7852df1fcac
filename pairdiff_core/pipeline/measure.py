"""Measure a whole run: one JSON file with its provenance, the source of all numbers in the text."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pairdiff_core.data import data_files, load_pairs
from pairdiff_core.pairs import pack_labels
from pairdiff_core.pipeline.describe import (
    audit_after_registration,
    decoded_by,
    describe_denoiser,
    describe_partners,
    describe_synthetic,
    describe_vqae,
    gallery,
)
from pairdiff_core.pipeline.models import Trained
from pairdiff_core.pipeline.run import Run
from pairdiff_core.pipeline.stages import StageResults, run_stages
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
    "network_synthetic_motion": "synthetic, motion",
    "network_synthetic_motion_instance": "synthetic, motion + instance",
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
        ``synthetic``, ``gallery``, ``partners`` (if the denoiser may be given fixed images), ``phantoms`` (for OASIS:
        landmark errors there), ``histories``, ``pictures``, ``stages`` (seconds and machine of each), ``provenance``.
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
    measured["gallery"] = once("gallery", made_from, gallery, run, autoencoder, synthetic)
    if denoiser.model.given is not None:
        measured["partners"] = once("partners", made_from, describe_partners, run, autoencoder, denoiser)
    if run.dataset == "oasis2d":
        used = [network.fingerprint for network in made.networks.values()]
        measured["phantoms"] = once("phantoms", used, errors_on_phantoms, run, made.networks)
    models = {"vqae": autoencoder, "denoiser": denoiser, **made.networks}
    measured["histories"] = {name: model.history for name, model in models.items()}
    some = run.validation[: SHOWN[run.profile.spatial_dims]]
    pictures = {"synthetic": synthetic[: len(some)], "reconstructed": decoded_by(autoencoder, some), "validation": some}
    measured["pictures"] = {name: pack_labels(pairs.labels) for name, pairs in pictures.items()}
    measured["stages"] = {path.stem: _made_by(path) for path in sorted(run.path.glob("*.safetensors"))}
    made_by = provenance(run.profile.name, run.seed, best_device(), data) | {"dataset": run.dataset}
    made_by["pairs"] = {name: len(pairs) for name, pairs in splits.items()}
    spent = [time.perf_counter() - started, *(stage["seconds"] for stage in measured["stages"].values())]
    made_by["wall_seconds"] = sum(spent)
    return {"summary": _quoted(measured), **measured, "provenance": made_by}


def errors_on_phantoms(run: Run, networks: dict[str, Trained]) -> dict[str, float]:
    """Mean TRE in mm on phantom brains, whose landmarks are known, by method: "before", and the networks alone."""
    phantoms = load_pairs("phantom2d", "validation", run.profile)
    alone = {name: method for name, (method, _) in methods(run.profile, networks).items() if name in networks}
    return {
        name: summarise(list(evaluate(phantoms, method)), phantoms.label_names)["tre_mm"]
        for name, method in {"before": None, **alone}.items()
    }


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
    lengths, components = found["displacements"], found["components"]
    reconstructed = measured["vqae"]["validation"]
    summary |= {
        "motion_ratio": _ratio(lengths, "mean"),
        "motion_ratio_95": _ratio(lengths, "percentile_95"),
        "pieces_ratio": _ratio(components, "number"),
        "both_lungs_share": found["sixths"]["synthetic"],
        "recall": found["quality"]["synthetic"]["recall"],
        "precision": found["quality"]["synthetic"]["precision"],
        "audit_closer_percent": 100 * found["memorisation"]["registered images"]["closer"],
        "pair_overlap_shift": reconstructed["pair_dice_decoded"] - reconstructed["pair_dice_real"],
    }
    errors = measured.get("phantoms") or {name: row["tre_mm"] for name, row in rows.items() if "tre_mm" in row}
    if errors:
        real, synthetic = (errors["before"] - errors[name] for name in ("real", "synthetic"))
        summary["gain_synthetic_over_real_tre"] = synthetic / real if real else None
    network = "real, motion" if "real, motion" in rows else "synthetic"
    summary["network_used_as_start"] = rows[f"{network} + instance"]["used_as_start"]
    return summary | {name: rows[network][name] for name in ("folding_percent", "inverse_consistency_error", "hd95_mm")}


def _ratio(compared: dict[str, dict[str, float]], name: str) -> float | None:
    return compared["synthetic"][name] / compared["real"][name] if compared["real"][name] else None
