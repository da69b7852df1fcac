"""Scores of registration, for each case and summarised.

The measures are ``dice`` (0 to 1), ``hd95_mm``, ``tre_mm``, ``folding_percent``, ``log_jacobian_sd``,
``inverse_consistency_error`` and ``inverse_consistency_error_on_structures`` (voxels), ``seconds``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pairdiff_core import metrics
from pairdiff_core.pairs import PairSet
from pairdiff_core.registration.deformation import Deformation

Case = dict[str, Any]
Method = Callable[[PairSet], Deformation]

ON_STRUCTURES = "inverse_consistency_error_on_structures"  # where the fixed image has a label above 0
MEASURES = (
    *("dice", "hd95_mm", "folding_percent", "log_jacobian_sd", "inverse_consistency_error", ON_STRUCTURES, "tre_mm"),
)
AT_ONCE = 2**18  # voxels of the pairs that are timed together


def evaluate(pairs: PairSet, method: Method | None = None) -> Iterator[Case]:
    """Register and score pairs, in their order.

    Args:
        method: how to register; None measures the pairs before registration.

    Yields:
        A case: ``name``; ``dice`` and ``hd95_mm``, means over structures, and ``dice_per_structure``; if it has
        landmarks, ``tre_mm``, ``tre`` (:func:`metrics.describe_errors`) and ``errors_mm`` of each landmark; after a
        method also ``folding_percent``, ``log_jacobian_sd``, ``inverse_consistency_error``, the same over the voxels
        of the fixed image with a label above 0 as ``inverse_consistency_error_on_structures``, and ``seconds``. None
        where a number does not exist.
    """
    import monai.networks.layers  # noqa: F401 - here, so that the clock below does not time its import

    number = max(1, AT_ONCE // math.prod(pairs.spatial))
    for first in range(0, len(pairs), number):
        some = pairs[first : first + number]
        started = time.perf_counter()
        found = method(some) if method else None
        seconds = (time.perf_counter() - started) / len(some)
        for index in range(len(some)):
            case = score_pair(some[index], found[index : index + 1] if found else None)
            yield case | {"seconds": seconds} if found else case


def score_pair(pair: PairSet, found: Deformation | None = None, moved: torch.Tensor | None = None) -> Case:
    """One case of :func:`evaluate` without its seconds, from a set of one pair.

    Args:
        found: None: the pair before registration.
        moved: the moving labels uint8 (1, *spatial) after registration; None: warped by ``found``.
    """
    if moved is None:
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
        both = found.displacement, found.inverse
        case |= {
            "folding_percent": float(metrics.folding_percent(found.displacement)),
            "log_jacobian_sd": float(metrics.log_jacobian_sd(found.displacement)),
            "inverse_consistency_error": float(metrics.inverse_consistency_error(*both)),
            ON_STRUCTURES: metrics.mean_over_pairs(metrics.inverse_consistency_error(*both, pair.fixed > 0)),
        }
    points = pair.landmarks[0] if pair.landmarks else ()
    if len(points):
        displacement = found.displacement[0] if found else torch.zeros(pair.spatial_dims, *pair.spatial)
        case |= score_landmarks(displacement, points, pair.spacing)
    return case


def score_landmarks(displacement: torch.Tensor, points: torch.Tensor, spacing: Sequence[float]) -> Case:
    """The landmark errors of a case, see :func:`metrics.target_registration_error`."""
    errors = metrics.target_registration_error(displacement, points, spacing)
    described = metrics.describe_errors(errors)
    return {"tre_mm": described["mean"], "tre": described, "errors_mm": errors.tolist()}


def summarise(cases: Sequence[Case], label_names: Sequence[str]) -> dict[str, Any]:
    """Summarise cases.

    Returns:
        The mean over the cases of each measure, ``seconds_per_pair``, and ``dice_per_structure`` by name; if there are
        landmarks, ``tre_all`` and ``tre_percentiles`` (0 to 100) over all; and the ``cases`` without their long lists.
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
    """:func:`summarise` of all pairs, registered by a deformation or, without one, before registration."""
    cases = [
        score_pair(pairs[index], deformation[index : index + 1] if deformation else None) for index in range(len(pairs))
    ]
    return summarise(cases, pairs.label_names)
