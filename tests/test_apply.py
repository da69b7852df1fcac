"""``pairdiff apply``: other programs put the same field on the same voxels and points."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.blocks import Warp
from scipy.ndimage import map_coordinates
from test_cli import call, fails, works
from test_volume_files import BOUNDED, boxes, headers, oblique, rotated, wavy, with_header, write

from pairdiff_cli.field_files import read_field
from pairdiff_cli.volume_files import read_pair, write_field
from pairdiff_core.data import grid_affine
from pairdiff_core.errors import DataError

SHAPE = (20, 24, 18)
LPS = np.array([-1.0, -1.0, 1.0])


def intensities(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return wavy(shape, amplitude=100, seed=1)[0].numpy()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A fixed and a moving label image, a scan of the moving one, and the same field in both forms."""
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("fixed", "moving", "scan", "itk", "l2r")}
    write(paths["fixed"], boxes(), oblique())
    write(paths["moving"], boxes(shift=2), oblique())
    write(paths["scan"], intensities(), oblique())
    pair = read_pair(paths["fixed"], paths["moving"])
    for form in ("itk", "l2r"):
        write_field(paths[form], pair, wavy(SHAPE), form)
    return paths


def applied(field: Path, moving: Path, *options: object) -> np.ndarray:
    out = field.parent / "applied.nii.gz"
    works(call("apply", field, moving, "--out", out, "--overwrite", *options))
    return np.asarray(nib.load(out).dataobj)


def by_simpleitk(field: Path, moving: Path, onto: Path, interpolator: int) -> np.ndarray:
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    images = (sitk.ReadImage(str(path)) for path in (moving, onto))
    return sitk.GetArrayFromImage(sitk.Resample(*images, transform, interpolator)).T


# -------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("form", ["itk", "l2r"])
def test_simpleitk_nibabel_and_monai_give_the_same_voxels(files, form):
    labels, scan = applied(files[form], files["moving"]), applied(files[form], files["scan"])
    assert labels.dtype == np.uint8 and scan.dtype == np.float32
    for name, found, interpolator in (("moving", labels, "NearestNeighbor"), ("scan", scan, "Linear")):
        expected = by_simpleitk(files["itk"], files[name], files["fixed"], getattr(sitk, f"sitk{interpolator}"))
        assert np.isclose(found, expected, atol=0.05).mean() > 0.999  # halves and edges may be rounded either way

    voxels = nib.load(files["l2r"]).get_fdata(dtype=np.float32)
    places = np.indices(SHAPE) + np.moveaxis(voxels, -1, 0)
    inside = ((places >= 0) & (places <= np.reshape(SHAPE, (3, 1, 1, 1)) - 1)).all(0)
    moving, image = (nib.load(files[name]).get_fdata(dtype=np.float32) for name in ("moving", "scan"))
    assert (labels == map_coordinates(moving, places, order=0, mode="grid-constant")).mean() > 0.999
    np.testing.assert_allclose(scan[inside], map_coordinates(image, places, order=1)[inside], atol=0.05)

    u = torch.from_numpy(np.moveaxis(voxels, -1, 0).copy())[None]
    near, linear = (
        Warp(mode, "zeros")(torch.from_numpy(values)[None, None], u)[0, 0].numpy()
        for mode, values in (("nearest", moving), ("bilinear", image))
    )
    assert (labels == near).mean() > 0.999
    np.testing.assert_allclose(scan[inside], linear[inside], atol=0.05)
    assert (labels != boxes(shift=2)).mean() > 0.01 and inside.mean() > 0.7


def test_apply_gives_what_register_writes_as_warped(files, tmp_path):
    field, warped = tmp_path / "u.nii.gz", tmp_path / "w.nii.gz"
    works(call("register", files["fixed"], files["moving"], "--out", field, "--warped", warped, "--steps", 3))
    result = works(call("apply", field, files["moving"], "--out", tmp_path / "a.nii.gz"))
    assert result.stdout == f"{tmp_path / 'a.nii.gz'}: 20 x 24 x 18 voxels, nearest\n" and not result.stderr
    assert (tmp_path / "a.nii.gz").read_bytes() == warped.read_bytes()


@pytest.mark.parametrize("dtype, interpolation, kept", [
    (np.uint8, None, np.uint8), (np.int32, "nearest", np.int32), (np.int16, "linear", np.float32),
    (np.float64, None, np.float64), (np.float32, "nearest", np.float32)])  # fmt: skip
def test_the_interpolation_follows_the_type(files, dtype, interpolation, kept):
    path = write(files["scan"].parent / "x.nii.gz", (100 * intensities()).astype(dtype), oblique())
    found = applied(files["itk"], path, *(["--interpolation", interpolation] if interpolation else []))
    nearest = (interpolation or ("nearest" if np.dtype(dtype).kind == "u" else "linear")) == "nearest"
    assert found.dtype == kept
    assert set(np.unique(found)) <= {0, *np.unique(np.asarray(nib.load(path).dataobj))} or not nearest


def test_another_grid_gets_the_field_as_in_simpleitk(files, tmp_path):
    other = write(
        tmp_path / "o.nii.gz", np.zeros((25, 30, 14), np.uint8), rotated((0.3, -0.5, 0.9), (1, 1.3, 2), (10, -38, 9))
    )
    for name, kind in (("moving", sitk.sitkNearestNeighbor), ("scan", sitk.sitkLinear)):
        found = applied(files["itk"], files[name], "--onto", other)
        expected = by_simpleitk(files["itk"], files[name], other, kind)
        assert found.shape == (25, 30, 14) and np.isclose(found, expected, atol=0.1).mean() > 0.998 and expected.any()
        np.testing.assert_allclose(nib.load(tmp_path / "applied.nii.gz").affine, nib.load(other).affine, atol=1e-5)


@settings(BOUNDED, max_examples=40)
@given(header=headers(), other=headers(), onto=headers(), seed=st.integers(0, 99))
def test_whatever_the_headers_simpleitk_applies_it_as_apply_does(tmp_path, header, other, onto, seed):
    shape = (12, 10, 8)
    fixed = with_header(tmp_path / "f.nii", boxes(shape), header)
    pair = read_pair(fixed, fixed)
    write_field(tmp_path / "u.nii", pair, wavy(shape, seed=seed))
    moving = with_header(tmp_path / "m.nii", boxes(shape, shift=1), other)
    target = with_header(tmp_path / "o.nii", boxes(shape), onto)
    expected = by_simpleitk(tmp_path / "u.nii", moving, target, sitk.sitkNearestNeighbor)
    assert (applied(tmp_path / "u.nii", moving, "--onto", target) == expected).mean() > 0.995


def test_voxels_of_another_order_of_axes(files, tmp_path):
    turned = nib.load(files["moving"]).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(turned, tmp_path / "t.nii.gz")
    for form in ("itk", "l2r"):
        assert np.array_equal(applied(files[form], tmp_path / "t.nii.gz"), applied(files[form], files["moving"]))


@pytest.mark.parametrize("stored", [(40, 36), (40, 36, 1), (40, 1, 36)])
@pytest.mark.parametrize("form", ["itk", "l2r"])
def test_slices(tmp_path, stored, form):
    values = [boxes((40, 36), shift=shift).reshape(stored) for shift in (0, 2)]
    paths = [
        write(tmp_path / f"{i}.nii", each, rotated((0, 0, 0.4), (2, 0.7, 1), (3, 4, 5)))
        for i, each in enumerate(values)
    ]
    pair, displacement = read_pair(*paths), wavy((40, 36))
    write_field(tmp_path / "u.nii.gz", pair, displacement, form)
    found = applied(tmp_path / "u.nii.gz", paths[1])
    assert found.shape == stored and (found == pair.warped_moving(displacement)).mean() > 0.998


def test_synthetic_slices_which_are_coronal(tmp_path):
    affine = grid_affine("phantom2d", (40, 36))
    fixed, moving = (
        write(tmp_path / f"{i}.nii.gz", boxes((40, 36), shift=i).reshape(40, 36, 1), affine) for i in (0, 2)
    )
    field, warped, back = (tmp_path / f"{name}.nii.gz" for name in ("u", "w", "i"))
    result = works(call("register", fixed, moving, "--out", field, "--warped", warped, "--inverse", back))
    assert "not an axial slice" in result.stderr
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    image = sitk.ReadImage(str(moving))[:, :, 0]
    expected = nib.load(warped).get_fdata()
    assert np.array_equal(
        sitk.GetArrayFromImage(sitk.Resample(image, transform, sitk.sitkNearestNeighbor)).T, expected[..., 0]
    )
    for options in ([], ["--onto", fixed]):
        assert np.array_equal(applied(field, moving, *options), expected) and expected.any()
        for image in (sitk.ReadImage(str(path)) for path in (tmp_path / "applied.nii.gz", warped)):
            assert image.GetDirection() == sitk.ReadImage(str(fixed)).GetDirection()
        assert np.array_equal(nib.load(tmp_path / "applied.nii.gz").affine, nib.load(fixed).affine)
    voxels = np.array([[12, 11, 0], [20.5, 18, 0]])
    millimetres = nib.affines.apply_affine(affine, voxels)
    found = np.array(moved(field, csv_file(tmp_path / "mm.csv", millimetres.tolist())), float)
    by_voxels = np.array(moved(field, csv_file(tmp_path / "v.csv", voxels.tolist()), "--voxels"), float)
    np.testing.assert_allclose(found, nib.affines.apply_affine(affine, by_voxels), atol=1e-3)
    assert np.linalg.norm(found - millimetres, axis=1).max() > 0.3 and np.allclose(found[:, 1], millimetres[:, 1])
    dice = [
        line.split()[1]
        for line in works(call("evaluate", "--pair", fixed, moving, "--field", field)).stdout.splitlines()
        if line.startswith("dice ")
    ]
    assert f"-> {dice[0][:5]}" in result.stdout


def test_a_field_that_simpleitk_wrote(files, tmp_path):
    field = sitk.ReadImage(str(files["itk"]))
    for name in ("s.nii.gz", "s.mha", "s.nrrd"):
        sitk.WriteImage(field, str(tmp_path / name))
        same = read_field(tmp_path / name).displacement
        np.testing.assert_allclose(same, wavy(SHAPE).numpy(), atol=1e-4)


def test_an_empty_result_is_told(files, tmp_path):
    far = write(tmp_path / "far.nii.gz", boxes(), oblique() + 900 * np.eye(4, k=3))
    result = works(call("apply", files["itk"], far, "--out", tmp_path / "e.nii.gz"))
    assert "the result is empty" in result.stderr


# ----------------------------------------------------------------------------------------------- landmarks


def csv_file(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def points_in(folder: Path, affine: np.ndarray) -> np.ndarray:
    """(K, 3) in mm, RAS, within the field."""
    voxels = np.random.default_rng(0).uniform(2, np.array(SHAPE) - 3, (9, 3))
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def moved(field: Path, points: Path, *options: object) -> list[list[str]]:
    out = points.parent / "moved.csv"
    works(call("apply", field, points, "--out", out, "--overwrite", *options))
    return list(csv.reader(out.read_text().splitlines()))


@pytest.mark.parametrize("form", ["itk", "l2r"])
def test_landmarks_go_from_fixed_to_moving_as_simpleitk_moves_them(files, tmp_path, form):
    points = points_in(tmp_path, oblique())
    rows = [["name", "z", "x", "y"], *([f"p{i}", z, x, y] for i, (x, y, z) in enumerate(points))]
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(files["itk"]), sitk.sitkVectorFloat64))
    expected = np.array([transform.TransformPoint(list(point * LPS)) for point in points]) * LPS
    names, *found = moved(files[form], csv_file(tmp_path / "p.csv", rows))
    assert names == rows[0] and [row[0] for row in found] == [row[0] for row in rows[1:]]
    np.testing.assert_allclose(np.array([row[1:] for row in found], float)[:, [1, 2, 0]], expected, atol=2e-3)
    assert np.abs(expected - points).max() > 1


def test_landmarks_in_voxels_without_names(files, tmp_path):
    voxels = [[3, 4, 5], [10, 11, 12]]
    found = np.array(moved(files["itk"], csv_file(tmp_path / "v.csv", voxels), "--voxels"), float)
    expected = [np.array(point) + wavy(SHAPE)[(slice(None), *point)].numpy() for point in voxels]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_what_a_landmark_marks_stays_marked(tmp_path):
    """A bright voxel of the moving image is warped to the landmark of the fixed image."""
    fixed = write(tmp_path / "f.nii", boxes(), oblique())
    displacement = torch.zeros(3, *SHAPE)
    displacement[0], displacement[1] = 3.0, -2.0
    write_field(tmp_path / "u.nii", read_pair(fixed, fixed), displacement)
    (place,) = np.array(moved(tmp_path / "u.nii", csv_file(tmp_path / "p.csv", [[6, 9, 7]]), "--voxels"), float)
    spot = np.zeros(SHAPE, np.uint8)
    spot[tuple(place.round().astype(int))] = 1
    warped = applied(tmp_path / "u.nii", write(tmp_path / "spot.nii", spot, oblique()))
    assert np.argwhere(warped).tolist() == [[6, 9, 7]]


def test_landmarks_outside_the_field_are_told(files, tmp_path):
    result = works(
        call("apply", files["itk"], csv_file(tmp_path / "p.csv", [[900, 900, 900]]), "--out", tmp_path / "q.csv")
    )
    assert "1 of 1 landmarks lie outside the field" in result.stderr and "1 landmark, mm" in result.stdout
    assert (tmp_path / "q.csv").read_text() == "900.0000,900.0000,900.0000\n"


def test_landmarks_on_a_slice_need_no_z(tmp_path):
    affine = np.diag([2.0, 3, 1, 1]) + 5 * np.eye(4, k=3) + [[0], [0], [7], [0]] * np.eye(4)[3]
    path = write(tmp_path / "f.nii", boxes((40, 36)), affine)
    write_field(tmp_path / "u.nii", read_pair(path, path), torch.ones(2, 40, 36))
    plain = moved(tmp_path / "u.nii", csv_file(tmp_path / "p.csv", [["x", "y"], [20, 30]]))
    assert plain == [["x", "y"], ["22.0000", "33.0000"]]
    assert moved(tmp_path / "u.nii", csv_file(tmp_path / "p.csv", [[20, 30, 7]])) == [["22.0000", "33.0000", "7.0000"]]


BAD_POINTS = {"empty": "", "names only": "x,y,z\n", "no x": "a,b,c\n1,2,3\n", "text": "1,2,3\n1,b,3\n",
              "short": "1,2,3\n4,5\n", "no z": "x,y\n1,2\n", "nan": "x,y,z\n1,2,nan\n", "bytes": "\udcff"}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_POINTS)
def test_what_are_no_landmarks_is_one_line(files, tmp_path, kind):
    path = tmp_path / "p.csv"
    path.write_bytes(BAD_POINTS[kind].encode("utf-8", "surrogateescape"))
    fails(call("apply", files["itk"], path, "--out", tmp_path / "q.csv"), str(path))
    assert not (tmp_path / "q.csv").exists()


# ------------------------------------------------------------------------------------------------- refused


def test_what_is_no_field_is_one_line(files, tmp_path):
    out = tmp_path / "x.nii"
    fails(call("apply", files["scan"], files["moving"], "--out", out), str(files["scan"]), "not a displacement field")
    broken = nib.load(files["l2r"]).get_fdata()
    broken[3, 3, 3] = np.nan
    fails(call("apply", write(tmp_path / "n.nii", broken), files["moving"], "--out", out), "n.nii holds NaN")
    fails(call("apply", tmp_path / "none.nii", files["moving"], "--out", out), "none.nii is missing")
    fails(call("apply", files["itk"], tmp_path / "none.nii", "--out", out), "none.nii is missing")
    many = write(tmp_path / "t.nii", np.stack([boxes(), boxes()], -1), oblique())
    fails(call("apply", files["itk"], many, "--out", out), "t.nii has shape", "2 volumes")
    assert not out.exists()


def test_a_flat_field_is_not_for_volumes(files, tmp_path):
    path = write(tmp_path / "f.nii", boxes((40, 36)))
    write_field(tmp_path / "u.nii", read_pair(path, path), torch.zeros(2, 40, 36))
    with pytest.raises(DataError, match="two-dimensional field, but .*moving.nii.gz is a volume"):
        read_field(tmp_path / "u.nii").onto(read_pair(files["moving"], files["moving"]).grids[0], files["moving"])


@pytest.mark.parametrize(
    "options",
    ["", "--out x.png", "--out x.csv", "--out x.nii --voxels", "--out x.nii --format ants", "--out scan.nii.gz",
     "--out itk.nii.gz", "--out x.nii --interpolation cubic"],
)  # fmt: skip
def test_wrong_use(files, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in files.values()}
    fails(call("apply", "itk.nii.gz", "scan.nii.gz", *options.split()), code=2)
    assert all(path.read_bytes() == content for path, content in before.items()) and len(list(tmp_path.iterdir())) == 5


def test_images_and_landmarks_have_options_of_their_own(files, tmp_path):
    path = csv_file(tmp_path / "p.csv", [[1, 2, 3]])
    for options in (["--interpolation", "linear"], ["--onto", files["fixed"]]):
        fails(call("apply", files["itk"], path, "--out", tmp_path / "q.csv", *options), "not for landmarks", code=2)
