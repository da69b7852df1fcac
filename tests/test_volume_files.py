"""Volumes from files: what is read, what is refused, and that other programs understand what is written."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from pairdiff_cli.grids import Grid, placed
from pairdiff_cli.volume_files import VolumePair, read_pair, write_field, write_nifti
from pairdiff_core import fields
from pairdiff_core.data.image_files import read_label_image
from pairdiff_core.errors import CheckpointError, DataError
from pairdiff_core.profiles import get_profile

SHAPE = (20, 24, 18)
BOUNDED = settings(
    deadline=None,
    derandomize=True,  # the same cases each time, so that a failure is due to a change
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
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
    image.set_qform(affine, code="scanner")  # a rotation, which SimpleITK uses
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
    """A displacement (D, *spatial) of a few voxels."""
    random = torch.Generator().manual_seed(seed)
    return fields.random_velocity(1, spatial, amplitude=amplitude, smoothness=7, generator=random)[0]


# ----------------------------------------------------------------------------------------------- reading


def test_labels_are_indices_into_the_sorted_values_of_both(tmp_path):
    fixed = write(tmp_path / "f.nii", np.where(boxes() == 3, 300, boxes().astype(np.int16)), oblique())
    moving = write(tmp_path / "m.nii", boxes(shift=1, dtype=np.float32) * 100, oblique())
    pair = read_pair(fixed, moving)
    assert pair.values.tolist() == [0, 7, 300, 700]
    pairs = pair.pairs()
    assert np.array_equal(pair.values[pairs.moving[0].numpy()], nib.load(moving).get_fdata())
    assert (pairs.spatial, pairs.num_labels, pairs.names) == (SHAPE, 4, ("f.nii~m.nii",))
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
    axis = volume.index(1)
    assert vectors.shape == (*volume, 1, 2 if axis == 2 else 3) and voxels.shape == (*volume, 3)
    assert not voxels[..., axis].any() and (axis == 2 or not vectors[..., axis].any())
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
    """Change bytes at some offsets of a compressed file, as nibabel would not, and cut it off at ``end``."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    for offset, new in changes.items():
        content[offset : offset + len(new)] = new
    path.write_bytes(gzip.compress(content[:end]))


SHIFTED = STRAIGHT + 0.5 * (np.arange(16) == 3).reshape(4, 4)  # by half a voxel
VAST = {42: np.array([30_000] * 3, np.int16).tobytes(), 70: np.int16(64).tobytes()}  # 27 TB of float64
REFUSED = {
    "shape": ("has shape.*Add --resample", lambda path: write(path, boxes()[:-1])),
    "place": ("is not at the same position as .*Add --resample", lambda path: write(path, boxes(), SHIFTED)),
    "direction": ("is not at the same position as", lambda path: write(path, boxes(), np.diag([1.0, -1.0, 1.0, 1.0]))),
    "time": (
        "2 volumes. Save one of them as a file of its own",
        lambda path: write(path, np.stack([boxes(), boxes()], -1)),
    ),
    "no voxels": ("no voxels in it", lambda path: write(path, np.zeros((0,), np.uint8))),
    "a row": ("a row of voxels", lambda path: write(path, np.ones((5,), np.uint8))),
    "negative": ("holds negative labels: -7, -3", lambda path: write(path, -boxes(dtype=np.int16))),
    "no common label": ("no label in common: 3, 7 and 6, 14", lambda path: write(path, 2 * boxes())),
    "empty": ("is empty", lambda path: write(path, np.zeros(SHAPE, np.uint8))),
    "nan": ("NaN or infinite", lambda path: write(path, spoilt(np.nan))),
    "infinite": ("NaN or infinite", lambda path: write(path, spoilt(-np.inf))),
    "fraction": ("not whole numbers", lambda path: write(path, spoilt(0.5))),
    "intensities": ("intensity images", lambda path: write(path, np.arange(8640.0).reshape(SHAPE))),
    "flat affine": ("without an inverse", lambda path: change(path, {280: bytes(16)})),
    "truncated": ("truncated or damaged", lambda path: path.write_bytes(path.read_bytes()[:-60])),
    "few voxels": ("truncated", lambda path: change(path, {}, -99)),
    "vast": ("truncated.*of 216000000000352 bytes", lambda path: change(path, VAST)),
    "type": ("not a NIfTI", lambda path: change(path, {70: np.int16(999).tobytes()})),
    "text": ("not a NIfTI", lambda path: path.write_text("This is no image.\n" * 99)),
    "half a pair": ("not a NIfTI|truncated", lambda path: change(path, {344: b"ni1\0"}, 352)),  # voxels elsewhere
    "missing": ("does not exist", lambda path: path.unlink()),
    "folder": ("is not a file", lambda path: (path.unlink(), path.mkdir())),
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
    with pytest.raises(DataError, match="nothing to align"):
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
    (note,) = pair.merged_by(vessels)
    assert "merges the labels 3, 7." in note and not pair.merged_by(get_profile("quick", 2))


def test_labels_that_a_network_does_not_know_are_named_with_their_file(tmp_path):
    profile = replace(get_profile("quick", 3), num_labels=8)
    pair = pair_at(tmp_path)
    assert np.array_equal(pair.pairs(profile).moving[0], boxes(shift=2))
    other = read_pair(pair.paths[0], write(pair.paths[1], boxes() + 3 * (boxes() == 7).astype(np.uint8)))
    with pytest.raises(DataError, match="moving.nii.gz holds the label 10, but the network was trained on 0 to 7"):
        other.pairs(profile)


def test_volumes_are_not_for_a_network_of_slices(tmp_path):
    with pytest.raises(DataError, match="fixed.nii.gz has 3 axes, but the network was trained on images with 2"):
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


# ------------------------------------------------------------------------------------ headers, places, labels


def rotated(angles: tuple[float, ...], zooms: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles).as_matrix() * zooms
    affine[:3, 3] = origin
    return affine


@st.composite
def headers(draw: st.DrawFn, zooms: tuple[float, ...] = (0.8, 1.5, 2.2)) -> nib.Nifti1Header:
    """Headers whose qform and sform may differ, each with any code; some are left-handed or in other units."""
    header = nib.Nifti1Header()
    header.set_data_shape((12, 10, 8))
    header.set_zooms(zooms)
    header.set_xyzt_units(draw(st.sampled_from(["mm", "mm", "unknown", "micron"])))
    for set_form in (header.set_qform, header.set_sform):
        code = draw(st.sampled_from([0, 1, 2, 4]))
        turns, origin = (draw(st.tuples(*[st.floats(-bound, bound)] * 3)) for bound in (3, 30))
        sides = draw(st.sampled_from([(1, 1, 1), (-1, 1, 1), (-1, -1, 1)]))
        affine = rotated(turns, tuple(np.multiply(zooms, sides)), origin)
        set_form(affine, code)
    return header


def by_simpleitk(field: Path, fixed: Path, moving: Path, interpolator: int = sitk.sitkNearestNeighbor) -> np.ndarray:
    """Warp a moving image with a field in SimpleITK, as its users do."""
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    return sitk.GetArrayFromImage(sitk.Resample(sitk.ReadImage(str(moving)), sitk.ReadImage(str(fixed)), transform,
                                                interpolator)).T  # fmt: skip


def with_header(path: Path, values: np.ndarray, header: nib.Nifti1Header) -> Path:
    nib.save(nib.Nifti1Image(values, None, placed(header, values.shape, values.dtype)), path)
    return path


@settings(BOUNDED, max_examples=60)
@given(header=headers(), other=headers(), same=st.booleans(), seed=st.integers(0, 99))
def test_whatever_the_header_simpleitk_warps_as_warped_has_it(tmp_path, header, other, same, seed):
    shape = (12, 10, 8)
    fixed = with_header(tmp_path / "f.nii", boxes(shape), header)
    moving = with_header(tmp_path / "m.nii", boxes(shape, shift=1), header if same else other)
    try:
        pair = read_pair(fixed, moving, resample=True)
    except DataError as error:
        assert not same and "has no structure in the field of view" in str(error)
        return
    displacement = wavy(shape, seed=seed)
    write_field(tmp_path / "u.nii", pair, displacement)
    write_nifti(tmp_path / "w.nii", pair.warped_moving(displacement), pair.affine, header=header)
    for name in ("u.nii", "w.nii"):
        written = nib.load(tmp_path / name).header
        assert all(written[key] == header[key] for key in ("qform_code", "sform_code"))
        assert np.allclose(written["pixdim"][:4], header["pixdim"][:4])
    warped = np.asarray(nib.load(tmp_path / "w.nii").dataobj)
    assert (by_simpleitk(tmp_path / "u.nii", fixed, moving) == warped).mean() > 0.995  # halves may round either way
    assert warped.any() or not same


def test_the_form_that_was_taken_is_told(tmp_path):
    zooms, shape = (0.8, 1.5, 2.2), (12, 10, 8)
    q, s = rotated((0.3, 0.1, 0), zooms, (1, 2, 3)), rotated((0.1, 0.5, 0), zooms, (0, 0, 0))

    def note(qcode: int, scode: int, sform: np.ndarray = s) -> str | None:
        header = nib.Nifti1Header()
        header.set_data_shape(shape)
        header.set_zooms(zooms)
        header.set_qform(q, qcode)
        header.set_sform(sform, scode)
        return Grid(shape, header, header.get_best_affine()).note("f.nii")

    assert "f.nii: qform and sform differ; the field follows the qform, as SimpleITK reads it" in note(1, 4)
    assert "neither qform nor sform is set" in note(0, 0)
    assert note(1, 0) is None and note(0, 1) is None and note(1, 1) is None
    assert "axes are sheared" in note(0, 1, s + np.eye(4, k=1) * [0, 0.5, 0, 0])
    assert "sform and voxel sizes differ" in note(0, 1, s @ np.diag([2, 2, 2, 1]))


ANGLES = {"axial": (0, 0, 0), "turned": (0, 0, 0.4), "tilted": (0.6, 0.3, 0.4), "coronal": (np.pi / 2, 0, 0),
          "sagittal": (np.pi / 2, 0, np.pi / 2), "upside down": (-np.pi / 2, 0, 0)}  # fmt: skip


@pytest.mark.parametrize("stored", [(40, 36), (40, 36, 1)])
@pytest.mark.parametrize("plane", ANGLES)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
def test_simpleitk_warps_a_slice_by_its_field(tmp_path, stored, plane, exact):
    affine = rotated(ANGLES[plane], (2.0, 0.7, 1.0), (3, 4, 5))
    affine[np.abs(affine) < 1e-9] = 0 if exact else 1e-9
    fixed, moving = (write(tmp_path / f"{i}.nii", boxes((40, 36), shift=i).reshape(stored), affine) for i in (0, 2))
    pair, displacement = read_pair(fixed, moving), wavy((40, 36))
    write_field(tmp_path / "u.nii.gz", pair, displacement)
    field = sitk.ReadImage(str(tmp_path / "u.nii.gz"), sitk.sitkVectorFloat64)
    image = sitk.ReadImage(str(write(tmp_path / "image.nii", boxes((40, 36), shift=2)[..., None], affine)))[:, :, 0]
    if plane in ("tilted", "coronal", "sagittal", "upside down"):
        assert pair.grids[0].tilted and (not exact or plane == "tilted" or image.GetDirection() == (1, 0, 0, 1))
        image.SetDirection((1, 0, 0, 1))
    np.testing.assert_allclose(nib.load(tmp_path / "u.nii.gz").affine, affine, atol=1e-5)
    np.testing.assert_allclose(image.GetDirection(), field.GetDirection(), atol=1e-5)
    assert field.GetNumberOfComponentsPerPixel() == field.GetDimension() == 2
    transform = sitk.DisplacementFieldTransform(field)
    warped = sitk.GetArrayFromImage(sitk.Resample(image, transform, sitk.sitkNearestNeighbor)).T
    own = pair.warped_moving(displacement)
    assert own.shape == stored and (warped == own.reshape(40, 36)).mean() > 0.998
    assert (own.reshape(40, 36) != boxes((40, 36), shift=2)).mean() > 0.01


def turned(values: np.ndarray, affine: np.ndarray, ornt: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    image = nib.Nifti1Image(values, affine, dtype=values.dtype).as_reoriented(np.array(ornt))
    return np.asarray(image.dataobj), image.affine


@settings(BOUNDED, max_examples=40)
@given(
    order=st.permutations([0, 1, 2]),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
)
def test_axes_may_come_in_any_order_and_direction(tmp_path, order, flips, angles):
    affine = rotated(angles, (0.8, 1.5, 2.2), (5, -3, 8))
    fixed = write(tmp_path / "f.nii", boxes(), affine)
    plain = read_pair(fixed, write(tmp_path / "m.nii", boxes(shift=2), affine))
    values, other = turned(boxes(shift=2), affine, [[axis, flip] for axis, flip in zip(order, flips, strict=True)])
    pair = read_pair(fixed, write(tmp_path / "t.nii", values, other))
    assert torch.equal(pair.labels, plain.labels)
    displacement = wavy(SHAPE)
    assert np.array_equal(pair.warped_moving(displacement), plain.warped_moving(displacement))
    write_field(tmp_path / "u.nii", pair, displacement)
    warped = by_simpleitk(tmp_path / "u.nii", fixed, tmp_path / "t.nii")
    assert (warped == pair.warped_moving(displacement)).mean() > 0.999
    write_field(tmp_path / "v.nii", pair, displacement, inverse=True)
    np.testing.assert_allclose(*(nib.load(tmp_path / f"{name}.nii").dataobj for name in "uv"), atol=1e-4)
    assert any("reoriented" in note for note in pair.notes) == (order != [0, 1, 2] or -1 in flips)


@pytest.mark.parametrize("shapes", [((20, 24), (20, 24, 1)), ((20, 24, 1), (20, 24))])
def test_a_slice_is_a_slice_with_and_without_its_axis_of_one_voxel(tmp_path, shapes):
    paths = [write(tmp_path / f"{i}.nii", boxes((20, 24), shift=i).reshape(shape)) for i, shape in enumerate(shapes)]
    pair = read_pair(*paths)
    assert not pair.notes and np.array_equal(pair.labels[1], boxes((20, 24), shift=1) // 3)
    assert pair.warped_moving(torch.zeros(2, 20, 24)).shape == shapes[0]


def test_another_grid_is_resampled_as_simpleitk_does_it(tmp_path):
    fixed = write(tmp_path / "f.nii", boxes(), oblique())
    affine = rotated((0.4, -0.3, 0.9), (0.9, 1.3, 1.8), (10, -36, 9))
    moving = write(tmp_path / "m.nii", boxes((30, 28, 20), shift=3, dtype=np.int16), affine)
    with pytest.raises(DataError, match=r"m.nii has shape 30 x 28 x 20, but .*f.nii has 20 x 24 x 18. Add --resample"):
        read_pair(fixed, moving)
    pair = read_pair(fixed, moving, resample=True)
    assert "was resampled onto the grid" in pair.notes[0]
    read = [sitk.ReadImage(str(path)) for path in (moving, fixed)]
    resampled = sitk.GetArrayFromImage(sitk.Resample(*read, sitk.Transform(), sitk.sitkNearestNeighbor)).T
    assert (pair.values[pair.labels[1].numpy()] == resampled).mean() > 0.999 and resampled.any()
    displacement = wavy(SHAPE)
    write_field(tmp_path / "u.nii", pair, displacement)
    warped = by_simpleitk(tmp_path / "u.nii", fixed, moving)
    assert (warped == pair.warped_moving(displacement)).mean() > 0.999


@settings(BOUNDED, max_examples=30)
@given(
    shape=st.tuples(st.integers(10, 24), st.integers(10, 26), st.sampled_from([1, 12, 17, 18, 20])),
    other=st.tuples(st.integers(10, 24), st.integers(10, 26), st.sampled_from([1, 12, 17, 18, 20])),
    plain=st.booleans(),
)
def test_grids_of_one_affine_may_differ_in_size(tmp_path, shape, other, plain):
    """Grids may be cropped or longer at the far ends, or a slice and a volume; voxels outside are background."""
    whole = np.zeros((24, 26, 20), np.uint8)
    whole[2:7, 3:8, :6] = 3
    arrays = [whole[tuple(map(slice, each))] for each in (shape, other)]
    arrays = [array[..., 0] if plain and array.shape[2] == 1 else array for array in arrays]
    fixed, moving = (write(tmp_path / f"{i}.nii", array, STRAIGHT) for i, array in enumerate(arrays))
    pair = read_pair(fixed, moving, resample=True)
    common = tuple(slice(min(pair)) for pair in zip(shape, other, strict=True))
    expected = np.zeros(shape, np.uint8)
    expected[common] = whole[common]
    assert pair.warped_moving(torch.zeros(pair.labels.dim() - 1, *pair.labels.shape[1:])).shape == arrays[0].shape
    assert np.array_equal(pair.values[pair.labels[1].numpy()].reshape(shape), expected)


def test_beyond_the_edge_of_view_is_background_as_in_itk(tmp_path):
    values = np.full(SHAPE, 3, np.uint8)
    values[0] = 0
    fixed, moving = write(tmp_path / "f.nii", boxes(), oblique()), write(tmp_path / "m.nii", values, oblique())
    pair, displacement = read_pair(fixed, moving), torch.zeros(3, *SHAPE)
    displacement[0], displacement[2] = 7.0, -0.4  # seven planes leave the view; up to half a voxel does not
    write_field(tmp_path / "u.nii", pair, displacement)
    warped = pair.warped_moving(displacement)
    assert not warped[13:].any() and (warped[:13] == 3).all()
    assert np.array_equal(warped, by_simpleitk(tmp_path / "u.nii", fixed, moving))


def test_two_masks_need_not_have_the_same_value(tmp_path):
    fixed = write(tmp_path / "f.nii", (boxes() > 0).astype(np.uint8))
    plain = read_pair(fixed, write(tmp_path / "m.nii", (boxes(shift=2) > 0).astype(np.uint8)))
    pair = read_pair(fixed, write(tmp_path / "m.nii", 255 * (boxes(shift=2) > 0).astype(np.uint8)))
    assert torch.equal(pair.labels, plain.labels) and pair.values.tolist() == [0, 1]
    assert "(1)" in pair.notes[0] and "(255): non-zero is taken as 1" in pair.notes[0] and not plain.notes
    assert set(np.unique(pair.warped_moving(torch.zeros(3, *SHAPE)))) == {0, 255}


@settings(BOUNDED, max_examples=40)
@given(*[st.sets(st.integers(1, 300), min_size=1, max_size=12)] * 2)
def test_labels_of_one_side_are_named(tmp_path, one, other):
    random = np.random.default_rng(0)
    paths = []
    for name, labels in (("f", one), ("m", other)):
        values = random.permutation(np.resize(np.array([0, *labels], np.uint16), SHAPE))
        paths.append(write(tmp_path / f"{name}.nii", values))
    if not one & other and max(len(one), len(other)) > 1:
        with pytest.raises(DataError, match="no label in common"):
            read_pair(*paths)
        return
    pair = read_pair(*paths)
    for path, alone in zip(paths, (one - other, other - one), strict=True):
        said = [note for note in pair.notes if note.startswith(f"{path} alone holds the label")]
        assert len(said) == bool(alone and one & other)
        if said:
            assert all(f"{label}" in said[0] for label in sorted(alone)[:8])


def test_a_result_that_is_no_good_is_told(tmp_path):
    fixed = write(tmp_path / "f.nii", boxes())
    pair, still = read_pair(fixed, fixed), torch.zeros(3, *SHAPE)
    assert pair.judged(still) == (1.0, 1.0, [])
    before, after, (warning,) = pair.judged(still + 3)
    assert before == 1 and after < 0.6 and warning.startswith(f"Dice fell from 1.000 to {after:.3f}")
    assert "the warped image is empty" in pair.judged(still + 99)[2][0]
    apart = write(tmp_path / "m.nii", np.roll(boxes(), 9, 0))
    before, _, (warning,) = read_pair(fixed, apart).judged(still)
    assert before == 0 and "Dice started at 0" in warning


def test_dice_is_that_of_the_warped_file_and_its_own_labels(tmp_path):
    pair = pair_at(tmp_path)
    displacement = wavy(SHAPE, amplitude=3)
    warped, fixed = pair.warped_moving(displacement), boxes()
    scores = [2 * ((warped == k) & (fixed == k)).sum() / ((warped == k).sum() + (fixed == k).sum()) for k in (3, 7)]
    assert pair.judged(displacement)[1] == pytest.approx(np.mean(scores), abs=1e-6)


# ---------------------------------------------------------------------------------- formats and scale factors


def as_simpleitk(path: Path) -> Path:
    image = sitk.GetImageFromArray(boxes(dtype=np.int16).T)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ oblique()
    image.SetSpacing(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    image.SetDirection((affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    sitk.WriteImage(image, str(path))
    return path


def as_nibabel(kind: type) -> Callable[[Path], Path]:
    def save(path: Path) -> Path:
        image = kind(boxes(dtype=np.int16), oblique())
        if isinstance(image, nib.Nifti1Pair):
            image.set_qform(oblique(), 1)
        nib.save(image, path)
        return path

    return save


FORMATS = {
    **{f"x.{end}": as_simpleitk for end in ("nrrd", "nhdr", "mha", "mhd")},
    "x.mgz": as_nibabel(nib.MGHImage),
    "x.mgh": as_nibabel(nib.MGHImage),
    "x.nii": as_nibabel(nib.Nifti2Image),
    "x.nii.gz": as_nibabel(nib.Nifti2Image),
    "x.hdr": as_nibabel(nib.Nifti1Pair),
    "x.img": as_nibabel(nib.Nifti2Pair),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_the_same_image(tmp_path, name):
    path = FORMATS[name](tmp_path / name)
    fixed = write(tmp_path / "plain.nii.gz", boxes(dtype=np.int16), oblique())
    pair = read_pair(path, fixed)
    assert not pair.notes and torch.equal(pair.labels[0], pair.labels[1])
    np.testing.assert_allclose(pair.affine, oblique(), atol=1e-4)
    displacement = wavy(SHAPE)
    write_field(tmp_path / "u.nii.gz", pair, displacement)
    warped = by_simpleitk(tmp_path / "u.nii.gz", fixed, fixed)
    assert (warped == pair.warped_moving(displacement)).mean() > 0.999


def test_analyze_has_no_place(tmp_path):
    image = nib.AnalyzeImage(boxes(dtype=np.int16), None)
    image.header.set_zooms((0.8, 1.5, 2.2))
    nib.save(image, tmp_path / "x.img")
    pair = read_pair(tmp_path / "x.hdr", tmp_path / "x.img")
    assert pair.spacing == pytest.approx((0.8, 1.5, 2.2)) and torch.equal(*pair.labels)
    assert "neither qform nor sform is set" in pair.notes[0]
    write_field(tmp_path / "u.nii.gz", pair, wavy(SHAPE))
    warped = by_simpleitk(tmp_path / "u.nii.gz", tmp_path / "x.hdr", tmp_path / "x.hdr")
    assert (warped == pair.warped_moving(wavy(SHAPE))).mean() > 0.999


@pytest.mark.parametrize("name, said", [("x.npy", "no voxel size.*Nifti1Image"), ("x.png", "is not a NIfTI.*convert"),
                                        ("x.nrrd", "SimpleITK"), ("x.mgz", "not a NIfTI|truncated"),
                                        ("x.hdr", "is not an image of a .hdr and an .img")])  # fmt: skip
def test_what_is_of_no_known_format_is_told_how_to_convert(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"no image at all" * 99)
    with pytest.raises(DataError, match=said) as error:
        read_pair(tmp_path / name, tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.endswith(("nrrd", "mha", "mgz", "mgh", "nii.gz"))])
def test_truncated_files_of_other_formats_are_refused(tmp_path, name):
    path = FORMATS[name](tmp_path / name)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match="truncated|cannot be read"):
        read_pair(path, path)


@settings(BOUNDED, max_examples=60)
@given(
    labels=st.lists(st.integers(1, 60_000), min_size=1, max_size=5, unique=True),
    dtype=st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.int32]),
)
def test_labels_that_were_saved_as_floats_are_read_or_the_scale_factor_is_named(tmp_path, labels, dtype):
    values = np.random.default_rng(0).choice([0, *labels], SHAPE)
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    path = tmp_path / "scaled.nii"
    nib.save(nib.Nifti1Image(values.astype(float), STRAIGHT, header), path)
    step = nib.load(path).dataobj.slope
    try:
        found, _ = read_label_image(path)
    except DataError as error:
        assert f"scale factor {step:.6g}" in str(error) and step > 1
        return
    assert step > 1 or np.array_equal(found, values)


def test_the_scale_factor_of_spm(tmp_path):
    path = write(tmp_path / "spm.nii.gz", 255 * (boxes() > 0).astype(np.uint8))
    change(path, {112: np.float32(1 / 255).tobytes()})
    assert np.asarray(nib.load(path).dataobj).max() not in (1, 255)
    assert np.array_equal(read_label_image(path)[0], boxes() > 0)


def test_fractions_behind_a_scale_factor_stay_refused(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    nib.save(nib.Nifti1Image(boxes() / 2, STRAIGHT, header), tmp_path / "half.nii")
    with pytest.raises(DataError, match="such as 1.49607844: .*scale factor 0.0137"):
        read_label_image(tmp_path / "half.nii")
