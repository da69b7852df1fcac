"""Read images of several formats; for an unsuitable file, the error names it and says what to do."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from pairdiff_core.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
OF_SIMPLEITK = (".nrrd", ".nhdr", ".mha", ".mhd")
IN_TWO_FILES = (".hdr", ".img", ".hdr.gz", ".img.gz")
READ = ".nii, .nii.gz, .hdr/.img, .mgz, .mgh, .nrrd, .nhdr, .mha and .mhd"
# what nibabel raises for damaged headers; the last two are for FreeSurfer's formats
UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    WrapStructError,
    ValueError,
    OSError,
    EOFError,
    zlib.error,
    KeyError,
    TypeError,
)
EXACT = 2**53  # float64 holds all whole numbers up to this
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # otherwise it also logs each error that it raises


def read_image(path: str | Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Read the values of an image, with its scale factors applied, and the image for its header and affine.

    nibabel reads NIfTI-1, NIfTI-2, Analyze and FreeSurfer's formats; SimpleITK reads .nrrd and .mha. Vectors of the
    latter are values (X, Y, Z, 1, D) or (X, Y, 1, 1, D), as NIfTI stores them.

    Raises:
        DataError: if the file is missing, damaged or of another format, or does not hold numbers.
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith((".npy", ".npz")):
        raise DataError(
            f"{path} has no voxel size and no position. Save it as NIfTI with an affine: nibabel.save("
            "nibabel.Nifti1Image(numpy.load(...), affine), 'x.nii.gz')."
        )
    if name.endswith(OF_SIMPLEITK):
        image = _by_simpleitk(path)
    elif name.endswith(IN_TWO_FILES):
        image = _of_two_files(path)
    else:
        image = _of_one_file(path)
    try:
        values = np.asanyarray(image.dataobj)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged ({error}). Fetch it again.") from error
    if values.dtype.kind not in "uif":
        raise DataError(f"{path} holds {values.dtype} values, not numbers. Export it again; labels are whole numbers.")
    return values.astype(values.dtype.newbyteorder("="), copy=False), image


def read_label_image(path: str | Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """As :func:`read_image`, for an image that holds whole numbers, see :func:`near_whole`.

    Raises:
        DataError: as there, or if the image holds anything but whole numbers.
    """
    values, image = read_image(path)
    step, scaled = _scale(values, image)
    values = near_whole(values, image)
    broken = ~is_whole(values)
    if scaled and np.abs(values).max(initial=0) > EXACT:
        raise DataError(
            f"{path} holds labels up to {np.abs(values).max():.9g} with the scale factor {step:.6g}, which keeps at "
            "most 53 bits of them. Save it again as integers without a scale factor."
        )
    if broken.any():
        example = f"{path} holds values that are not whole numbers, such as {values[broken][0]:.9g}"
        if scaled:
            raise DataError(
                f"{example}: its header multiplies the stored values by the scale factor {step:.6g}. Save it again as "
                "integers without a scale factor."
            )
        raise DataError(
            f"{example}: NaN or infinite values, an intensity image, or labels that were interpolated. Resample labels "
            "by nearest neighbour."
        )
    return values, image


def near_whole(values: np.ndarray, image: nib.Nifti1Image) -> np.ndarray:
    """Values of :func:`read_image`, rounded to whole numbers if a scale factor has moved them slightly off.

    A value is rounded if the nearest whole number is within half a step of the scale. Other values are not changed.
    """
    step, scaled = _scale(values, image)
    if not scaled or not 0 < step < 1:  # with larger steps, whole numbers between them are lost
        return values
    whole = np.round(values)
    near = step / 2 + 1e-6 * np.abs(values).max(initial=0)  # the header has seven digits of the scale
    return np.where(np.abs(whole - values) <= near, whole, values)


def is_whole(values: np.ndarray) -> np.ndarray:
    """Where values are whole numbers, bool of their shape."""
    return np.isfinite(values) & (np.round(values) == values)


def _scale(values: np.ndarray, image: nib.Nifti1Image) -> tuple[float, bool]:
    """The scale factor of an image, and whether its values are stored as integers that are scaled."""
    scaled = values.dtype.kind == "f" and image.get_data_dtype().kind in "iu"
    return abs(getattr(image.dataobj, "slope", 1.0)), scaled


def _of_one_file(path: Path) -> nib.Nifti1Image:
    """Read NIfTI-1, NIfTI-2 or FreeSurfer's format."""
    try:
        # read to the end, so that the checksum there is verified; nibabel alone stops before it
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is missing, truncated or damaged ({error}). Fetch it again.") from error
    kind = nib.Nifti1Image
    if content[4:7] in (b"n+2", b"ni2"):
        kind = nib.Nifti2Image
    elif path.name.lower().endswith((".mgz", ".mgh")):
        kind = nib.MGHImage
    try:
        image = kind.from_bytes(content)
    except UNREADABLE as error:
        raise DataError(
            f"{path} is not a NIfTI image ({error}). Fetch or export it again. {READ} can be read; convert others, "
            "such as with SimpleITK.WriteImage(SimpleITK.ReadImage(...), 'x.nii.gz')."
        ) from error
    # before nibabel allocates memory for the size in the header, which may be wrong and too large
    needed = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    if len(content) < needed:
        raise DataError(f"{path} is truncated: it has {len(content)} of {needed} bytes. Fetch it again.")
    return image if kind is not nib.MGHImage else nib.Nifti1Image(image.dataobj, image.affine)


def _of_two_files(path: Path) -> nib.Nifti1Image:
    """Read a NIfTI or Analyze image from its .hdr and .img file, given either of them."""
    try:
        image = nib.load(path)
    except UNREADABLE as error:
        raise DataError(f"{path} is not an image of a .hdr and an .img file ({error}). Export it again.") from error
    if isinstance(image, nib.Nifti1Pair):
        return image
    header = nib.Nifti1Header()  # Analyze has voxel sizes, but no position, like NIfTI without forms
    header.set_data_dtype(image.get_data_dtype())
    header.set_data_shape(image.shape)
    header.set_zooms(image.header.get_zooms())
    return nib.Nifti1Image(image.dataobj, header.get_best_affine(), header)


def _by_simpleitk(path: Path) -> nib.Nifti1Image:
    """Read an image of two or three axes, of numbers or vectors, with SimpleITK."""
    import SimpleITK as sitk  # only these formats need it

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip() if path.is_file() else "there is no such file"
        raise DataError(f"{path} cannot be read by SimpleITK ({reason}). Fetch or export it again.") from error
    dims = image.GetDimension()
    if dims not in (2, 3):
        raise DataError(f"{path} has {dims} axes: it is not a volume (X, Y, Z) or slice (X, Y). Take one volume of it.")
    affine, values, vectors = ras_affine(image), sitk.GetArrayFromImage(image), image.GetNumberOfComponentsPerPixel()
    if vectors > 1:
        values = values.transpose(*reversed(range(dims)), dims)  # (Z, Y, X, C) -> (X, Y, Z, C)
        values = values.reshape(*(*image.GetSize(), 1)[:3], 1, vectors)
    else:
        values = values.T
    image = nib.Nifti1Image(values, affine, dtype=values.dtype)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    return image


def ras_affine(image: Any) -> np.ndarray:
    """Voxel-to-world matrix (4, 4), mm, RAS, of a SimpleITK image or image reader with two or three axes."""
    dims, affine = len(image.GetSpacing()), np.eye(4)
    affine[:dims, :dims] = np.reshape(image.GetDirection(), (dims, dims)) * image.GetSpacing()
    affine[:dims, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS -> RAS
