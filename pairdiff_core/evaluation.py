"""One registration method measured on the test pairs of a data set, pair by pair."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from pairdiff_core.checkpoints import provenance
from pairdiff_core.metrics import describe_errors, target_registration_error
from pairdiff_core.pairs import DataError, PairSet
from pairdiff_core.registration import Deformation
from pairdiff_core.results import score
from pairdiff_core.runs import Run, fingerprint
from pairdiff_core.training import best_device
from pairdiff_core.volume_registration import Trained, register_by_network, register_without_training

METHODS = ("baseline", "network", "network+instance")


def check_network(run: Run, trained: Trained) -> None:
    """Find out before anything is loaded whether a network can register the pairs of a run.

    Raises:
        DataError: if it was trained on other dimensions or another number of labels.
    """
    for name, has, knows in (
        ("axes", len(run.profile.spatial), len(trained.profile.spatial)),
        ("labels", run.profile.num_labels, trained.profile.num_labels),
    ):
        if has != knows:
            raise DataError(
                f"{trained.run.path} knows images with {knows} {name}, {run.dataset} at the profile "
                f"{run.profile.name} has {has}. Take another run, data set or profile."
            )


def evaluate(run: Run, method: str, trained: Trained | None = None) -> Iterator[dict[str, Any]]:
    """Register and score the test pairs of a run, one at a time, in their order.

    Args:
        run: gives data set, profile and seed.
        method: one of METHODS; all but "baseline" need ``trained``.

    Yields:
        A case: ``name``, ``dice_before`` and ``dice`` (mean over structures; None where neither image has any),
        ``folding_percent``, ``inverse_error_voxel``, ``seconds``; where it has landmarks, ``tre_before`` and ``tre``
        (means in mm) and ``errors_before`` and ``errors``, those of each landmark.

    Raises:
        DataError: for data that is missing or not as it should be.
    """
    for index in range(len(run.test)):
        pair = run.test[index]
        started = time.perf_counter()
        found = _register(run, pair, method, trained)
        yield _case(pair, found, time.perf_counter() - started)


def _register(run: Run, pair: PairSet, method: str, trained: Trained | None) -> Deformation:
    if method == "baseline":
        return register_without_training(pair.labels[0], pair.num_labels, run.profile)
    levels = run.profile.registration.instance if method == "network+instance" else ()
    return register_by_network(pair.labels[0], pair.spacing, trained, levels)


def _case(pair: PairSet, found: Deformation, seconds: float) -> dict[str, Any]:
    before, after = score(pair), score(pair, found)
    case = {
        "name": pair.names[0],
        "dice_before": _or_none(before["dice"]),
        "dice": _or_none(after["dice"]),
        "folding_percent": after["folding_percent"],
        "inverse_error_voxel": after["inverse_error_px"],
        "seconds": seconds,
    }
    if "tre_mm" in after:
        points, displacement = pair.landmarks[0], found.displacement[0]
        errors = [target_registration_error(field, points, pair.spacing).tolist()
                  for field in (torch.zeros_like(displacement), displacement)]  # fmt: skip
        case |= {"tre_before": before["tre_mm"], "tre": after["tre_mm"]}
        case |= {"errors_before": errors[0], "errors": errors[1]}
    return case


def _or_none(number: float) -> float | None:
    return None if math.isnan(number) else number  # JSON has no NaN


def summarise(cases: list[dict[str, Any]]) -> dict[str, float | None]:
    """What the cases of :func:`evaluate` come to.

    Returns:
        ``dice_mean``, ``dice_before``, ``folding_percent``, ``inverse_error_voxel``, ``seconds_per_pair``: means over
        the cases; where there are landmarks, ``tre_mean`` and ``tre_before`` (means over the cases, mm), ``tre_p25``,
        ``tre_p50``, ``tre_p75``, ``tre_p95`` and ``tre_worst30`` over all landmarks of all cases.
    """
    names = {"dice_mean": "dice", "dice_before": "dice_before", "folding_percent": "folding_percent",
             "inverse_error_voxel": "inverse_error_voxel", "seconds_per_pair": "seconds"}  # fmt: skip
    summary = {name: _mean(cases, key) for name, key in names.items()}
    errors = [error for case in cases for error in case.get("errors", ())]
    if errors:
        summary |= {"tre_mean": _mean(cases, "tre"), "tre_before": _mean(cases, "tre_before")}
        described = describe_errors(torch.tensor(errors, dtype=torch.float64))
        summary |= {f"tre_{key}": described[key] for key in ("p25", "p50", "p75", "p95", "worst30")}
    return summary


def _mean(cases: list[dict[str, Any]], key: str) -> float | None:
    values = [case[key] for case in cases if case.get(key) is not None]
    return sum(values) / len(values) if values else None


def describe(run: Run, method: str, trained: Trained | None) -> dict[str, Any]:
    """Where an evaluation comes from, for its file."""
    made_by = provenance(
        run.profile.name, run.seed, best_device(), {"test pairs": fingerprint(run.test.labels)}
    )
    made_by |= {"dataset": run.dataset, "split": "test", "pairs": len(run.test), "method": method}
    settings = run.profile.registration
    if method != "network":
        levels = settings.baseline if method == "baseline" else settings.instance
        made_by["levels"] = [level._asdict() for level in levels]
    if method != "baseline":
        made_by |= {"run": str(trained.run.path), "network": trained.stage.fingerprint}
    return made_by
