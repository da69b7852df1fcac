"""Read displacement fields from files and apply them to images and landmarks."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pairdiff_cli.grids import (
    LAID_FLAT,
    SAME_GRID,
    Grid,
    corners_apart,
    leaves_axial_plane,
    parallel,
    same_place,
    sample,
)
from pairdiff_cli.volume_files import MAX_LABELS, one_volume, write_nifti
from pairdiff_core.data.image_files import is_whole, near_whole, read_image
from pairdiff_core.errors import DataError
from pairdiff_core.storage import write_file

DECIMALS = 4  # of written landmarks


@dataclass(frozen=True, eq=False)
class Field:
    """A displacement from fixed to moving on the grid of its file."""

    displacement: np.ndarray  # (3, X, Y, Z), in voxels of the grid
    grid: Grid
    flat: bool  # whether its vectors have two components
    form: str  # "itk" or "l2r"
    path: Path

    @property
    def world(self) -> np.ndarray:
        """Voxel-to-world matrix (4, 4), mm, RAS, as SimpleITK reads the field; its vectors follow these axes."""
        return self.grid.field_world if self.flat else self.grid.world

    @property
    def place(self) -> np.ndarray:
        """As :attr:`world`, but the true position of a slice that is not axial."""
        if self.laid_flat:
            return self.grid.affine
        return self.grid.world if self.grid.tilted else self.world

    @property
    def tilted(self) -> bool:
        """Whether it is a two-dimensional field on a slice that is not axial."""
        return self.laid_flat or (self.flat and self.grid.tilted)

    @property
    def laid_flat(self) -> bool:
        """Whether its slice is not axial, its sform is the true position and its qform is for ITK."""
        named = self.grid.header["intent_name"].item() == LAID_FLAT.encode()
        return self.flat and named and leaves_axial_plane(self.grid.affine)

    @property
    def note(self) -> str | None:
        """As :meth:`Grid.note`, but None if :attr:`laid_flat`, where qform and sform differ on purpose."""
        return None if self.laid_flat else self.grid.note(self.path)

    def onto(self, other: Grid, path: Path) -> np.ndarray:
        """The matrix (4, 4) from voxels of the field to voxels of an image.

        A field in mm uses the image's position as SimpleITK reads it. A field in voxels uses the image's own grid, if
        that is the field's grid up to the order and direction of the axes. Slices that are not axial have their true
        position, unless ITK itself made the field from that image, so that it has the grid that ITK reads.

        Raises:
            DataError: if the field is two-dimensional and the image is a volume or lies in another plane.
        """
        if self.form == "l2r" and (same := same_place(self.grid, other)) is not None:
            return same
        if self.flat and other.shape[2] > 1:
            raise DataError(f"{self.path} is a two-dimensional field, but {path} is a volume. Give a slice.")
        if not self.flat or self.tilted or other.tilted:
            by_itk = self.flat and not self.tilted and other.shape == self.grid.shape
            if by_itk and corners_apart(self.world, other.field_world, other.shape) <= SAME_GRID:
                return np.linalg.inv(other.field_world) @ self.world
            if self.flat and not parallel(self.place, other.world):
                raise DataError(
                    f"{path} lies in a different plane from the field {self.path}. Give a slice of that plane, or make "
                    "the field with register --format l2r, in voxels."
                )
            return np.linalg.inv(other.world) @ self.place
        return np.linalg.inv(other.field_world) @ self.world


def read_field(path: str | Path, form: str | None = None) -> Field:
    """Read a displacement field as written by :func:`pairdiff_cli.volume_files.write_field` or ANTs.

    Args:
        form: "itk" or "l2r"; None takes "itk" for vectors along the fifth axis, "l2r" along the fourth.

    Raises:
        DataError: if it is not a displacement field, or not all numbers are finite; the message names the file.
    """
    path = Path(path)
    values, image = read_image(path)
    if values.ndim == 5 and values.shape[3] == 1:
        vectors, found = values[:, :, :, 0], "itk"
    else:
        vectors, found = values, "l2r"
    dims = vectors.shape[-1]
    if vectors.ndim != 4 or dims not in (2, 3) or (dims == 2 and vectors.shape[2] != 1) or not vectors.size:
        raise DataError(
            f"{path} is not a displacement field: its shape is {values.shape}, not (X, Y, Z, 1, 3), (X, Y, 1, 1, 2) or "
            "(X, Y, Z, 3)."
        )
    if not np.isfinite(vectors).all():
        raise DataError(f"{path} holds NaN or infinite values. Compute the field again.")
    grid, form = Grid.of(image, path), form or found
    field = Field(np.zeros((3, *grid.shape), np.float32), grid, dims == 2, form, path)
    field.displacement[:dims] = np.moveaxis(vectors, -1, 0)
    if form == "itk":  # millimetres along LPS -> RAS -> voxels
        field.displacement[:2] *= -1
        to_voxels = np.linalg.inv(field.world)[:dims, :dims].astype(np.float32)
        field.displacement[:dims] = np.tensordot(to_voxels, field.displacement[:dims], axes=1)
    return field


def warp_image(
    field: Field, moving: Path, out: Path, interpolation: str | None = None, onto: Path | None = None
) -> tuple[str, list[str]]:
    """Warp the moving image with a field and write it on the field's grid, or on that of the image ``onto``.

    The result is 0 outside the moving image. Outside the field, u is 0. Both are as in ITK.

    Args:
        interpolation: "nearest" or "linear"; None takes nearest for labels, else linear. Labels are integer types, and
            at most ``MAX_LABELS`` different whole numbers of other types or with a scale factor.

    Returns:
        A line about the result, and notes.
    """
    values, image = read_image(moving)
    values, grid = one_volume(values, moving), Grid.of(image, moving)
    whole = near_whole(values, image)
    labels = values.dtype.kind in "iu" or (bool(is_whole(whole).all()) and len(np.unique(whole)) <= MAX_LABELS)
    interpolation = interpolation or ("nearest" if labels else "linear")
    if interpolation == "nearest":
        values = whole if labels else values
    else:
        values = values.astype(np.result_type(values.dtype, np.float32))
    target, shape, displacement, before = field.grid, field.grid.shape, field.displacement, None
    header = None if field.laid_flat else target.header
    notes = [note for note in (field.note, grid.note(moving)) if note]
    if onto is not None:
        other, reference = read_image(onto)
        other = one_volume(other, onto)
        target, shape = Grid.of(reference, onto), other.shape
        header = target.header
        before = np.linalg.inv(field.onto(target, onto))
        displacement = np.stack(
            [sample(part, np.broadcast_to(np.float32(0), (3, *target.shape)), before, order=1) for part in displacement]
        )
    elif values.ndim == 2:
        shape = shape[:2]
    volume = values.reshape(grid.shape)
    warped = sample(volume, displacement, before, field.onto(grid, moving), int(interpolation == "linear"))
    write_nifti(out, warped.reshape(shape), target.affine, header=header)
    if not warped.any():
        notes.append("the result is empty: the field points outside the moving image everywhere.")
    return f"{out}: {' x '.join(map(str, shape))} voxels, {interpolation}", notes


def move_landmarks(field: Field, points: Path, out: Path, voxels: bool = False) -> tuple[str, list[str]]:
    """Move landmarks of the fixed image to their positions in the moving image, and write them.

    Args:
        points: CSV with columns x, y, z among others, or with these three alone and no header line, in mm, RAS, as in
            NIfTI; z may be missing if the field is of one slice.
        voxels: whether landmarks and result are voxel indices on the field's grid instead of mm.
    """
    rows, columns = _read_points(points)
    table = _table(rows, columns)
    given = table.shape[1]
    if given == 2 and field.grid.shape[2] > 1:
        raise DataError(f"{points} has no z, but {field.path} is a field of a volume. Give columns x, y, z.")
    if given == 2 and field.tilted and not voxels:
        raise DataError(f"{points} has no z, but {field.path} is not of an axial slice. Give x, y, z or --voxels.")
    world = field.world if given == 2 else field.place if field.tilted else field.grid.world
    places = np.column_stack([table, np.zeros((len(table), 3 - given)), np.ones(len(table))]).T  # (4, K)
    index = places if voxels else np.linalg.inv(world) @ places
    at = index[:3].reshape(3, -1, 1, 1)
    still = np.eye(4) * [0, 0, 0, 1]  # the displacement alone holds the positions
    moves = np.stack([sample(part, at, before=still, order=1) for part in field.displacement]).reshape(3, -1)
    moved = index.copy()
    moved[:3] += moves
    moved = moved if voxels else world @ moved
    outside = int(((at < -0.5) | (at >= np.reshape(field.grid.shape, (3, 1, 1, 1)) - 0.5)).any(axis=0).sum())
    for row, place in zip(rows, moved[:given].T, strict=True):
        for column, value in zip(columns, place, strict=True):
            row[column] = f"{value:.{DECIMALS}f}"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([*_names(points), *rows])
    write_file(out, text.getvalue().encode())
    notes = [field.note] if not voxels and field.note else []
    if outside:
        notes.append(f"{outside} of {len(rows)} landmarks lie outside the field and stay where they are.")
    return f"{out}: {len(rows)} landmark{'s' * (len(rows) != 1)}, {'voxels' if voxels else 'mm'}", notes


def read_landmarks(path: Path) -> np.ndarray:
    """Read landmarks from a CSV file as for :func:`move_landmarks`, float64 (K, 3), or (K, 2) without z.

    Raises:
        DataError: if it holds no landmarks, or not all numbers are finite; the message names file and line.
    """
    return _table(*_read_points(path))


def _table(rows: list[list[str]], columns: list[int]) -> np.ndarray:
    return np.array([[float(row[column]) for column in columns] for row in rows], np.float64)


def _names(path: Path) -> list[list[str]]:
    """The row of column names of a CSV file, if it has one."""
    first = next(csv.reader(path.read_text("utf-8-sig").splitlines()), [])
    return [] if _all_numbers(first) else [first]


def _all_numbers(row: list[str]) -> bool:
    try:
        return bool([float(cell) for cell in row])
    except ValueError:
        return False


def _read_points(path: Path) -> tuple[list[list[str]], list[int]]:
    """The rows of a CSV file without the column names, and which columns are x, y and, if present, z."""
    try:
        names = [name.strip().lower() for name in (_names(path) or [[]])[0]]
        rows = [row for row in csv.reader(path.read_text("utf-8-sig").splitlines()) if row][bool(names) :]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is missing or not a text file ({error}). Give CSV with columns x, y, z.") from error
    wanted = [axis for axis in "xyz" if axis in names] if names else "xyz"[: len(rows[0])] if rows else ""
    if not rows or (names and not {"x", "y"} <= set(names)) or not {"x", "y"} <= set(wanted):
        raise DataError(f"{path} has no landmarks. Give CSV with columns x, y, z and one landmark per line.")
    columns = [names.index(axis) if names else "xyz".index(axis) for axis in wanted]
    for number, row in enumerate(rows, start=1 + bool(names)):
        cells = [row[column] for column in columns if column < len(row)]
        if len(cells) < len(columns) or not _all_numbers(cells) or not np.isfinite([float(c) for c in cells]).all():
            raise DataError(f"{path}, line {number}: {','.join(row)} is not a landmark. Give numbers x, y, z.")
    return rows, columns
