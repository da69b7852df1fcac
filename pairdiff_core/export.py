"""The synthetic pairs of a run as NIfTI files with a dataset description, for other programs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from pairdiff_core import pipeline, vqae
from pairdiff_core.checkpoints import CheckpointError, load_checkpoint
from pairdiff_core.data import grid_affine, label_names
from pairdiff_core.pairs import DataError
from pairdiff_core.provided import find, load_stage
from pairdiff_core.runs import open_run
from pairdiff_core.volumes import write_nifti

BATCH = 4  # pairs decoded at once


def export_pairs(run: str | Path, to: str | Path, *, progress: bool = False) -> Path:
    """Write the synthetic pairs of a run in the form of a Learn2Reg data set; no real data are needed.

    ``imagesTr/<name>_0001_0000.nii.gz`` is the fixed label map of the first pair, ``..._0001.nii.gz`` the moving one:
    uint8 (X, Y, Z), a slice as (X, Y, 1), placed by :func:`pairdiff_core.data.grid_affine`. ``<name>_dataset.json``
    has the keys ``name``, ``release``, ``description``, ``licence``, ``reference``, ``pairings``, ``provided_data``,
    ``registration_direction``, ``modality``, ``img_shift``, ``labels``, ``tensorImageSize``, ``tensorImageShape``,
    ``numTraining``, ``training`` (each image; the label map is image and label at once), ``numPairedTraining``,
    ``training_paired_images``, the empty ``test``, ``test_paired_images``, ``registration_val`` and
    ``registration_test`` with their numbers, and, beyond Learn2Reg, ``provenance``.

    Args:
        run: a run folder with the stages "vqae" and "synthesis".
        to: folder to make; it may exist if it is empty.
        progress: whether to show a bar.

    Returns:
        ``to``.

    Raises:
        CheckpointError: if a stage is missing or damaged, or they do not belong together.
        DataError: if ``to`` is in use or cannot be written; nothing is written then.
    """
    folder, to = find(run), Path(to).expanduser()
    tokens, made_by, model = _load(folder)
    name = f"PairDiff-{made_by['dataset']}"
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise DataError(f"{to} exists and is not empty. Give a new folder, or move that one away.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as temporary:
            root = Path(temporary) / "whole"
            (root / "imagesTr").mkdir(parents=True)
            pairs, shape = [], ()
            for fixed, moving in tqdm(
                _decode(model, tokens), total=len(tokens), unit="pair", disable=not progress
            ):
                shape = tuple(fixed.shape)
                affine = grid_affine(made_by["dataset"], shape)
                files = [f"imagesTr/{name}_{len(pairs) + 1:04d}_{image:04d}.nii.gz" for image in (0, 1)]
                for file, labels in zip(files, (fixed, moving), strict=True):
                    values = labels.numpy() if labels.dim() == 3 else labels.numpy()[:, :, None]
                    write_nifti(root / file, values, affine)
                pairs.append(tuple(f"./{file}" for file in files))
            description = _describe(name, pairs, shape, model.num_labels, made_by)
            (root / f"{name}_dataset.json").write_text(json.dumps(description, indent=1) + "\n")
            if to.exists():
                to.rmdir()
            root.rename(to)
    except OSError as error:
        raise DataError(
            f"{to} could not be written ({error.strerror}). Is the disk full or the folder read-only?"
        ) from error
    return to


def _load(folder: Path) -> tuple[torch.Tensor, dict[str, Any], vqae.PairedVQAE]:
    """The synthetic tokens of a run, where they come from, and the autoencoder that they are tokens of."""
    open_run(folder)  # says what is wrong with a folder that is no run
    path = folder / "synthesis.safetensors"
    tensors, metadata = load_checkpoint(path)
    _, autoencoder = load_stage(folder, "vqae", pipeline.new_vqae)
    try:
        tokens, made_with = tensors["tensor"], metadata["config"]["autoencoder"]
        made_by = {**metadata["provenance"], "dataset": metadata["dataset"], "config": metadata["config"]}
    except KeyError as error:
        raise CheckpointError(f"{path} holds no synthetic tokens ({error}). Make them again.") from error
    if made_with != autoencoder.fingerprint:
        raise CheckpointError(
            f"{path} was made with another autoencoder than {folder / 'vqae.safetensors'}. Make it again, or copy both "
            "from one run."
        )
    return tokens, made_by, autoencoder.model


def _decode(model: vqae.PairedVQAE, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Each pair, uint8 (2, *spatial), a few decoded at a time."""
    for part in tokens.split(BATCH):
        yield from vqae.decode_labels(model, part)


def _describe(
    name: str,
    pairs: list[tuple[str, str]],
    shape: tuple[int, ...],
    num_labels: int,
    made_by: dict[str, Any],
) -> dict[str, Any]:
    """The dataset description, see :func:`export_pairs`."""
    labels = label_names(made_by["dataset"], num_labels)
    images = [image for pair in pairs for image in pair]
    return {
        "name": name,
        "release": made_by["versions"]["pairdiff"],
        "description": f"Synthetic label map pairs, made by PairDiff from what it learnt on {made_by['dataset']}: no "
        "images of anybody. For research and teaching.",
        "licence": "Apache-2.0, as far as the terms of the data that was learnt from allow",
        "reference": "M. Heinrich, Unleashing Registration: Diffusion Models for Paired Synthetic 3D Data Generation",
        "pairings": "paired",
        "provided_data": {"0": ["image", "label"]},
        "registration_direction": {"fixed": 0, "moving": 1},
        "modality": {"0": "label map"},
        "img_shift": {"fixed": "0000", "moving": "0001"},
        "labels": {"0": {str(value): label for value, label in enumerate(labels)}},
        "tensorImageSize": {"0": f"{len(shape)}D"},
        "tensorImageShape": {"0": [*shape, 1][:3]},
        "numTraining": len(images),
        "training": [{"image": image, "label": image} for image in images],
        "numPairedTraining": len(pairs),
        "training_paired_images": [{"fixed": fixed, "moving": moving} for fixed, moving in pairs],
        "numTest": 0,
        "test": [],
        "numPairedTest": 0,
        "test_paired_images": [],
        "numRegistration_val": 0,
        "registration_val": [],
        "numRegistration_test": 0,
        "registration_test": [],
        "provenance": made_by,
    }
