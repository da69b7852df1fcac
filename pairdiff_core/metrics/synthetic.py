"""Comparison of synthetic with real pairs; held-out real pairs give reference values."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from pairdiff_core.metrics.memorisation import MemorisationAudit, memorisation_audit
from pairdiff_core.metrics.realism import (
    compare_areas,
    compare_components,
    pair_features,
    precision_recall_density_coverage,
    share_in_real_range,
)
from pairdiff_core.pairs import PairSet

CELL = 16  # voxels along each axis of a cell of the feature space


def compare_sets(train: PairSet, decoded: dict[str, PairSet], generator: torch.Generator) -> dict[str, Any]:
    """Measure sizes, connected components, quality and novelty of synthetic pairs.

    Quality is measured on single images: thousands of real pairs are combinations of a few images, so their nearest
    neighbours are too close for any other pair, real or synthetic, to be among them.

    Args:
        train: the real training pairs.
        decoded: the "synthetic" pairs, and the "train" and "validation" pairs after the autoencoder, since its blur
            would otherwise pass for novelty.
        generator: chooses as many synthetic images as there are held-out ones.

    Returns:
        ``pairs``, the number of synthetic ones; ``areas`` and ``components``, see :func:`compare_areas` and
        :func:`compare_components`; ``quality``, of "synthetic" and of "validation" images, see
        :func:`precision_recall_density_coverage`; ``sixths``, for the same two, how often the share of foreground in a
        sixth of the image (two sides, three heights) is in the real range, see :func:`share_in_real_range`;
        ``memorisation``, the audit of ``pairs`` and of ``images``.
    """
    synthetic = decoded["synthetic"].labels
    pairs = {name: each.labels for name, each in decoded.items()}
    images = {name: labels.flatten(0, 1)[:, None] for name, labels in pairs.items()}  # (N, 2, *s) -> (2N, 1, *s)
    every_image = train.labels.flatten(0, 1)[_each_image_once(train)][:, None]

    chosen = {name: images[name][_each_image_once(decoded[name])] for name in ("train", "validation")}
    some = torch.randperm(len(images["synthetic"]), generator=generator)[: len(chosen["validation"])]
    chosen["synthetic"] = images["synthetic"][some]
    cells = [max(2, size // CELL) for size in train.spatial]
    features = {name: pair_features(labels, train.num_labels, cells) for name, labels in chosen.items()}
    neighbours = min(5, *(len(each) - 1 for each in features.values()))
    sides_and_heights = [2, *[1] * (train.spatial_dims - 2), 3]
    sixths = {name: pair_features((labels > 0).byte(), 2, sides_and_heights) for name, labels in chosen.items()}
    quality = partial(precision_recall_density_coverage, features["train"], neighbours=neighbours)
    return {
        "pairs": len(synthetic),
        "areas": compare_areas(train.labels, synthetic, train.label_names),
        "components": compare_components(every_image, synthetic),
        "quality": {name: quality(features[name]) for name in ("synthetic", "validation")}
        | {"images": len(some), "neighbours": neighbours},
        "sixths": {name: share_in_real_range(sixths["train"], sixths[name]) for name in ("synthetic", "validation")},
        "memorisation": {"pairs": _audit(pairs), "images": _audit(images)},
    }


def _each_image_once(pairs: PairSet) -> list[int]:
    """Indices into the 2N images of N pairs: the first occurrence of each, by name."""
    names = [image for pair in pairs.names for image in pair.split("~")]
    return [names.index(name) for name in dict.fromkeys(names)]


def _audit(labels: dict[str, torch.Tensor]) -> dict[str, Any]:
    return audit_as_json(memorisation_audit(labels["synthetic"], labels["train"], labels["validation"]))


def audit_as_json(audit: MemorisationAudit) -> dict[str, Any]:
    """An audit with lists instead of tensors."""
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in audit._asdict().items()}
