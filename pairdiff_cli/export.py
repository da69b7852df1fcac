"""Write synthetic pairs, of a run or drawn from a pretrained model, as NIfTI files with a dataset description."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import conform
from tqdm.auto import tqdm

from pairdiff_cli.learn2reg import WrittenPair, unused_folder, write_data_set
from pairdiff_cli.volume_files import read_pair
from pairdiff_core.errors import CheckpointError, DataError
from pairdiff_core.pipeline import (
    Run,
    Trained,
    find_autoencoder,
    find_model,
    load_model,
    number_of_shards,
    open_run,
    sample_pairs,
)
from pairdiff_core.profiles import to_json
from pairdiff_core.storage import load_checkpoint, provenance
from pairdiff_core.training import best_device
from pairdiff_core.vqae import decode_labels, encode_pairs

AT_ONCE = 4  # pairs that are decoded together


def export_pairs(run: str | Path, to: str | Path, *, progress: bool = False) -> int:
    """Write the synthetic pairs of a run as a data set in the format of Learn2Reg; no real data are needed.

    :func:`pairdiff_cli.learn2reg.write_data_set` describes the folder; the affine is that of the run's data set.

    Args:
        run: a run folder that has finished the stage "synthesis".
        to: folder to create; it may exist if it is empty.
        progress: whether to show a bar.

    Returns:
        The number of pairs.

    Raises:
        CheckpointError: if a stage is missing or damaged, or if the stages are not of one run.
        DataError: if ``to`` is not empty or cannot be written; nothing is written then.
    """
    to = unused_folder(to)
    work = open_run(find_model(run))
    stages = [(work.path / f"{stage}.safetensors").exists() for stage in ("synthesis", "vqae", "denoiser")]
    if stages == [False, True, True]:
        raise CheckpointError(
            f"{work.path} holds no synthetic pairs, only the networks that draw them. To draw some, run: "
            f"pairdiff run synthesis --model {run} --to {to}"
        )
    tensors, description = load_checkpoint(work.path / "synthesis.safetensors")
    autoencoder = find_autoencoder(work, description["config"]["inputs"]["autoencoder"])
    made_by = description["provenance"] | {"dataset": work.dataset, "config": description["config"]}
    return _write_pairs(to, work, autoencoder, tensors["tensor"], made_by, progress)


def make_pairs(
    model: str | Path,
    to: str | Path,
    number: int | None = None,
    seed: int = 0,
    given: str | Path | None = None,
    *,
    progress: bool = False,
) -> int:
    """Draw new pairs from a pretrained model, or from the networks of a run, and write them like :func:`export_pairs`.

    Args:
        model: name such as "oasis2d-laptop", or a folder with the stages "vqae" and "denoiser".
        to: folder to create; it may exist if it is empty.
        number: number of pairs; None takes that of the model's profile.
        seed: of the pairs. A run with this seed that uses this model makes the same ones.
        given: a label volume that is the fixed image of all pairs, whose moving images are drawn; it is written as the
            model sees it, see :func:`read_given`. None: both images are drawn.
        progress: whether to show progress bars.

    Returns:
        The number of pairs.

    Raises:
        CheckpointError, DataError: as :func:`export_pairs`.
    """
    to, own = unused_folder(to), open_run(find_model(model))
    synthesis = replace(own.profile.synthesis, pairs=number or own.profile.synthesis.pairs)
    work = replace(own, seed=seed, profile=replace(own.profile, synthesis=synthesis))
    autoencoder, denoiser = (load_model(own.path, stage) for stage in ("vqae", "denoiser"))
    made_by = provenance(work.profile.name, seed, best_device()) | {"dataset": work.dataset}
    made_by |= {"autoencoder": autoencoder.fingerprint, "denoiser": denoiser.fingerprint}
    known, fixed = None, None
    if given is not None:
        if denoiser.model.given is None:
            raise CheckpointError(f"the denoiser of {own.path} was trained without fixed images. Omit --given.")
        fixed = read_given(given, work)
        known = encode_pairs(autoencoder.model, fixed.labels.expand(1, 2, *fixed.labels.shape))
        made_by |= {"given": str(given)}
    bar = tqdm(range(number_of_shards(work)), desc="tokens", disable=not progress)
    tokens = torch.cat([sample_pairs(work, denoiser, shard, known) for shard in bar])
    return _write_pairs(to, work, autoencoder, tokens, made_by | {"settings": to_json(synthesis)}, progress, fixed)


class Given(NamedTuple):
    """A fixed image as a model sees it."""

    labels: torch.Tensor  # uint8 (*spatial)
    affine: np.ndarray  # (4, 4), from its voxels to world coordinates in mm, RAS


def read_given(path: str | Path, run: Run) -> Given:
    """A label volume on the grid of a run, about the volume's centre; resampled by nearest neighbour where needed.

    Raises:
        DataError: if the file is not a label volume with the labels of the run; the message names the file.
    """
    volume, affine = read_pair(path, path), run.description.directions
    labels = volume.pairs(run.profile, run.description.label_values).labels[0, 0].numpy()
    axes, spacing = "".join(nib.aff2axcodes(affine)), nib.affines.voxel_sizes(affine)
    image = nib.Nifti1Image(labels.reshape((*labels.shape, 1)[:3]), volume.affine)
    here = conform(image, (*run.profile.spatial, 1)[:3], spacing, order=0, orientation=axes)
    found = np.asarray(here.dataobj).astype(np.uint8).reshape(run.profile.spatial)
    if not found.any():
        raise DataError(f"{path} has no structure within {run.profile.spatial} voxels about its centre. Crop it.")
    return Given(torch.from_numpy(found), here.affine)


def _write_pairs(
    to: Path,
    run: Run,
    autoencoder: Trained,
    tokens: torch.Tensor,
    made_by: dict[str, Any],
    progress: bool,
    given: Given | None = None,
) -> int:
    """Decode tokens int (N, *grid) and write the pairs, with the fixed image that was given, if there is one."""
    affine = run.description.directions if given is None else given.affine

    def pairs() -> Iterator[WrittenPair]:
        bar = tqdm(tokens.split(AT_ONCE), unit_scale=AT_ONCE, unit="pair", disable=not progress)
        for decoded in (pair for some in bar for pair in decode_labels(autoencoder.model, some)):
            if given is not None:
                decoded[0] = given.labels
            yield WrittenPair(decoded.numpy(), (affine, affine))

    about = {
        "description": f"Synthetic pairs of label maps, made by PairDiff after training on {run.dataset}. "
        "They show no real person. For research and teaching.",
        "licence": "Apache-2.0, as far as the terms of the training data allow",
        "reference": "M. Heinrich, Unleashing Registration: Diffusion Models for Paired Synthetic 3D Data Generation",
        "provenance": made_by,
    }
    return write_data_set(to, f"PairDiff-{run.dataset}", pairs(), run.description, about)
