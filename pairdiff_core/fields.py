"""Displacement fields: warp, compose, exponentiate, resize, measure, convert.

All functions share one convention. A displacement ``u`` is a float tensor (N, D, *spatial) **in voxels**; channel d
runs along array axis d. The point x of the fixed image corresponds to x + u(x) in the moving image, so
``warp(moving, u)`` looks like fixed. Voxel centres are at integer coordinates, and the field of view ends half a voxel
outside the outermost centres (``align_corners=False``): index i of a grid that is f times coarser is at
f * i + (f - 1) / 2 on the fine one. The same code handles 2D and 3D. MONAI's ``Warp`` accepts these displacements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def identity_grid(spatial: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    """Voxel coordinates of every voxel centre, float (D, *spatial)."""
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in spatial]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _voxels(spatial: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """The size of a grid as (D, 1, ..., 1), of the type of ``like``, to divide voxel coordinates (N, D, *any) by."""
    size = torch.tensor(tuple(spatial), dtype=like.dtype, device=like.device)
    return size.reshape(-1, *[1] * (like.dim() - 2))


def _sample(image: torch.Tensor, places: torch.Tensor, mode: str, padding: str) -> torch.Tensor:
    """Sample ``image`` (N, C, *spatial) at places (N, D, *any), -1 and 1 being its outer edges; gives (N, C, *any)."""
    grid = places.flip(1).movedim(1, -1)  # (N, D, *any) -> (N, *any, D); grid_sample wants the last axis first
    return F.grid_sample(image, grid, mode=mode, padding_mode=padding, align_corners=False)


def warp(
    image: torch.Tensor, displacement: torch.Tensor, mode: str = "bilinear", padding: str = "border"
) -> torch.Tensor:
    """Resample ``image`` with a displacement: the result at x is image(x + u(x)).

    Args:
        image: float (N, C, *spatial); the result has the same shape.
        displacement: float (N, D, *spatial), voxels.
        mode: "bilinear" (trilinear in 3D) or "nearest".
        padding: the values outside the image, "border" (the nearest voxel) or "zeros".
    """
    spatial = tuple(image.shape[2:])
    if spatial != displacement.shape[2:]:
        raise ValueError(f"image grid {spatial} and displacement grid {tuple(displacement.shape[2:])} differ")
    size = _voxels(spatial, displacement)
    centres = (2 * identity_grid(spatial, displacement.device) + 1) / size - 1
    return _sample(image, centres + displacement * (2 / size), mode, padding)  # the rest is constant


def warp_at(image: torch.Tensor, displacement: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Some voxels of ``warp(image, displacement)``, float (N, C, K), without computing the others.

    Args:
        image: float (N, C, *spatial).
        displacement: float (N, D, *coarser), on any grid over the same field of view, in voxels of that grid.
        voxels: int64 (K, D), indices of voxels.
    """
    number, dims = displacement.shape[:2]
    shape = (dims, len(voxels), *[1] * (dims - 1))
    centres = ((2 * voxels.T + 1).reshape(shape) / _voxels(image.shape[2:], image) - 1).expand(number, *shape)
    here = _sample(displacement, centres, "bilinear", "border") * (2 / _voxels(displacement.shape[2:], displacement))
    return _sample(image, centres + here, "bilinear", "border").flatten(2)  # (N, C, K, 1, ...) -> (N, C, K)


def warp_labels(labels: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Warp label maps (N, *spatial) by nearest neighbour; the result has the same integer type."""
    return warp(labels[:, None].to(displacement.dtype), displacement, mode="nearest")[:, 0].to(labels.dtype)


def sample_at(field: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Interpolate ``field`` (C, *spatial) linearly at voxel coordinates ``points`` (K, D); returns (K, C)."""
    dims = points.shape[1]
    coordinates = points.to(field.dtype).T.reshape(1, dims, -1, *[1] * (dims - 1))  # (K, D) -> (1, D, K, 1, ...)
    places = (2 * coordinates + 1) / _voxels(field.shape[1:], coordinates) - 1
    values = _sample(field[None], places, "bilinear", "border")
    return values.reshape(field.shape[0], -1).T  # (1, C, K, 1, ...) -> (K, C)


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Compose displacements (N, D, *spatial) in voxels, ``first`` then ``second``: first(x) + second(x + first(x))."""
    return first + warp(second, first)


def invert(displacement: torch.Tensor, steps: int = 60) -> torch.Tensor:
    """The inverse of a displacement (N, D, *spatial) that does not fold: composing the two gives nearly 0.

    Chen et al. (Medical Physics, 2008): a fixed-point iteration; half steps make it converge for steeper fields, too.
    """
    inverse = torch.zeros_like(displacement)
    for _ in range(steps):
        inverse = inverse - compose(inverse, displacement) / 2
    return inverse


def exponentiate(velocity: torch.Tensor, squarings: int = 7) -> torch.Tensor:
    """Displacement at time 1 of the flow along a stationary velocity field (N, D, *spatial), in voxels.

    Scaling and squaring (Arsigny et al., MICCAI 2006): the flow over a time of 2**-squarings is nearly the scaled
    velocity itself, and composing it with itself doubles the time. ``exponentiate(-v)`` is the inverse of
    ``exponentiate(v)`` up to interpolation.
    """
    displacement = velocity / 2**squarings
    for _ in range(squarings):
        displacement = compose(displacement, displacement)
    return displacement


def smooth(field: torch.Tensor, times: int = 2) -> torch.Tensor:
    """Smooth a field (N, C, *spatial) with a box of 3 voxels a side, ``times`` times.

    The border is replicated: zeros would shrink displacements at the edge, where lungs move most.
    """
    dims = field.dim() - 2
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    for _ in range(times):
        field = pool(F.pad(field, [1] * 2 * dims, mode="replicate"), kernel_size=3, stride=1)
    return field


def resize_field(displacement: torch.Tensor, spatial: Sequence[int]) -> torch.Tensor:
    """Resample a displacement (N, D, *old) to another grid over the same field of view, in voxels of that grid."""
    old, new = tuple(displacement.shape[2:]), tuple(spatial)
    if old == new:
        return displacement
    scaled = displacement * (_voxels(new, displacement) / _voxels(old, displacement))  # the old grid is usually smaller
    return F.interpolate(scaled, size=new, mode=LINEAR[len(old)], align_corners=False)


def resize_points(points: torch.Tensor, old: Sequence[int], new: Sequence[int]) -> torch.Tensor:
    """Convert voxel coordinates (..., D) from a grid of size ``old`` to one of size ``new`` over the same view."""
    ratio = torch.tensor([n / o for n, o in zip(new, old, strict=True)], dtype=points.dtype, device=points.device)
    return (points + 0.5) * ratio - 0.5


def random_velocity(
    number: int, spatial: Sequence[int], *, amplitude: float, smoothness: float, generator: torch.Generator
) -> torch.Tensor:
    """Smooth random velocity fields, float (number, D, *spatial), in voxels.

    White noise on a grid with one node every ``smoothness`` voxels, interpolated between the nodes (cubic in 2D,
    linear and smoothed in 3D) and scaled so that each component has standard deviation ``amplitude``.
    """
    dims = len(spatial)
    nodes = [max(4, round(size / smoothness) + 3) for size in spatial]
    noise = torch.randn((number, dims, *nodes), generator=generator, device=generator.device)
    if dims == 2:
        field = F.interpolate(noise, size=tuple(spatial), mode="bicubic", align_corners=False)
    else:  # torch has no tricubic interpolation
        field = F.interpolate(smooth(noise, times=1), size=tuple(spatial), mode=LINEAR[dims], align_corners=False)
    return field * (amplitude / field.std().clamp_min(1e-12))


def jacobian_determinant(displacement: torch.Tensor) -> torch.Tensor:
    """Determinant of the Jacobian of x + u(x) at every voxel, (N, *spatial); 1 means no change of volume.

    Central differences inside, one-sided ones at the border. A value <= 0 means that the map folds there.
    """
    dims = displacement.shape[1]
    rows = torch.stack(torch.gradient(displacement, dim=list(range(2, 2 + dims))), dim=-1)  # (N, D, *s, D): du_d/dx_e
    jacobian = rows.movedim(1, -2) + torch.eye(dims, device=displacement.device, dtype=displacement.dtype)
    return torch.linalg.det(jacobian)  # (N, *s, D, D) -> (N, *s)


def to_learn2reg(displacement: torch.Tensor) -> np.ndarray:
    """Convert one field (D, *spatial) to Learn2Reg's format: float32 (*spatial, D), voxels, fixed to moving."""
    return displacement.movedim(0, -1).cpu().numpy().astype(np.float32)


def to_itk(displacement: torch.Tensor, affine: np.ndarray) -> np.ndarray:
    """Convert one field (D, *spatial), in voxels, to ITK's format: float64 (*spatial, D), mm along the LPS axes.

    ``affine`` is the (D + 1, D + 1) voxel-to-world matrix of the grid in RAS, as in nibabel. Right and anterior are
    positive in NIfTI, left and posterior in ITK.
    """
    dims = displacement.shape[0]
    ras = displacement.movedim(0, -1).cpu().numpy().astype(np.float64) @ np.asarray(affine)[:dims, :dims].T
    return ras * np.array([-1.0, -1.0, 1.0][:dims])
