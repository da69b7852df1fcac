"""Measuring: registration methods case by case, and a whole run as one JSON file with its provenance.

``pairdiff evaluate`` measures one method, ``pairdiff run all`` a run; the files in ``book/results`` come from there.
Every number has one name: ``dice`` (0 to 1), ``hd95_mm``, ``tre_mm``, ``folding_percent``, ``log_jacobian_sd``,
``inverse_consistency_error`` (voxels), ``seconds``.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pairdiff_core import absorbing, metrics, vqae
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline.pretrained import Trained
from pairdiff_core.pipeline.run import Run
from pairdiff_core.pipeline.stages import StageResults, run_stages
from pairdiff_core.profiles import Profile, to_json
from pairdiff_core.registration import Deformation, register
from pairdiff_core.storage import code_hash, fingerprint, load_checkpoint, measured_once, pack_labels, provenance
from pairdiff_core.training import best_device

Case = dict[str, Any]
Method = Callable[[PairSet], Deformation]

MEASURES = ("dice", "hd95_mm", "folding_percent", "log_jacobian_sd", "inverse_consistency_error", "tre_mm")
AT_ONCE = 2**18  # voxels of the pairs that are timed together
SHOWN = {2: 4, 3: 1}  # pairs kept in the file as pictures, by dimensions
COMPARED, COMPARED_VOXELS = 48, 2**27  # at most: pairs of each set whose displacements are compared, their voxels


# ------------------------------------------------------------------------------------------- registration


def evaluate(pairs: PairSet, method: Method | None = None) -> Iterator[Case]:
    """Register and score pairs, in their order.

    Args:
        method: how to register; None measures the pairs before registration.

    Yields:
        A case: ``name``; ``dice`` and ``hd95_mm``, means over structures, and ``dice_per_structure``; where it has
        landmarks, ``tre_mm``, ``tre`` (:func:`metrics.describe_errors`) and ``errors_mm`` of each landmark; after a
        method also ``folding_percent``, ``log_jacobian_sd``, ``inverse_consistency_error`` and ``seconds``. None where
        a number does not exist.
    """
    number = max(1, AT_ONCE // math.prod(pairs.spatial))
    for first in range(0, len(pairs), number):
        some = pairs[first : first + number]
        started = time.perf_counter()
        found = method(some) if method else None
        seconds = (time.perf_counter() - started) / len(some)
        for index in range(len(some)):
            case = _score(some[index], found[index : index + 1] if found else None)
            yield case | {"seconds": seconds} if found else case


def _score(pair: PairSet, found: Deformation | None) -> Case:
    moved = found.warp_labels(pair.moving) if found else pair.moving
    dice = metrics.dice(moved, pair.fixed, pair.num_labels)
    surface = metrics.hausdorff95(moved, pair.fixed, pair.num_labels, pair.spacing)
    case: Case = {
        "name": pair.names[0],
        "dice": metrics.mean_over_pairs(dice),
        "dice_per_structure": [None if math.isnan(value) else value for value in dice[0].tolist()],
        "hd95_mm": metrics.mean_over_pairs(surface),
    }
    if found:
        case |= {
            "folding_percent": float(metrics.folding_percent(found.displacement)),
            "log_jacobian_sd": float(metrics.log_jacobian_sd(found.displacement)),
            "inverse_consistency_error": float(metrics.inverse_consistency_error(found.displacement, found.inverse)),
        }
    points = pair.landmarks[0] if pair.landmarks else ()
    if len(points):
        displacement = found.displacement[0] if found else torch.zeros(pair.spatial_dims, *pair.spatial)
        errors = metrics.target_registration_error(displacement, points, pair.spacing)
        described = metrics.describe_errors(errors)
        case |= {"tre_mm": described["mean"], "tre": described, "errors_mm": errors.tolist()}
    return case


def summarise(cases: Sequence[Case], label_names: Sequence[str]) -> dict[str, Any]:
    """What cases come to.

    Returns:
        The mean over the cases of each number that a case has, ``seconds_per_pair``, ``dice_per_structure`` by name;
        where there are landmarks, over all of them ``tre_all`` and ``tre_percentiles`` (0 to 100); and the ``cases``
        without their longest lists.
    """
    row: dict[str, Any] = {name: _mean([case.get(name) for case in cases]) for name in MEASURES}
    row = {name: value for name, value in row.items() if any(name in case for case in cases)}
    if "seconds" in cases[0]:
        row["seconds_per_pair"] = _mean([case["seconds"] for case in cases])
    structures = zip(*(case["dice_per_structure"] for case in cases), strict=True)
    row["dice_per_structure"] = dict(zip(label_names[1:], map(_mean, structures), strict=True))
    errors = torch.tensor([error for case in cases for error in case.get("errors_mm", ())]).double()
    if len(errors):
        row["tre_all"] = metrics.describe_errors(errors)
        row["tre_percentiles"] = errors.quantile(torch.linspace(0, 1, 101).double()).tolist()
    left_out = ("errors_mm", "dice_per_structure")
    row["cases"] = [{key: case[key] for key in case if key not in left_out} for case in cases]
    return row


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def score(pairs: PairSet, deformation: Deformation | None = None) -> dict[str, Any]:
    """:func:`summarise` of all pairs, registered by a deformation or, without one, as they are."""
    cases = [
        _score(pairs[index], deformation[index : index + 1] if deformation else None) for index in range(len(pairs))
    ]
    return summarise(cases, pairs.label_names)


def methods(profile: Profile, networks: dict[str, Trained]) -> dict[str, tuple[Method | None, list[str]]]:
    """The methods that are compared, and the fingerprints of the networks that they depend on.

    Before registration; the baseline without training, also with one more level at full size where its last is coarser;
    and each network without and with instance optimisation.
    """
    found: dict[str, tuple[Method | None, list[str]]] = {"before": (None, [])}
    found["baseline"] = (partial(register, profile=profile), [])
    levels = profile.registration.baseline
    if levels[-1].scale > 1:
        finer = replace(profile.registration, baseline=(*levels, levels[-1]._replace(scale=1)))
        found["baseline, full size"] = (partial(register, profile=replace(profile, registration=finer)), [])
    for name, network in networks.items():
        alone = partial(register, profile=profile, network=network.model, instance=False)
        found[name] = (alone, [network.fingerprint])
        found[f"{name} + instance"] = (partial(register, profile=profile, network=network.model), [network.fingerprint])
    return found


# ------------------------------------------------------------------------------------------- the whole run


def measure(run: Run, made: StageResults | None = None) -> dict[str, Any]:
    """Run (or load) every stage and measure it on the validation pairs, which nothing was trained or chosen on.

    Each part of the measurement is kept in the run's folder ``measured``, so that an interruption loses one part at
    most; it is measured again when code, settings, data or the stages it depends on have changed.

    Args:
        made: by the stages, if they were run already.

    Returns:
        ``summary`` (the numbers that the text quotes), ``registration`` (a row a method), ``vqae``, ``denoiser``,
        ``synthetic``, ``histories``, ``pictures``, ``stages`` (seconds and machine of each), ``provenance``.
    """
    made = made or run_stages(run)
    autoencoder, denoiser, synthetic = made.autoencoder, made.denoiser, made.synthetic
    shown = SHOWN[run.profile.spatial_dims]
    splits = {"train": run.train, "validation": run.validation}
    data = {name: fingerprint(pairs.labels) for name, pairs in splits.items()}
    common = {"code": code_hash(), "profile": to_json(run.profile), "seed": run.seed, "data": data}
    started = time.perf_counter()

    def once(name: str, depends_on: list[str], measure_part: Callable[[], Any]) -> Any:
        run.pause_if_asked("measuring")
        path = run.path / "measured" / f"{re.sub('[^a-z0-9]+', '-', name)}.json"
        with run.working():
            return measured_once(path, common | {"on": depends_on}, measure_part)

    def one_method(method: Method | None) -> dict[str, Any]:
        return summarise(list(evaluate(run.validation, method)), run.validation.label_names)

    made_from = [autoencoder.fingerprint, denoiser.fingerprint]
    measured = {
        "registration": [
            {"method": name} | once(f"registration {name}", depends_on, partial(one_method, method))
            for name, (method, depends_on) in methods(run.profile, made.networks).items()
        ],
        "vqae": {
            split: once(f"vqae {split}", made_from[:1], partial(describe_vqae, run, autoencoder, pairs))
            for split, pairs in splits.items()
        },
        "denoiser": {
            split: once(f"denoiser {split}", made_from, partial(describe_denoiser, run, autoencoder, denoiser, pairs))
            for split, pairs in splits.items()
        },
        "synthetic": once(
            "synthetic",
            [*made_from, fingerprint(synthetic.labels)],
            partial(describe_synthetic, run, autoencoder, synthetic),
        ),
        "histories": {
            name: stage.history for name, stage in {"vqae": autoencoder, "denoiser": denoiser, **made.networks}.items()
        },
        "pictures": {
            "synthetic": pack_labels(synthetic.labels[:shown]),
            "reconstructed": pack_labels(_reconstruct(autoencoder, run.validation.labels[:shown])),
            "validation": pack_labels(run.validation.labels[:shown]),
        },
        "stages": {path.stem: _made_by(path) for path in sorted(run.path.glob("*.safetensors"))},
    }
    made_by = provenance(run.profile.name, run.seed, best_device(), data) | {"dataset": run.dataset}
    made_by["pairs"] = {name: len(pairs) for name, pairs in splits.items()}
    spent = [time.perf_counter() - started, *(stage["seconds"] for stage in measured["stages"].values())]
    made_by["wall_seconds"] = sum(spent)
    return {"summary": _quoted(measured), **measured, "provenance": made_by}


def _made_by(path: Any) -> dict[str, Any]:
    """What made a result: ``seconds``, commit, date, device and threads."""
    description = load_checkpoint(path)[1]
    made_by = description["provenance"]
    return {"seconds": description["seconds"]} | {key: made_by[key] for key in ("commit", "date", "device", "threads")}


def _quoted(measured: dict[str, Any]) -> dict[str, float | None]:
    """The numbers that the text quotes; regularity is that of the network trained on synthetic pairs."""
    rows = {row["method"]: row for row in measured["registration"]}
    gain = {name: rows[name]["dice"] - rows["before"]["dice"] for name in ("real", "synthetic")}
    named = {
        "before": "before",
        "baseline": "baseline",
        "network_real": "real",
        "network_random_warps": "real, warped",
        "network_synthetic": "synthetic",
        "network_synthetic_instance": "synthetic + instance",
    }
    summary = {
        "vqae_dice": measured["vqae"]["validation"]["dice"],
        "codes_used": measured["vqae"]["train"]["codes_used"],
        "bits_per_token": measured["denoiser"]["validation"]["bits_per_token"],
        "gain_synthetic_over_real": gain["synthetic"] / gain["real"] if gain["real"] else None,
    }
    for measure_name in ("dice", "hd95_mm", "tre_mm", "seconds_per_pair"):
        short = measure_name.removesuffix("_mm").removesuffix("_per_pair")
        for name, row in named.items():
            if measure_name in rows[row]:
                summary[f"{short}_{name}"] = rows[row][measure_name]
    return summary | {name: rows["synthetic"][name] for name in ("folding_percent", "inverse_consistency_error")}


def describe_vqae(run: Run, autoencoder: Trained, pairs: PairSet) -> dict[str, Any]:
    """Reconstruction (``dice``, ``dice_per_structure``) and codebook health (``codes_used``, ``perplexity``) on pairs.

    ``pair_dice_real`` and ``pair_dice_decoded`` are the overlap of fixed and moving before and after: an autoencoder
    that encodes the average of both images makes them overlap more.
    """
    tokens = vqae.encode_pairs(autoencoder.model, pairs.labels)
    decoded = vqae.decode_labels(autoencoder.model, tokens)
    dice = metrics.dice(decoded.flatten(0, 1), pairs.labels.flatten(0, 1), pairs.num_labels)
    use = metrics.codebook_use(tokens, run.profile.vqae.codes)
    overlap = {
        name: metrics.mean_over_pairs(metrics.mean_dice(labels[:, 0], labels[:, 1], pairs.num_labels))
        for name, labels in {"real": pairs.labels, "decoded": decoded}.items()
    }
    structures = map(metrics.mean_over_pairs, dice.unbind(1))
    return {
        "dice": metrics.mean_over_pairs(dice.nanmean(1)),
        "dice_per_structure": dict(zip(pairs.label_names[1:], structures, strict=True)),
        "pair_dice_real": overlap["real"],
        "pair_dice_decoded": overlap["decoded"],
        "codes_used": use.used,
        "perplexity": use.perplexity,
    }


def _reconstruct(autoencoder: Trained, labels: torch.Tensor) -> torch.Tensor:
    return vqae.decode_labels(autoencoder.model, vqae.encode_pairs(autoencoder.model, labels))


def describe_denoiser(run: Run, autoencoder: Trained, denoiser: Trained, pairs: PairSet) -> dict[str, float]:
    """``bits_per_token``: the exact bound on at most 64 pairs, spread over the set, with its standard error."""
    device = best_device()
    labels = pairs.labels[:: -(-len(pairs) // 64)]
    tokens = vqae.encode_pairs(autoencoder.model, labels)
    sequences = tokens.flatten(1).long().to(device)  # (N, *grid) -> (N, L)
    generator = run.generator("bits per token", device)
    bits = absorbing.bits_per_token(denoiser.model, sequences, denoiser.model.mask_token, generator)
    return {"bits_per_token": float(bits.mean()), "standard_error": float(bits.std() / len(bits) ** 0.5)}


def describe_synthetic(run: Run, autoencoder: Trained, synthetic: PairSet) -> dict[str, Any]:
    """Synthetic pairs beside the real training pairs, with held-out real pairs beside the same as the yardstick.

    ``areas``, ``components`` (connected ones) and ``displacements`` (by the no-training baseline) compare sizes;
    ``quality`` has precision, recall, density and coverage of single images, in the feature space of
    :func:`metrics.pair_features` with one cell per 16 voxels; ``memorisation`` is the audit against training pairs and
    images. Quality and audit see real pairs after the autoencoder, as the synthetic ones are: otherwise its blur would
    pass for novelty. Quality is not asked of pairs: thousands of real pairs are made of a few images, so their nearest
    neighbours are so close that no other pair, real or synthetic, is ever among them.
    """
    at_most = max(2, COMPARED_VOXELS // math.prod(run.train.spatial))
    compared = min(COMPARED, at_most, len(run.train), len(synthetic))
    some = torch.randperm(len(run.train), generator=run.generator("compare"))[:compared].tolist()
    real, new = (register(pairs, run.profile).displacement for pairs in (run.train[some], synthetic[:compared]))
    seen = {
        "train": _reconstruct(autoencoder, run.train.labels),
        "validation": _reconstruct(autoencoder, run.validation.labels),
        "synthetic": synthetic.labels,
    }
    images = {name: labels.flatten(0, 1)[:, None] for name, labels in seen.items()}  # (2N, 1, *s)
    every_image = run.train.labels.flatten(0, 1)[_each_image_once(run.train)][:, None]
    return {
        "pairs": len(synthetic),
        "areas": metrics.compare_areas(run.train.labels, synthetic.labels, run.train.label_names),
        "components": metrics.compare_components(every_image, synthetic.labels),
        "displacements": metrics.compare_displacements(real, new),
        "quality": _quality(run, images),
        "memorisation": {"pairs": _audit(seen), "images": _audit(images)},
    }


def _quality(run: Run, images: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Precision, recall, density and coverage of as many synthetic images as there are held-out ones."""
    cells = [max(2, size // 16) for size in run.train.spatial]
    chosen = {
        "train": images["train"][_each_image_once(run.train)],
        "validation": images["validation"][_each_image_once(run.validation)],
    }
    order = torch.randperm(len(images["synthetic"]), generator=run.generator("quality"))
    chosen["synthetic"] = images["synthetic"][order[: len(chosen["validation"])]]
    features = {name: metrics.pair_features(labels, run.train.num_labels, cells) for name, labels in chosen.items()}
    neighbours = min(5, *(len(labels) - 1 for labels in chosen.values()))
    compare = partial(metrics.precision_recall_density_coverage, features["train"], neighbours=neighbours)
    found = {name: compare(features[name]) for name in ("synthetic", "validation")}
    return found | {"images": len(chosen["validation"]), "neighbours": neighbours}


def _each_image_once(pairs: PairSet) -> list[int]:
    """Indices into the 2N images of N pairs: the first occurrence of each, by name."""
    names = [image for pair in pairs.names for image in pair.split("~")]
    return [names.index(name) for name in dict.fromkeys(names)]


def _audit(labels: dict[str, torch.Tensor]) -> dict[str, Any]:
    audit = metrics.memorisation_audit(labels["synthetic"], labels["train"], labels["validation"])
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in audit._asdict().items()}
