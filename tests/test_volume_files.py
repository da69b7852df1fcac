"""Volumes from files: what is read, what is refused, and that other programs understand what is written."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates

from pairdiff_core import fields
from pairdiff_core.apps.volume_files import VolumePair, read_pair, write_field, write_nifti
from pairdiff_core.errors import CheckpointError, DataError
from pairdiff_core.profiles import get_profile

SHAPE = (20, 24, 18)
STRAIGHT = np.diag([-1.0, -1.0, 1.0, 1.0])


def oblique() -> np.ndarray:
    """Rotated about all three axes, with unequal spacing and the origin elsewhere."""
    affine = np.eye(4)
    for axis, angle in enumerate((0.3, -0.5, 0.7)):
        turn, (i, j) = np.eye(4), [other for other in range(3) if other != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        affine = affine @ turn
    affine[:3, :3] *= (0.8, 1.5, 2.2)
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


def pair_at(folder: Path, affine: np.ndarray = STRAIGHT, dtype: type = np.uint8) -> VolumePair:
    fixed, moving = folder / "fixed.nii.gz", folder / "moving.nii.gz"
    return read_pair(write(fixed, boxes(), affine), write(moving, boxes(shift=2, dtype=dtype), affine))


def wavy(spatial: tuple[int, ...], amplitude: float = 1.2, seed: int = 0) -> torch.Tensor:
    """A displacement (D, *spatial) of up to some voxels."""
    random = torch.Generator().manual_seed(seed)
    return fields.random_velocity(1, spatial, amplitude=amplitude, smoothness=7, generator=random)[0]


# ----------------------------------------------------------------------------------------------- reading


def test_labels_are_indices_into_the_sorted_values_of_both(tmp_path):
    fixed = write(tmp_path / "f.nii", np.where(boxes() == 3, -5, boxes().astype(np.int16)), oblique())
    moving = write(tmp_path / "m.nii", boxes(shift=1, dtype=np.float32) * 100, oblique())
    pair = read_pair(fixed, moving)
    assert pair.values.tolist() == [-5, 0, 7, 300, 700]
    pairs = pair.pairs()
    assert np.array_equal(pair.values[pairs.moving[0].numpy()], nib.load(moving).get_fdata())
    assert (pairs.spatial, pairs.num_labels, pairs.names) == (SHAPE, 5, ("f.nii~m.nii",))
    assert pairs.spacing == pytest.approx((0.8, 1.5, 2.2))


@pytest.mark.parametrize(
    "stored, spacing",
    [((20, 24), (2.0, 0.7)), ((20, 24, 1), (2.0, 0.7)), ((20, 1, 24), (2.0, 1.3)), ((1, 20, 24), (0.7, 1.3))],
)
def test_one_slice_is_two_dimensional(tmp_path, stored, spacing):
    values, affine = boxes((20, 24)).reshape(stored), AFFINES["unequal"]
    pair = read_pair(write(tmp_path / "f.nii", values, affine), write(tmp_path / "m.nii", values, affine))
    assert pair.pairs().spatial == (20, 24) and pair.spacing == pytest.approx(spacing)
    displacement = wavy((20, 24))
    write_field(tmp_path / "u.nii.gz", pair, displacement)
    write_field(tmp_path / "v.nii.gz", pair, displacement, "l2r")
    vectors, voxels = (np.asarray(nib.load(tmp_path / name).dataobj) for name in ("u.nii.gz", "v.nii.gz"))
    volume = (20, 24, 1) if len(stored) == 2 else stored
    assert vectors.shape == (*volume, 1, 3) and voxels.shape == (*volume, 3)
    axis = volume.index(1)
    assert not voxels[..., axis].any() and not vectors[..., axis].any()
    assert np.array_equal(np.delete(voxels, axis, -1).reshape(20, 24, 2), displacement.movedim(0, -1))
    assert pair.warped_moving(displacement).shape == stored


def test_a_single_time_point_is_a_volume(tmp_path):
    path = write(tmp_path / "t.nii", boxes()[..., None])
    assert read_pair(path, path).pairs().spatial == SHAPE


def spoilt(value: float) -> np.ndarray:
    values = boxes(dtype=np.float32)
    values[3, 3, 3] = value
    return values


def change(path: Path, changes: dict[int, bytes], end: int | None = None) -> None:
    """Other bytes at some offsets of a compressed file, which nibabel would not write, and nothing from ``end`` on."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    for offset, given in changes.items():
        content[offset : offset + len(given)] = given
    path.write_bytes(gzip.compress(content[:end]))


SHIFTED = STRAIGHT + 0.5 * (np.arange(16) == 3).reshape(4, 4)  # by half a voxel
VAST = {42: np.array([30_000] * 3, np.int16).tobytes(), 70: np.int16(64).tobytes()}  # 27 TB of float64
REFUSED = {
    "shape": ("has shape", lambda path: write(path, boxes()[:-1])),
    "place": ("lies elsewhere", lambda path: write(path, boxes(), SHIFTED)),
    "direction": ("lies elsewhere", lambda path: write(path, boxes(), np.diag([1.0, -1.0, 1.0, 1.0]))),
    "time": ("not that of one volume", lambda path: write(path, np.stack([boxes(), boxes()], -1))),
    "empty": ("is empty", lambda path: write(path, np.zeros(SHAPE, np.uint8))),
    "nan": ("NaN or infinite", lambda path: write(path, spoilt(np.nan))),
    "infinite": ("NaN or infinite", lambda path: write(path, spoilt(-np.inf))),
    "fraction": ("no whole numbers", lambda path: write(path, spoilt(0.5))),
    "intensities": ("intensity images", lambda path: write(path, np.arange(8640.0).reshape(SHAPE))),
    "flat affine": ("without an inverse", lambda path: change(path, {280: bytes(16)})),
    "truncated": ("truncated or damaged", lambda path: path.write_bytes(path.read_bytes()[:-60])),
    "few voxels": ("truncated", lambda path: change(path, {}, -99)),
    "vast": ("truncated.*of 216000000000352 bytes", lambda path: change(path, VAST)),
    "type": ("not a NIfTI", lambda path: change(path, {70: np.int16(999).tobytes()})),
    "text": ("not a NIfTI", lambda path: path.write_text("This is no image.\n" * 99)),
    "half a pair": ("not a NIfTI|truncated", lambda path: change(path, {344: b"ni1\0"}, 352)),  # voxels elsewhere
    "missing": ("does not exist", lambda path: path.unlink()),
    "folder": ("is no file", lambda path: (path.unlink(), path.mkdir())),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_label_volume_is_refused_by_name(tmp_path, kind, caplog):
    said, spoil = REFUSED[kind]
    paths = pair_at(tmp_path).paths
    spoil(paths[1])
    with pytest.raises(DataError, match=said) as error:
        read_pair(*paths)
    assert str(paths[1]) in str(error.value)
    assert not caplog.records, "nibabel says nothing beside it"


def test_two_images_of_one_and_the_same_value_are_refused(tmp_path):
    path = write(tmp_path / "one.nii", np.ones(SHAPE, np.uint8))
    with pytest.raises(DataError, match="nothing to register by"):
        read_pair(path, path)


def test_headers_that_differ_by_rounding_are_one_grid(tmp_path):
    fixed, moving = pair_at(tmp_path).paths
    write(moving, boxes(shift=2), STRAIGHT + 1e-4 * (SHIFTED != STRAIGHT))
    assert read_pair(fixed, moving).shape == SHAPE


# --------------------------------------------------------------------------------- the labels of a network


def test_a_network_of_vessels_takes_all_above_zero(tmp_path):
    pair, vessels = pair_at(tmp_path), get_profile("quick", 3)
    pairs = pair.pairs(vessels)
    assert pairs.num_labels == 2 and np.array_equal(pairs.fixed[0], boxes() > 0)
    with pytest.raises(DataError, match="moving.nii.gz holds the label -7, but the network knows 0 and above"):
        read_pair(pair.paths[0], write(pair.paths[1], -boxes(dtype=np.int16))).pairs(vessels)


def test_labels_that_a_network_does_not_know_are_named_with_their_file(tmp_path):
    profile = replace(get_profile("quick", 3), num_labels=8)
    pair = pair_at(tmp_path)
    assert np.array_equal(pair.pairs(profile).moving[0], boxes(shift=2))
    other = read_pair(pair.paths[0], write(pair.paths[1], boxes() + 3 * (boxes() == 7).astype(np.uint8)))
    with pytest.raises(DataError, match="moving.nii.gz holds the label 10, but the network knows 0 to 7"):
        other.pairs(profile)


def test_volumes_are_not_for_a_network_of_slices(tmp_path):
    with pytest.raises(DataError, match="fixed.nii.gz has 3 axes, but the network knows images with 2"):
        pair_at(tmp_path).pairs(get_profile("quick", 2))


# -------------------------------------------------------------------------------- what other programs read


@pytest.mark.parametrize("name", AFFINES)
def test_simpleitk_warps_by_the_field_as_the_core_does(tmp_path, name):
    pair, displacement = pair_at(tmp_path, AFFINES[name]), wavy(SHAPE)
    write_field(tmp_path / "field.nii.gz", pair, displacement)
    write_nifti(tmp_path / "warped.nii.gz", pair.warped_moving(displacement), pair.affine)
    field = sitk.ReadImage(str(tmp_path / "field.nii.gz"), sitk.sitkVectorFloat64)
    fixed, moving = (sitk.ReadImage(str(path)) for path in pair.paths)
    np.testing.assert_allclose(field.GetDirection(), fixed.GetDirection(), atol=1e-5)
    np.testing.assert_allclose(field.GetOrigin(), fixed.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(field.GetSpacing(), fixed.GetSpacing(), atol=1e-5)
    transform, arrived = sitk.DisplacementFieldTransform(field), fields.identity_grid(SHAPE) + displacement
    last = torch.tensor(SHAPE).reshape(3, 1, 1, 1) - 1
    inside = ((arrived >= 0) & (arrived <= last)).all(0).numpy()  # between the outermost voxel centres
    assert inside.mean() > 0.7 and displacement.abs().max() > 2

    labels = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkNearestNeighbor)).T
    own = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "warped.nii.gz"))).T
    assert (labels == own)[inside].mean() > 0.999  # halves may be rounded either way
    assert (own != boxes(shift=2))[inside].mean() > 0.01, "the field does something"

    smooth = wavy(SHAPE, amplitude=100, seed=1)[None, :1]
    image = sitk.GetImageFromArray(smooth[0, 0].numpy().T)
    image.CopyInformation(moving)
    resampled = sitk.GetArrayFromImage(sitk.Resample(image, fixed, transform, sitk.sitkLinear)).T
    expected = fields.warp(smooth, displacement[None])[0, 0].numpy()
    np.testing.assert_allclose(resampled[inside], expected[inside], atol=0.1)  # of values up to some hundred


def test_the_field_is_a_vector_image_of_float32_in_mm(tmp_path):
    write_field(tmp_path / "field.nii.gz", pair_at(tmp_path, oblique()), wavy(SHAPE))
    image = nib.load(tmp_path / "field.nii.gz")
    assert image.shape == (*SHAPE, 1, 3) and image.get_data_dtype() == np.float32
    assert image.header.get_intent()[0] == "vector" and image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.affine, oblique(), atol=1e-5)


def test_learn2reg_warps_by_identity_plus_field(tmp_path):
    pair, displacement = pair_at(tmp_path, oblique()), wavy(SHAPE)
    write_field(tmp_path / "field.nii.gz", pair, displacement, "l2r")
    field = nib.load(tmp_path / "field.nii.gz").get_fdata(dtype=np.float32)
    assert field.shape == (*SHAPE, 3)
    identity = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"))
    moving = nib.load(pair.paths[1]).get_fdata()
    expected = map_coordinates(moving, identity + np.moveaxis(field, -1, 0), order=0, mode="nearest")
    assert (pair.warped_moving(displacement) == expected).mean() > 0.999


# ----------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32, np.float64])
def test_warped_labels_keep_type_values_and_place(tmp_path, dtype):
    pair = pair_at(tmp_path, dtype=dtype)
    write_nifti(tmp_path / "w.nii.gz", pair.warped_moving(torch.zeros(3, *SHAPE)), pair.affine)
    image = nib.load(tmp_path / "w.nii.gz")
    assert image.get_data_dtype() == dtype and np.array_equal(image.affine, STRAIGHT)
    assert np.array_equal(np.asarray(image.dataobj), boxes(shift=2, dtype=dtype))


def test_a_sheared_grid_is_not_passed_off_as_a_rotation(tmp_path):
    sheared = np.eye(4)
    sheared[0, 1] = 0.4
    write_nifti(tmp_path / "s.nii", boxes(), sheared)
    image = nib.load(tmp_path / "s.nii")
    assert np.allclose(image.affine, sheared) and int(image.header["qform_code"]) == 0


def test_the_same_contents_give_the_same_file(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, boxes(), STRAIGHT)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_folder_is_not_written_over(tmp_path):
    (tmp_path / "field.nii.gz").mkdir()
    with pytest.raises(CheckpointError, match="field.nii.gz could not be written"):
        write_nifti(tmp_path / "field.nii.gz", boxes(), STRAIGHT)
    assert [path.name for path in tmp_path.iterdir()] == ["field.nii.gz"]
