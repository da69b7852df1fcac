"""A set of image pairs: the data structure that the whole project uses.

A pair is two label maps on one grid, the *fixed* and the *moving* image. Real data, phantoms and decoded
synthetic tokens are all a :class:`PairSet`; 2D slices and 3D volumes differ only in the number of spatial axes.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pairdiff_core import fields
from pairdiff_core.errors import DataError
from pairdiff_core.fields import LINEAR


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs of label maps, with names, spacing and, if known, displacement and landmarks.

    Attributes:
        labels: uint8 (N, 2, *spatial); ``[:, 0]`` is the fixed, ``[:, 1]`` the moving image; 0 is background.
        label_names: the name of each label value, the background included; C is ``len(label_names)``.
        spacing: millimetres between voxel centres along each array axis.
        names: one per pair, ``fixed~moving``.
        displacement: float (N, D, *spatial) in voxels, fixed to moving; None if the true one is not known.
        landmarks: for each pair a float tensor (K, 2, D) of voxel coordinates, ``[:, 0]`` in the fixed and
            ``[:, 1]`` in the moving image; K is 0 for a pair without landmarks. None if no pair has any.
        label_colours: RGB, 0 to 255, one per label; None leaves the choice to the figure.

    Raises:
        DataError: if shapes, types or label values do not fit together.
    """

    labels: torch.Tensor
    label_names: tuple[str, ...]
    spacing: tuple[float, ...]
    names: tuple[str, ...]
    displacement: torch.Tensor | None = None
    landmarks: tuple[torch.Tensor, ...] | None = None
    label_colours: tuple[tuple[int, int, int], ...] | None = None

    def __post_init__(self) -> None:
        labels, dims = self.labels, self.spatial_dims
        if labels.dtype != torch.uint8 or dims not in (2, 3) or labels.shape[1] != 2:
            expected = "uint8 of shape (N, 2, *spatial) with 2 or 3 spatial axes"
            raise DataError(f"labels must be {expected}, got {labels.dtype} of shape {tuple(labels.shape)}")
        highest = int(labels.max()) if labels.numel() else 0
        if highest >= self.num_labels:
            raise DataError(f"label {highest} occurs, but there are names for 0 to {self.num_labels - 1} only")
        if len(self.spacing) != dims:
            raise DataError(f"spacing has {len(self.spacing)} numbers for {dims} spatial axes")
        if len(self.names) != len(self):
            raise DataError(f"{len(self.names)} names for {len(self)} pairs")
        expected = (len(self), dims, *self.spatial)
        if self.displacement is not None and tuple(self.displacement.shape) != expected:
            raise DataError(f"displacement must have shape {expected}, got {tuple(self.displacement.shape)}")
        if self.landmarks is not None and len(self.landmarks) != len(self):
            raise DataError(f"{len(self.landmarks)} sets of landmarks for {len(self)} pairs")
        for name, points in zip(self.names, self.landmarks or (), strict=False):
            if points.dim() != 3 or tuple(points.shape[1:]) != (2, dims):
                raise DataError(f"landmarks of {name} must be (K, 2, {dims}), got {tuple(points.shape)}")

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def spatial(self) -> tuple[int, ...]:
        """Size of the common grid in voxels."""
        return tuple(self.labels.shape[2:])

    @property
    def spatial_dims(self) -> int:
        return self.labels.dim() - 2

    @property
    def num_labels(self) -> int:
        """C, the number of label values, background included."""
        return len(self.label_names)

    @property
    def fixed(self) -> torch.Tensor:
        """uint8 (N, *spatial)."""
        return self.labels[:, 0]

    @property
    def moving(self) -> torch.Tensor:
        """uint8 (N, *spatial)."""
        return self.labels[:, 1]

    def __getitem__(self, index: int | slice | Sequence[int]) -> PairSet:
        """A PairSet of some of the pairs; a single index gives a set of one."""
        chosen = torch.arange(len(self))[index].reshape(-1).tolist()  # IndexError if out of range
        return replace(
            self,
            labels=self.labels[chosen],
            names=tuple(self.names[i] for i in chosen),
            displacement=None if self.displacement is None else self.displacement[chosen],
            landmarks=self.landmarks and tuple(self.landmarks[i] for i in chosen),
        )

    def one_hot(self) -> torch.Tensor:
        """float (N, 2, C, *spatial): one channel per label."""
        flat = one_hot(self.labels.flatten(0, 1), self.num_labels)  # (N, 2, *s) -> (2N, C, *s)
        return flat.unflatten(0, (len(self), 2))  # (2N, C, *s) -> (N, 2, C, *s)

    def swapped(self) -> PairSet:
        """The pairs with fixed and moving swapped, without displacement: its inverse is not its negative."""
        return replace(
            self,
            labels=self.labels.flip(1),
            names=tuple("~".join(reversed(name.split("~"))) for name in self.names),
            displacement=None,
            landmarks=self.landmarks and tuple(points.flip(1) for points in self.landmarks),
        )

    def resized(self, spatial: Sequence[int]) -> PairSet:
        """The same pairs on another grid over the same field of view.

        Labels are resized by majority vote. The displacement is interpolated and converted to the new voxels.
        Landmarks keep their place, which includes a shift: the centres of voxel 0 of the two grids differ.
        """
        spatial = tuple(spatial)
        if spatial == self.spatial:
            return self
        flat = resize_labels(self.labels.flatten(0, 1), spatial, self.num_labels)  # (N, 2, *s) -> (2N, *new)
        displacement = None if self.displacement is None else fields.resize_field(self.displacement, spatial)
        return self._on_grid(flat.unflatten(0, (len(self), 2)), displacement)  # (2N, *new) -> (N, 2, *new)

    def pooled(self, factor: int) -> PairSet:
        """The same pairs on a grid ``factor`` times coarser along every axis, over the same field of view.

        Each block of ``factor`` voxels a side gets its highest label, so thin vessels are kept (and grow); the majority
        vote of :meth:`resized` would lose them. The displacement is averaged and converted to the new voxels, and
        landmarks keep their place. For the *share* of each block that a vessel fills, apply ``registration.pool`` to
        the one-hot maps at full size, not to these labels. DataError if ``factor`` does not divide the grid.
        """
        if factor < 1 or any(size % factor for size in self.spatial):
            raise DataError(f"a grid of {self.spatial} voxels cannot be pooled by {factor}: it must divide each axis")
        if factor == 1:
            return self
        labels, displacement = self.labels, self.displacement
        for axis in range(2, labels.dim()):
            labels = labels.unflatten(axis, (-1, factor)).amax(axis + 1)  # (..., n * f, ...) -> (..., n, ...)
        if displacement is not None:
            average = {2: F.avg_pool2d, 3: F.avg_pool3d}[self.spatial_dims]
            displacement = average(displacement, factor) / factor
        return self._on_grid(labels, displacement)

    def _on_grid(self, labels: torch.Tensor, displacement: torch.Tensor | None) -> PairSet:
        """These pairs, given their labels and displacement on another grid over the same field of view."""
        old, new = self.spatial, tuple(labels.shape[2:])
        return replace(
            self,
            labels=labels,
            spacing=tuple(mm * before / after for mm, before, after in zip(self.spacing, old, new, strict=True)),
            displacement=displacement,
            landmarks=self.landmarks and tuple(fields.resize_points(points, old, new) for points in self.landmarks),
        )


def one_hot(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Convert label maps (N, *spatial) to float (N, C, *spatial), one channel per label."""
    return F.one_hot(labels.long(), num_labels).movedim(-1, 1).float()


def resize_labels(labels: torch.Tensor, spatial: Sequence[int], num_labels: int) -> torch.Tensor:
    """Resample label maps (N, *old) to another grid, uint8 (N, *spatial).

    Each new voxel takes the label that fills most of it: the area average of the one-hot maps if the grid gets coarser,
    their linear interpolation if it gets finer. Ties go to the label that fills more of the neighbouring voxels; a rule
    based on label numbers would shrink some structures in favour of others.
    """
    spatial = tuple(spatial)
    coarser = all(new <= old for new, old in zip(spatial, labels.shape[1:], strict=True))
    mode = "area" if coarser else LINEAR[len(spatial)]
    resized = []
    for image in labels:  # one at a time: 25 float channels of a whole set would not fit in memory
        shares = F.interpolate(one_hot(image[None], num_labels), size=spatial, mode=mode)
        resized.append((shares + 1e-3 * fields.smooth(shares)).max(1).indices)  # smoothing decides ties only
    return torch.cat(resized).to(torch.uint8) if resized else labels.new_zeros((0, *spatial))


def depth_maps(labels: torch.Tensor) -> torch.Tensor:
    """Volumes uint8 (N, H, W, D), W at most 255, seen from the front: uint8 (N, H, D).

    Each value is the number of voxels along W to the first one with a structure, counted from 1; 0 where there is none.
    """
    there = labels > 0
    depth = there.byte().argmax(2) + 1  # of the first one
    return (depth * there.any(2)).byte()


def pack_labels(labels: torch.Tensor) -> dict[str, Any]:
    """Label maps uint8 of any shape as text for JSON: ``shape`` and zlib-packed base85 ``bytes``."""
    packed = base64.b85encode(zlib.compress(labels.contiguous().numpy().tobytes(), 9)).decode()
    return {"shape": list(labels.shape), "bytes": packed}


def unpack_labels(packed: dict[str, Any]) -> torch.Tensor:
    """The label maps that :func:`pack_labels` packed."""
    content = np.frombuffer(zlib.decompress(base64.b85decode(packed["bytes"])), dtype=np.uint8)
    return torch.from_numpy(content.copy()).reshape(packed["shape"])
