"""Volumes from files: what is read, what is refused, and that other programs understand what is written."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.networks.blocks import Warp
from scipy.ndimage import map_coordinates

from pairdiff_core import fields, volumes
from pairdiff_core.checkpoints import CheckpointError
from pairdiff_core.pairs import DataError

SHAPE = (20, 24, 18)
STRAIGHT = np.diag([-1.0, -1.0, 1.0, 1.0])


def oblique(spacing: tuple[float, ...] = (0.8, 1.5, 2.2)) -> np.ndarray:
    """Rotated about all three axes, with unequal spacing and the origin elsewhere."""
    affine = np.eye(4)
    for axis, angle in enumerate((0.3, -0.5, 0.7)):
        turn, (i, j) = np.eye(4), [other for other in range(3) if other != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        affine = affine @ turn
    affine[:3, :3] *= spacing
    affine[:3, 3] = (12.0, -40.0, 7.5)
    return affine


AFFINES = {"straight": STRAIGHT, "unequal": np.diag([2.0, 0.7, 1.3, 1.0]), "oblique": oblique()}


def write(path: Path, values: np.ndarray, affine: np.ndarray = STRAIGHT) -> Path:
    image = nib.Nifti1Image(values, affine, dtype=values.dtype)
    image.set_qform(affine, code="scanner")  # a rotation, which SimpleITK goes by
    nib.save(image, path)
    return path


def boxes(shape: tuple[int, ...] = SHAPE, shift: int = 0, dtype: type = np.uint8) -> np.ndarray:
    """Two boxes, 3 and 7, with background around them."""
    values = np.zeros(shape, dtype)
    places = [slice(size // 4, size // 2 + 1) for size in shape]
    values[tuple(places)] = 3
    values[tuple(slice(place.stop - 1, place.stop + 2 + shift) for place in places)] = 7
    return values


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "fixed.nii.gz", boxes()), write(tmp_path / "moving.nii.gz", boxes(shift=2))


def pair_at(folder: Path, affine: np.ndarray, shape: tuple[int, ...] = SHAPE) -> volumes.VolumePair:
    fixed = write(folder / "fixed.nii.gz", boxes(shape), affine)
    return volumes.read_pair(fixed, write(folder / "moving.nii.gz", boxes(shape, 2), affine))


def wavy(spatial: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A displacement (D, *spatial) of up to some voxels."""
    generator = torch.Generator().manual_seed(seed)
    return fields.random_velocity(1, spatial, amplitude=1.2, smoothness=7, generator=generator)[0]


def lands_inside(displacement: torch.Tensor) -> np.ndarray:
    """Where x + u(x) is a place between the outermost voxel centres, bool (*spatial)."""
    spatial = displacement.shape[1:]
    there = fields.identity_grid(spatial) + displacement
    last = torch.tensor(spatial).reshape(-1, *[1] * len(spatial)) - 1
    return ((there >= 0) & (there <= last)).all(0).numpy()


# ----------------------------------------------------------------------------------------------- reading


def test_labels_are_indices_into_the_sorted_values_of_both(tmp_path):
    fixed = write(tmp_path / "f.nii", np.where(boxes() == 3, -5, boxes().astype(np.int16)), oblique())
    moving = write(tmp_path / "m.nii", boxes(shift=1, dtype=np.float32) * 100, oblique())
    pair = volumes.read_pair(fixed, moving)
    assert pair.values.tolist() == [-5, 0, 7, 300, 700]
    assert np.array_equal(pair.values[pair.labels[1].numpy()], nib.load(moving).get_fdata())
    assert pair.labels.dtype == torch.uint8 and pair.spatial == SHAPE
    assert pair.spacing == pytest.approx((0.8, 1.5, 2.2)) and pair.moving_dtype == np.float32


@pytest.mark.parametrize(
    "stored, spacing",
    [((20, 24), (2.0, 0.7)), ((20, 24, 1), (2.0, 0.7)), ((20, 1, 24), (2.0, 1.3)), ((1, 20, 24), (0.7, 1.3))],
)
def test_one_slice_is_two_dimensional(tmp_path, stored, spacing):
    values, affine = boxes((20, 24)).reshape(stored), AFFINES["unequal"]
    pair = volumes.read_pair(
        write(tmp_path / "f.nii", values, affine), write(tmp_path / "m.nii", values, affine)
    )
    assert pair.spatial == (20, 24) and pair.spacing == pytest.approx(spacing)
    displacement = wavy((20, 24))
    volumes.write_field(tmp_path / "u.nii.gz", pair, displacement)
    volumes.write_field(tmp_path / "v.nii.gz", pair, displacement, "l2r")
    vectors, voxels = (np.asarray(nib.load(tmp_path / name).dataobj) for name in ("u.nii.gz", "v.nii.gz"))
    volume = (20, 24, 1) if len(stored) == 2 else stored
    assert vectors.shape == (*volume, 1, 3) and voxels.shape == (*volume, 3)
    axis = volume.index(1)
    assert not voxels[..., axis].any() and not vectors[..., axis].any()
    assert np.array_equal(np.delete(voxels, axis, -1).reshape(20, 24, 2), displacement.movedim(0, -1))
    assert volumes.warp_moving(pair, displacement).shape == stored


def test_a_single_time_point_is_a_volume(tmp_path, files):
    assert volumes.read_pair(write(tmp_path / "t.nii", boxes()[..., None]), files[1]).spatial == SHAPE


def spoil(kind: str, path: Path) -> None:
    """Replace a volume by one that is wrong in one way."""
    values, affine = boxes().astype(np.float32), STRAIGHT.copy()
    if kind == "shape":
        values = values[:-1]
    elif kind == "affine":
        affine[0, 3] = 0.5
    elif kind == "direction":
        affine[0, 0] = 1
    elif kind == "time":
        values = np.stack([values, values], -1)
    elif kind == "empty":
        values[:] = 0
    elif kind == "nan":
        values[3, 3, 3] = np.nan
    elif kind == "infinite":
        values[3, 3, 3] = -np.inf
    elif kind == "fraction":
        values[3, 3, 3] = 0.5
    elif kind == "intensities":
        values = np.arange(values.size, dtype=np.float32).reshape(SHAPE)
    if kind == "flat affine":  # in the bytes: nibabel would not write it with a qform
        image = nib.Nifti1Image(values, STRAIGHT)
        image.header["srow_x"] = 0
        image.header["qform_code"] = 0
        content = bytearray(image.to_bytes())
        content[280:296] = bytes(16)  # srow_x
        path.write_bytes(bytes(content))
        return
    write(path, values, affine)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[:-200])
    elif kind == "few voxels":
        path.write_bytes(gzip.compress(gzip.decompress(content)[:-99]))
    elif kind in ("vast", "type"):  # a header of 27 TB, one of a number type that there is not
        changed = bytearray(gzip.decompress(content))
        changed[42:48] = np.array([30_000] * 3 if kind == "vast" else SHAPE, np.int16).tobytes()
        changed[70:72] = np.array([64 if kind == "vast" else 999], np.int16).tobytes()
        path.write_bytes(gzip.compress(changed))
    elif kind == "text":
        path.write_text("This is no image.\n" * 99)
    elif kind == "half a pair":  # its voxels would be in another file
        changed = bytearray(gzip.decompress(content))
        changed[344:348] = b"ni1\0"
        path.write_bytes(gzip.compress(changed[:352]))
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()


KINDS = {
    "shape": "has shape",
    "affine": "lies elsewhere",
    "direction": "lies elsewhere",
    "time": "expected one volume",
    "empty": "is empty",
    "nan": "NaN or infinite",
    "infinite": "NaN or infinite",
    "fraction": "no whole numbers",
    "intensities": "intensity images",
    "flat affine": "places no voxels",
    "truncated": "truncated or damaged",
    "few voxels": "truncated",
    "vast": "truncated.*of 216000000000352 bytes",
    "type": "not a NIfTI",
    "text": "not a NIfTI",
    "half a pair": "not a NIfTI|truncated",
    "missing": "does not exist",
    "folder": "does not exist or is no file",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_label_volume_is_refused_by_name(files, kind, caplog):
    spoil(kind, files[1])
    with pytest.raises(DataError, match=KINDS[kind]) as error:
        volumes.read_pair(*files)
    assert str(files[1]) in str(error.value)
    assert not caplog.records, "nibabel says nothing beside it"


def test_two_images_of_one_and_the_same_value_are_refused(files):
    for path in files:
        write(path, np.ones(SHAPE, np.uint8))
    with pytest.raises(DataError, match="nothing to register by"):
        volumes.read_pair(*files)


def test_headers_that_differ_by_rounding_are_one_grid(files):
    affine = STRAIGHT.copy()
    affine[0, 3] += 1e-4
    write(files[1], boxes(shift=2), affine)
    assert volumes.read_pair(*files).spatial == SHAPE


def test_padding_keeps_the_indices_of_voxels():
    labels = torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4)
    padded = volumes.pad_to(labels, (4, 3, 7))
    assert padded.shape == (1, 4, 3, 7) and int(padded.sum()) == int(labels.sum())
    assert torch.equal(volumes.crop_to(padded, (2, 3, 4)), labels)


# -------------------------------------------------------------------------------- what other programs read


@pytest.mark.parametrize("name", AFFINES)
def test_simpleitk_warps_by_the_field_as_the_core_does(tmp_path, name):
    pair, displacement = pair_at(tmp_path, AFFINES[name]), wavy(SHAPE)
    volumes.write_field(tmp_path / "field.nii.gz", pair, displacement)
    volumes.write_nifti(tmp_path / "warped.nii.gz", volumes.warp_moving(pair, displacement), pair.affine)
    field = sitk.ReadImage(str(tmp_path / "field.nii.gz"), sitk.sitkVectorFloat64)
    fixed, moving = (sitk.ReadImage(str(path)) for path in pair.paths)
    np.testing.assert_allclose(field.GetDirection(), fixed.GetDirection(), atol=1e-5)
    np.testing.assert_allclose(field.GetOrigin(), fixed.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(field.GetSpacing(), fixed.GetSpacing(), atol=1e-5)
    transform, inside = sitk.DisplacementFieldTransform(field), lands_inside(displacement)
    assert inside.mean() > 0.7 and displacement.abs().max() > 2

    labels = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkNearestNeighbor)).T
    own = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "warped.nii.gz"))).T
    assert (labels == own)[inside].mean() > 0.999  # halves may be rounded either way
    assert (own != boxes(shift=2))[inside].mean() > 0.01, "the field does something"

    smooth = fields.random_velocity(
        1, SHAPE, amplitude=100, smoothness=5, generator=torch.Generator().manual_seed(1)
    )[:, :1]
    image = sitk.GetImageFromArray(smooth[0, 0].numpy().T)
    image.CopyInformation(moving)
    resampled = sitk.GetArrayFromImage(sitk.Resample(image, fixed, transform, sitk.sitkLinear)).T
    expected = fields.warp(smooth, displacement[None])[0, 0].numpy()
    np.testing.assert_allclose(resampled[inside], expected[inside], atol=0.1)  # of values up to some hundred


def test_the_field_is_a_vector_image_of_float32_in_mm(tmp_path):
    pair = pair_at(tmp_path, oblique())
    volumes.write_field(tmp_path / "field.nii.gz", pair, wavy(SHAPE))
    image = nib.load(tmp_path / "field.nii.gz")
    assert image.shape == (*SHAPE, 1, 3) and image.get_data_dtype() == np.float32
    assert image.header.get_intent()[0] == "vector" and image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.affine, oblique(), atol=1e-5)


def test_learn2reg_warps_by_identity_plus_field(tmp_path):
    pair, displacement = pair_at(tmp_path, oblique()), wavy(SHAPE)
    volumes.write_field(tmp_path / "field.nii.gz", pair, displacement, "l2r")
    field = nib.load(tmp_path / "field.nii.gz").get_fdata()
    assert field.shape == (*SHAPE, 3)
    identity = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    moving = nib.load(pair.paths[1]).get_fdata()
    where = identity + np.moveaxis(field, -1, 0)
    expected = map_coordinates(moving, where, order=0, mode="nearest")
    assert (volumes.warp_moving(pair, displacement) == expected).mean() > 0.999


def test_monai_warps_by_the_field_through_the_converter(tmp_path):
    pair, displacement = pair_at(tmp_path, STRAIGHT), wavy(SHAPE)
    volumes.write_field(tmp_path / "field.nii.gz", pair, displacement, "l2r")
    read = torch.from_numpy(nib.load(tmp_path / "field.nii.gz").get_fdata(dtype=np.float32)).movedim(-1, 0)
    image = pair.labels[1:, None].float()
    found = Warp(mode="bilinear", padding_mode="border")(image, fields.to_monai(read)[None])
    torch.testing.assert_close(found, fields.warp(image, displacement[None]), atol=1e-3, rtol=0)


# ----------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32, np.float64])
def test_warped_labels_keep_type_values_and_place(tmp_path, dtype):
    fixed, moving = write(tmp_path / "f.nii", boxes()), write(tmp_path / "m.nii", boxes(shift=2, dtype=dtype))
    pair = volumes.read_pair(fixed, moving)
    volumes.write_nifti(tmp_path / "w.nii.gz", volumes.warp_moving(pair, torch.zeros(3, *SHAPE)), pair.affine)
    image = nib.load(tmp_path / "w.nii.gz")
    assert image.get_data_dtype() == dtype and np.array_equal(image.affine, STRAIGHT)
    assert np.array_equal(np.asarray(image.dataobj), boxes(shift=2, dtype=dtype))


def test_a_sheared_grid_is_not_passed_off_as_a_rotation(tmp_path):
    sheared = np.eye(4)
    sheared[0, 1] = 0.4
    volumes.write_nifti(tmp_path / "s.nii", boxes(), sheared)
    image = nib.load(tmp_path / "s.nii")
    assert np.allclose(image.affine, sheared) and int(image.header["qform_code"]) == 0


def test_the_same_contents_give_the_same_file(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        volumes.write_nifti(tmp_path / name, boxes(), STRAIGHT)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch, function):
    path = tmp_path / "field.nii.gz"
    path.write_bytes(b"older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(CheckpointError, match="field.nii.gz could not be written .*No space left"):
        volumes.write_nifti(path, boxes(), STRAIGHT)
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["field.nii.gz"]


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"someone else's")
    (tmp_path / "out.nii").symlink_to(tmp_path / "target")
    volumes.write_nifti(tmp_path / "out.nii", boxes(), STRAIGHT)
    assert (tmp_path / "target").read_bytes() == b"someone else's" and not (tmp_path / "out.nii").is_symlink()


def test_what_cannot_be_written_is_told_before(tmp_path):
    (tmp_path / "file").write_text("")
    volumes.check_writable(tmp_path / "new.nii")
    assert os.listdir(tmp_path) == ["file"]
    for path, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "f.nii", "no folder"),
        (tmp_path / "file" / "f.nii", "no folder"),
    ):
        with pytest.raises(DataError, match=said):
            volumes.check_writable(path)


def test_another_format_is_refused(tmp_path, files):
    with pytest.raises(ValueError, match="there is no format 'ants'"):
        volumes.write_field(tmp_path / "u.nii", volumes.read_pair(*files), torch.zeros(3, *SHAPE), "ants")
