"""Voxel grids of images in space, as nibabel and as SimpleITK read them, and maps between two grids.

The two programs disagree if a NIfTI header holds two different forms (qform and sform) or none. With two, nibabel takes
the sform first, SimpleITK mostly the qform. With none, nibabel centres the image and flips its first axis, SimpleITK
does neither.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.orientations import inv_ornt_aff, io_orientation, ornt_transform
from scipy.ndimage import map_coordinates

from pairdiff_core.data.image_files import ras_affine
from pairdiff_core.errors import DataError

SAME_GRID = 0.01  # largest distance between the corners of two equal grids, in voxels
PLACE = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip
LAID_FLAT = "laid flat"  # intent name of a field on a tilted slice
AT_ONCE = 2**21  # voxels that are sampled together, so that their positions need little memory


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of a volume, or of a slice, which is a volume with one voxel along the last axis."""

    shape: tuple[int, int, int]
    header: nib.Nifti1Header
    affine: np.ndarray  # (4, 4), voxel to world, mm, RAS, as nibabel reads it

    @classmethod
    def of(cls, image: nib.Nifti1Image, path: Path) -> Grid:
        """The grid of the first three axes of an image.

        Raises:
            DataError: if its affine has no inverse; the message names the file.
        """
        grid = cls((*image.shape, 1, 1)[:3], image.header, image.affine)
        for affine in (grid.affine, grid.world):
            if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
                raise DataError(f"{path} has an affine without an inverse: {affine.tolist()}. Export it again.")
        return grid

    @cached_property
    def seen_by_itk(self) -> np.ndarray | None:
        """As :attr:`affine`, but as SimpleITK reads it; None if it refuses the header, such as for sheared axes."""
        return itk_affine(self.header, self.shape)

    @property
    def world(self) -> np.ndarray:
        """:attr:`seen_by_itk`, or :attr:`affine` if that is None."""
        return self.affine if self.seen_by_itk is None else self.seen_by_itk

    @cached_property
    def field_world(self) -> np.ndarray:
        """As :attr:`world`, for a displacement field on this grid, which is two-dimensional for (X, Y, 1).

        For a :attr:`tilted` slice, it follows the first two axes of LPS from the same origin.
        """
        if self.tilted:
            flat = np.diag([*nib.affines.voxel_sizes(self.world)[:2] * -1, 1, 1])
            flat[:2, 3] = self.world[:2, 3]
            return flat
        flat = itk_affine(self.header, self.shape[:2]) if self.shape[2] == 1 else None
        return self.world if flat is None else flat

    @cached_property
    def tilted(self) -> bool:
        """Whether it is a slice (X, Y, 1) that is not axial, such as a coronal one.

        In two dimensions, ITK keeps only two components of each direction, so it refuses or changes the header of such
        a slice. A field on it therefore has an axial grid for ITK (see :func:`laid_flat`), and two such slices are
        related by their true positions.
        """
        return self.shape[2] == 1 and leaves_axial_plane(self.world)

    def note(self, name: object) -> str | None:
        """A line that says which form fields follow if nibabel and SimpleITK differ; ``name`` is the file's."""
        if self.seen_by_itk is None:
            return f"SimpleITK refuses the header of {name}, whose axes are sheared; the field follows its sform."
        if corners_apart(self.affine, self.world, self.shape) <= SAME_GRID:
            return None
        if not int(self.header["qform_code"]) and not int(self.header["sform_code"]):
            taken = "neither qform nor sform is set; the field follows the voxel sizes along LPS axes"
        else:
            is_sform = np.allclose(self.world, self.header.get_sform(), atol=1e-3)
            taken = f"qform and sform differ; the field follows the {'sform' if is_sform else 'qform'}"
            if int(self.header["sform_code"]) and not int(self.header["qform_code"]):
                taken = "sform and voxel sizes differ; the field follows the sform with the voxel sizes"
        return f"{name}: {taken}, as SimpleITK reads it."


def placed(header: nib.Nifti1Header, shape: Sequence[int], dtype: np.dtype | type = np.uint8) -> nib.Nifti1Header:
    """A new header for an array of this shape and type, with the forms, codes, zooms and unit of ``header``."""
    new = nib.Nifti1Header()
    new.set_data_dtype(dtype)
    new.set_data_shape(shape)
    for name in PLACE:
        new[name] = header[name]
    new["pixdim"][:4] = header["pixdim"][:4]
    return new


def leaves_axial_plane(affine: np.ndarray) -> bool:
    """Whether the first two axes of a grid with this affine span another plane than the first two world axes."""
    directions = affine[:2, :2] / nib.affines.voxel_sizes(affine)[:2]
    return not np.allclose(directions.T @ directions, np.eye(2), atol=1e-4)


def parallel(affine: np.ndarray, other: np.ndarray, axes: tuple[int, int] = (2, 2)) -> bool:
    """Whether two slices are nearly parallel; ``axes`` are their axes of one voxel, across the slice."""
    across = [np.linalg.inv(matrix)[axis, :3] for matrix, axis in zip((affine, other), axes, strict=True)]
    return bool(abs(across[0] @ across[1]) > 0.9 * np.linalg.norm(across[0]) * np.linalg.norm(across[1]))


def laid_flat(grid: Grid) -> nib.Nifti1Header:
    """The header of a field on a tilted slice: its qform is ``grid.field_world``, for ITK, its sform the true position.

    Such fields have the intent name ``LAID_FLAT``, because other files may also have two different forms.
    """
    image = nib.Nifti1Image(np.zeros(grid.shape, np.uint8), grid.world)
    image.set_sform(grid.world, "aligned")
    image.set_qform(grid.field_world, "scanner")
    return image.header


def itk_affine(header: nib.Nifti1Header, shape: Sequence[int]) -> np.ndarray | None:
    """Voxel-to-world matrix (4, 4), mm, RAS, as SimpleITK reads it from a header; None if SimpleITK refuses it.

    SimpleITK itself reads the header here, because the form it takes depends on both codes and on its version.
    """
    reader, warns = sitk.ImageFileReader(), sitk.ProcessObject.GetGlobalWarningDisplay()
    new = placed(header, shape)
    new["vox_offset"] = 352
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.nii"
        path.write_bytes(new.binaryblock + bytes(4))
        reader.SetFileName(str(path))
        try:
            sitk.ProcessObject.SetGlobalWarningDisplay(False)
            reader.ReadImageInformation()
        except RuntimeError:
            return None
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    return ras_affine(reader)


def corners_apart(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """The largest distance between the corners of a grid under two affines, in voxels of the first."""
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*np.subtract(shape, 1), 1]  # (8, 4)
    apart = np.linalg.inv(affine) @ (other - affine) @ corners.T  # (4, 8)
    return float(np.linalg.norm(apart[:3], axis=0).max()) if np.isfinite(apart).all() else np.inf


def same_place(fixed: Grid, moving: Grid) -> np.ndarray | None:
    """The matrix (4, 4) from voxels of one grid to those of another with the same voxels; None if they differ.

    The axes may differ in order and direction. It is enough if the voxels agree as nibabel or as SimpleITK reads them.
    """
    for own, other in ((fixed.affine, moving.affine), (fixed.world, moving.world)):
        turn = ornt_transform(io_orientation(other), io_orientation(own))
        for matrix in (np.eye(4), inv_ornt_aff(turn, moving.shape)):
            size = tuple(np.abs(np.linalg.inv(matrix)[:3, :3]).round().astype(int) @ moving.shape)
            if size == fixed.shape and corners_apart(own, other @ matrix, size) <= SAME_GRID:
                return matrix
    return None


def sample(
    values: np.ndarray,
    displacement: np.ndarray,
    before: np.ndarray | None = None,
    after: np.ndarray | None = None,
    order: int = 0,
) -> np.ndarray:
    """Sample values at after(before(x) + u(x)) for all voxels x, with 0 outside the field of view, as in ITK.

    The field of view is -0.5 <= x < N - 0.5 along each axis. Beyond the outermost voxel centres, the outermost values
    apply.

    Args:
        values: (X, Y, Z).
        displacement: u, (3, *spatial).
        before, after: matrices (4, 4), such as from voxels to voxels of another grid; None for the identity.
        order: 0 for nearest neighbour, halves rounded up as in ITK; 1 for linear.

    Returns:
        (*spatial), of the type of ``values``.
    """
    before, after = (np.eye(4) if matrix is None else matrix for matrix in (before, after))
    spatial = displacement.shape[1:]
    found, last = np.empty(spatial, values.dtype), np.reshape(values.shape, (3, 1)) - 0.5
    step = max(1, AT_ONCE // max(1, int(np.prod(spatial[1:]))))
    for start in range(0, spatial[0], step):
        part = slice(start, start + step)
        voxels = np.indices(found[part].shape, dtype=np.float64).reshape(3, -1)
        voxels[0] += start
        places = before[:3, :3] @ voxels + before[:3, 3:] + displacement[:, part].reshape(3, -1)
        places = after[:3, :3] @ places + after[:3, 3:]
        inside = ((places >= -0.5) & (places < last)).all(axis=0)
        sampled, places = np.zeros(inside.shape, values.dtype), places[:, inside]
        if order == 0:  # by index: map_coordinates computes in float64, which does not hold all 64-bit integers
            nearest = np.floor(places + 0.5).astype(np.intp)
            sampled[inside] = values[tuple(np.minimum(nearest, np.reshape(values.shape, (3, 1)) - 1))]
        else:
            sampled[inside] = map_coordinates(values, places, order=order, mode="nearest", output=values.dtype)
        found[part] = sampled.reshape(found[part].shape)
    return found
