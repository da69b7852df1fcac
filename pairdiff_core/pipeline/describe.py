"""Measurements of one stage: the autoencoder, the denoiser, synthetic pairs, and partners of a given image."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from pairdiff_core import absorbing, metrics, vqae
from pairdiff_core.data.breathing import BREATHING, box_of_vessels, laid, load_motions
from pairdiff_core.pairs import PairSet, depth_maps, pack_labels
from pairdiff_core.pipeline.models import Trained
from pairdiff_core.pipeline.run import Run
from pairdiff_core.pipeline.stages import decode_pairs, fixed_with_itself, motions_for, sample_pairs, warped_copies
from pairdiff_core.profiles import with_levels
from pairdiff_core.registration import register
from pairdiff_core.training import best_device

COMPARED, COMPARED_VOXELS = 48, 2**27  # limits for comparing displacements: pairs of each set, their voxels
GALLERY = 24  # synthetic images that are stored as pictures
PARTNERS = 6  # moving images that are drawn for one fixed image
CANDIDATES = 3  # training images that are registered to each image of the audit after registration
REGISTERED = 16  # pairs of a set whose displacement is found
BITS_PAIRS = 64  # largest number of pairs whose bits per token are measured


def decoded_by(autoencoder: Trained, pairs: PairSet) -> PairSet:
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
    """``bits_per_token``: the exact bound on at most 64 pairs, spread over the set, with its standard error.

    The error of a single pair is NaN.
    """
    device = best_device()
    tokens = vqae.encode_pairs(autoencoder.model, pairs.labels[:: -(-len(pairs) // BITS_PAIRS)])
    sequences = tokens.flatten(1).long().to(device)  # (N, *grid) -> (N, L)
    generator = run.generator("bits per token", device)
    bits = absorbing.bits_per_token(denoiser.model, sequences, denoiser.model.mask_token, generator)
    error = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else math.nan
    return {"bits_per_token": float(bits.mean()), "standard_error": error}


def describe_synthetic(run: Run, autoencoder: Trained, synthetic: PairSet) -> dict[str, Any]:
    """Compare synthetic with real pairs: :func:`metrics.compare_sets`, and ``displacements`` by the baseline.

    Displacements are compared with those of the warped copies that the denoiser learned from.
    """
    number = min(_compared(run), len(synthetic), (run.profile.denoiser.copies - 1) * len(run.train))
    copies = range(len(run.train), len(run.train) + number)
    motions = motions_for(run, run.profile.vqae.augmentation)
    learned = replace(synthetic[:number], labels=warped_copies(run, copies, motions))
    found = (register(pairs, run.profile).displacement for pairs in (learned, synthetic[:number]))
    decoded = {"train": decoded_by(autoencoder, run.train), "validation": decoded_by(autoencoder, run.validation)}
    compared = metrics.compare_sets(run.train, decoded | {"synthetic": synthetic}, run.generator("quality"))
    return compared | {"displacements": metrics.compare_displacements(*found)}


def audit_after_registration(run: Run, autoencoder: Trained, synthetic: PairSet) -> dict[str, Any]:
    """The memorisation audit of single images, after the baseline has registered training images to them.

    A training image that was moved is a copy, too. Only the ``CANDIDATES`` nearest training images are registered, and
    only with the coarser levels, which find a breath.
    """
    coarse = with_levels(run.profile, levels=2)
    real = (decoded_by(autoencoder, pairs) for pairs in (run.train, run.validation))
    samples, training, held_out = (pairs.labels.flatten(0, 1).unique(dim=0)[:, None] for pairs in (synthetic, *real))
    random = run.generator("audit")
    samples, held_out = (
        images[torch.randperm(len(images), generator=random)[: _compared(run)]] for images in (samples, held_out)
    )

    def distances(images: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        before = metrics.pair_distances(images, known)
        after = torch.full_like(before, math.inf)
        for image, row, candidates in zip(images, after, before.argsort(1)[:, :CANDIDATES], strict=True):
            pairs = torch.cat([image.expand(len(candidates), *image.shape), known[candidates]], 1)
            pair_set = PairSet(pairs, synthetic.label_names, synthetic.spacing, ("",) * len(pairs))
            moved = register(pair_set, coarse).warp_labels(pairs[:, 1])
            row[candidates] = metrics.pair_distances(image[None], moved[:, None])[0]
        return after

    return metrics.audit_as_json(metrics.memorisation_audit(samples, training, held_out, distances))


def gallery(run: Run, autoencoder: Trained, synthetic: PairSet) -> dict[str, Any]:
    """The first ``GALLERY`` synthetic fixed images, unselected, with as many real ones and the nearest training images.

    All have been through the autoencoder. Slices are label maps (N, H, W), volumes :func:`pairs.depth_maps`.

    Returns:
        ``synthetic``, ``nearest`` and ``real``, images of unseen people, packed by :func:`pack_labels`; and
        ``distances`` to the nearest training images, as in :func:`metrics.pair_distances`.
    """
    real, training = (decoded_by(autoencoder, pairs).labels.flatten(0, 1) for pairs in (run.validation, run.train))
    real, training = (images.unique(dim=0) for images in (real, training))
    real = real[torch.randperm(len(real), generator=run.generator("gallery"))[:GALLERY]]
    drawn = synthetic.fixed[:GALLERY]
    distances, nearest = metrics.pair_distances(drawn[:, None], training[:, None]).min(1)
    images = {"synthetic": drawn, "nearest": training[nearest], "real": real}
    pictures = {name: labels if labels.dim() == 3 else depth_maps(labels) for name, labels in images.items()}
    return {name: pack_labels(each) for name, each in pictures.items()} | {"distances": distances.tolist()}


def describe_partners(run: Run, autoencoder: Trained, denoiser: Trained) -> dict[str, Any]:
    """Draw moving images for one real fixed image, and compare how far they move with the motions of other people.

    Returns:
        ``drawn_mm``, for each of the ``PARTNERS`` that were drawn, and ``motions_mm``, for each motion of another
        person, transferred to the same image: the mean length of the displacement at the structures of the fixed
        image, in mm. ``motions_mm`` is empty for data without motions. ``dice``, of fixed and moving image, ``before``
        and ``after`` registration. ``picture``, the fixed and all moving images (1 + N, H, W, D), packed by
        :func:`pack_labels`.
    """
    pair, synthesis = run.validation[:1], replace(run.profile.synthesis, pairs=PARTNERS)
    known = vqae.encode_pairs(autoencoder.model, fixed_with_itself(pair.labels))
    drawn = sample_pairs(replace(run, profile=replace(run.profile, synthesis=synthesis)), denoiser, 0, known)
    partners = decode_pairs(run, autoencoder, drawn)
    partners.labels[:, 0] = pair.fixed
    inside, mm = partners.fixed[0] > 0, torch.tensor(partners.spacing).reshape(-1, 1)
    found = register(partners, run.profile)
    motions: Iterable[torch.Tensor] = ()
    if run.dataset in BREATHING:
        box, breaths = box_of_vessels(partners.fixed[0]), load_motions(run.dataset, run.data, run.seed)
        motions = (laid(motion, box, partners.spatial) for motion in breaths.displacement)
    images = {"before": partners.moving, "after": found.warp_labels(partners.moving)}
    return {
        "drawn_mm": [float((mm * moved[:, inside]).norm(dim=0).mean()) for moved in found.displacement],
        "motions_mm": [float((mm * moved[:, inside]).norm(dim=0).mean()) for moved in motions],
        "dice": {
            name: metrics.mean_dice(partners.fixed, moving, partners.num_labels).tolist()
            for name, moving in images.items()
        },
        "picture": pack_labels(torch.cat([pair.fixed, partners.moving])),
    }


def describe_pairs(run: Run, pairs: PairSet) -> dict[str, float]:
    """How the two images of a pair differ, and how large the structures of the moving ones are.

    Returns:
        ``dice``, of fixed and moving image; ``displacement_mm``, the mean length of the displacement by the baseline
        at the structures of the fixed image, over at most 16 pairs; ``area_error``, the mean over structures of the
        difference between the mean areas of moving and of real training images, as a share of the latter.
    """
    some = pairs[:: -(-len(pairs) // REGISTERED)]
    moved = register(some, run.profile).displacement
    mm = torch.tensor(pairs.spacing).reshape(-1, *[1] * pairs.spatial_dims)
    lengths = (mm * moved).norm(dim=1)  # (N, D, *spatial) -> (N, *spatial)
    areas = metrics.compare_areas(run.train.labels, pairs.labels[:, 1:], pairs.label_names)
    errors = [abs(row["synthetic_mean"] - row["real_mean"]) / row["real_mean"] for row in areas if row["real_mean"]]
    return {
        "dice": float(metrics.mean_dice(pairs.fixed, pairs.moving, pairs.num_labels).nanmean()),
        "displacement_mm": float(lengths[some.fixed > 0].mean()),
        "area_error": sum(errors) / len(errors),
    }


def _compared(run: Run) -> int:
    return min(COMPARED, max(2, COMPARED_VOXELS // math.prod(run.train.spatial)))
