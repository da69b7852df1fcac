"""One pair of files as a case to score, optionally with landmarks and a displacement field from files."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from pairdiff_cli.field_files import Field, read_landmarks
from pairdiff_cli.grids import sample
from pairdiff_cli.volume_files import VolumePair
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline import Run
from pairdiff_core.registration import Case, Deformation, Method, score_landmarks, score_pair


def as_case(volumes: VolumePair, landmarks: tuple[Path, Path] | None = None) -> PairSet:
    """The pair with its own labels, and with landmarks from CSV files (x, y, z in mm, RAS, in the same order).

    Raises:
        DataError: if a file is invalid, or the files hold different numbers of landmarks; the message names the file.
    """
    pairs = replace(volumes.pairs(), label_names=tuple(map(str, volumes.values)))
    if landmarks is None:
        return pairs
    fixed, moving = (read_landmarks(path) for path in landmarks)
    if fixed.shape != moving.shape:
        numbers = " x ".join(map(str, fixed.shape)), " x ".join(map(str, moving.shape))
        raise DataError(
            f"{landmarks[1]} holds {numbers[1]} numbers, but {landmarks[0]} holds {numbers[0]}. Give the same points."
        )
    if fixed.shape[1] == 2 and any(grid.shape[2] > 1 or grid.tilted for grid in volumes.grids):
        raise DataError(f"{landmarks[0]} has no z, but {volumes.paths[0]} is not an axial slice. Give columns x, y, z.")
    to_fixed_grid = np.linalg.inv(volumes.to_moving) @ np.linalg.inv(volumes.grids[1].world)
    points = [_voxels(fixed, np.linalg.inv(volumes.grids[0].world)), _voxels(moving, to_fixed_grid)]
    kept = np.stack(points, 1)[..., volumes.spatial_axes]  # (K, 2, D)
    return replace(pairs, landmarks=(torch.from_numpy(kept).float(),))


def note_outside(volumes: VolumePair, pairs: PairSet, field: Field | None = None) -> list[str]:
    """A note if landmarks of the fixed image lie outside the field; without a field, outside the pair's grid."""
    if pairs.landmarks is None:
        return []
    fixed, shape = pairs.landmarks[0][:, 0].numpy(), pairs.spatial
    if field is not None:
        fixed, shape = _in_field(volumes, pairs, field).T, field.grid.shape
    outside = int(((fixed < -0.5) | (fixed >= np.array(shape) - 0.5)).any(axis=1).sum())
    return [f"{outside} of {len(fixed)} landmarks lie outside the field and stay where they are."] if outside else []


def _voxels(points: np.ndarray, to_voxels: np.ndarray) -> np.ndarray:
    """Points (K, 3) in mm, or (K, 2), which are at 0 on the third axis, as voxel coordinates (K, 3)."""
    millimetres = np.pad(points, [(0, 0), (0, 3 - points.shape[1])])
    return millimetres @ to_voxels[:3, :3].T + to_voxels[:3, 3]


def displacement_on(volumes: VolumePair, field: Field) -> torch.Tensor:
    """The displacement (D, *spatial) of a field from a file, in voxels of the pair's grid; 0 outside the field."""
    fixed, moving = volumes.grids
    to_field = np.linalg.inv(field.onto(fixed, volumes.paths[0]))
    back = np.linalg.inv(volumes.to_moving) @ field.onto(moving, volumes.paths[1])  # from voxels of the field
    still = np.broadcast_to(np.float32(0), (3, *fixed.shape))
    moves = np.stack([sample(part, still, before=to_field, order=1) for part in field.displacement])
    centres = np.indices(fixed.shape, dtype=np.float64)
    stays = (back @ to_field - np.eye(4))[:3]  # not 0 if a header has two different forms
    found = np.tensordot(back[:3, :3], moves, 1) + np.tensordot(stays[:, :3], centres, 1)
    found += stays[:, 3].reshape(3, 1, 1, 1)
    axes = list(volumes.spatial_axes)
    return torch.from_numpy(found[axes].reshape(len(axes), *volumes.labels.shape[1:])).float()


def _in_field(volumes: VolumePair, pairs: PairSet, field: Field) -> np.ndarray:
    """The landmarks of the fixed image in voxels of a field, (3, K)."""
    fixed = pairs.landmarks[0][:, 0].double().numpy()
    voxels = np.zeros((3, len(fixed)))
    voxels[list(volumes.spatial_axes)] = fixed.T
    return nib.affines.apply_affine(np.linalg.inv(field.onto(volumes.grids[0], volumes.paths[0])), voxels.T).T


def _arrived(volumes: VolumePair, pairs: PairSet, field: Field) -> torch.Tensor:
    """The pair's landmarks (K, 2, D), with those of the fixed image moved by the field itself, as in ``apply``."""
    at = _in_field(volumes, pairs, field)
    moves = [sample(part, at[..., None, None], before=np.diag([0.0, 0, 0, 1]), order=1) for part in field.displacement]
    back = np.linalg.inv(volumes.to_moving) @ field.onto(volumes.grids[1], volumes.paths[1])
    moved = nib.affines.apply_affine(back, (at + np.stack(moves)[..., 0, 0]).T)[:, list(volumes.spatial_axes)]
    return torch.stack([torch.from_numpy(moved).float(), pairs.landmarks[0][:, 1]], dim=1)


def score_case(
    volumes: VolumePair,
    pairs: PairSet,
    registrar: Method | None = None,
    own: Run | None = None,
    field: Field | None = None,
) -> Case:
    """Score a pair of files: unregistered, registered, or with a field. Dice is measured on what ``--warped`` writes.

    Args:
        pairs: from :func:`as_case`.
        registrar: the registration method; None for none.
        own: the run of the registrar's network, which determines its labels; None without a network.
        field: a displacement field. Its inverse is not known, so the case has no inverse consistency.

    Returns:
        The case. With a registrar, it also has ``warnings``, a list of lines for the user.
    """
    if field is not None:
        displacement = displacement_on(volumes, field)
        found = Deformation(displacement[None], torch.zeros_like(displacement)[None])
        case = score_pair(replace(pairs, landmarks=None), found, volumes.warped_labels(displacement)[None])
        if pairs.landmarks is not None:
            still = torch.zeros_like(displacement)
            case |= score_landmarks(still, _arrived(volumes, pairs, field), pairs.spacing)
        return {name: value for name, value in case.items() if not name.startswith("inverse_consistency")}
    if registrar is None:
        return score_pair(pairs)
    given = volumes.pairs(own.profile, own.description.label_values) if own else volumes.pairs()
    started = time.perf_counter()
    found = registrar(given)
    seconds = time.perf_counter() - started
    displacement = found.displacement[0]
    case = score_pair(pairs, found, volumes.warped_labels(displacement)[None])
    return case | {"seconds": seconds, "warnings": volumes.judged(displacement)[2]}
