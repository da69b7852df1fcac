"""Label images from NIfTI files: read whole, checked, and refused with the file's name and what to do."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from pairdiff_core.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # else a line beside each error that it raises


def read_label_image(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """The values of a label image as stored, all of them whole numbers, and the image for its header and affine.

    Raises:
        DataError: if the file is missing, damaged or no NIfTI, or holds anything but whole numbers.
    """
    try:
        # whole, so that the checksum at the end is looked at: nibabel alone stops reading before it
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is missing, truncated or damaged ({error}). Fetch it again.") from error
    try:
        image = nib.Nifti1Image.from_bytes(content)
    except (ImageFileError, HeaderDataError, WrapStructError) as error:
        raise DataError(f"{path} is not a NIfTI image ({error}). Fetch or export it again.") from error
    # before nibabel makes room for what a wrong header promises, which may be more than the memory has
    needed = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    if len(content) < needed:
        raise DataError(f"{path} is truncated: it has {len(content)} of {needed} bytes. Fetch it again.")
    values = np.asanyarray(image.dataobj)
    if values.dtype.kind not in "uif":
        raise DataError(f"{path} holds {values.dtype} values; labels are whole numbers. Export it again.")
    broken = ~np.isfinite(values) | (np.round(values) != values)
    if broken.any():
        raise DataError(
            f"{path} holds values that are no whole numbers, such as {values[broken][0]:g}: NaN or infinite values, "
            "an intensity image, or labels that were interpolated. Resample labels by nearest neighbour."
        )
    return values, image
