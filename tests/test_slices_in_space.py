"""Slices of any plane keep their place, the edge of the view is ITK's, and affines without an inverse are refused."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_apply import csv_file, moved
from test_cli import call, fails, works
from test_volume_files import BOUNDED, boxes, rotated, turned, wavy, write

from pairdiff_cli.field_files import move_landmarks, read_field, warp_image
from pairdiff_cli.grids import sample
from pairdiff_cli.one_case import displacement_on
from pairdiff_cli.volume_files import read_pair, write_field
from pairdiff_core.errors import DataError

CORONAL = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
SINGULAR = np.diag([1.0, 1, 0, 1])


def disc(x: int, y: int) -> np.ndarray:
    rows, columns = np.indices((32, 28))
    return ((rows - x) ** 2 + (columns - y) ** 2 < 64).astype(np.uint8)[..., None]


def image(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture
def coronal(tmp_path: Path) -> dict[str, Path]:
    """A fixed and a moving slice, the moving one with three rows less and turned, and the field of the two."""
    cropped, turned = CORONAL.copy(), CORONAL @ np.diag([-1.0, 1, 1, 1])
    cropped[2, 3], turned[0, 3] = 3, 31
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("fixed", "moving", "cropped", "turned", "field")}
    write(paths["fixed"], disc(15, 14), CORONAL)
    write(paths["moving"], disc(17, 13), CORONAL)
    write(paths["cropped"], disc(17, 13)[:, 3:], cropped)
    write(paths["turned"], disc(17, 13)[::-1], turned)
    works(call("register", paths["fixed"], paths["moving"], "--out", paths["field"]))
    return paths


@pytest.mark.parametrize("name", ["moving", "cropped", "turned"])
def test_a_coronal_slice_stays_where_it_is(coronal, tmp_path, name):
    works(call("apply", coronal["field"], coronal[name], "--out", tmp_path / "a.nii.gz"))
    assert np.array_equal(image(tmp_path / "a.nii.gz"), image(coronal["fixed"]))
    works(call("apply", coronal["field"], coronal["moving"], "--onto", coronal[name], "--out", tmp_path / "o.nii.gz"))
    expected = {"moving": disc(15, 14), "cropped": disc(15, 14)[:, 3:], "turned": disc(15, 14)[::-1]}[name]
    assert np.array_equal(image(tmp_path / "o.nii.gz"), expected)
    result = works(
        call("evaluate", "--pair", coronal["fixed"], coronal[name], "--field", coronal["field"], "--resample")
    )
    assert "Dice 1.000  folding 0.000 %" in result.stdout


def test_landmarks_of_a_coronal_slice_on_another_grid(coronal, tmp_path):
    field, back = tmp_path / "u.nii.gz", tmp_path / "v.nii.gz"
    result = works(
        call("register", coronal["fixed"], coronal["cropped"], "--resample", "--out", field, "--inverse", back)
    )
    assert f"(1, 0, 0, 1) and resample it to the grid of {coronal['fixed']}." in result.stderr
    for path, start, end in ((field, (15, 0, 14), (17, 0, 13)), (back, (17, 0, 13), (15, 0, 14))):
        found = np.array(moved(path, csv_file(tmp_path / "p.csv", [start])), float)
        np.testing.assert_allclose(found[0], end, atol=0.05)
    flat = tmp_path / "flat.csv"
    flat.write_text("x,y\n15,14\n")
    fails(call("apply", field, flat, "--out", tmp_path / "q.csv"), "has no z, but")
    fails(call("evaluate", "--pair", coronal["fixed"], coronal["moving"], "--landmarks", flat, flat), "has no z, but")


def test_slices_of_another_plane_are_refused(coronal, tmp_path):
    axial = write(tmp_path / "axial.nii.gz", disc(15, 14), np.diag([2.0, 2, 2, 1]))
    for options in (["--onto", axial], []):
        moving = coronal["moving"] if options else axial
        result = call("apply", coronal["field"], moving, *options, "--out", tmp_path / "o.nii.gz")
        fails(result, f"{axial} lies in a different plane from the field")
    with pytest.raises(DataError, match="is a slice in a different plane from"):
        read_pair(coronal["fixed"], axial, resample=True)


def test_a_field_that_itk_made_of_a_coronal_slice(coronal, tmp_path):
    """It has no place other than the one in its ITK header."""
    field = sitk.ReadImage(str(coronal["field"]))
    sitk.WriteImage(field, str(tmp_path / "itk.nii.gz"))
    works(call("apply", tmp_path / "itk.nii.gz", coronal["moving"], "--out", tmp_path / "a.nii.gz"))
    assert np.array_equal(image(tmp_path / "a.nii.gz"), image(coronal["fixed"]))
    for name in ("cropped", "turned"):
        result = call("apply", tmp_path / "itk.nii.gz", coronal[name], "--out", tmp_path / "b.nii.gz")
        fails(result, "lies in a different plane from the field")


def test_two_forms_of_the_image_do_not_make_the_field_one_of_its_sform(tmp_path):
    paths = []
    for name, shift in (("f", 0), ("m", 2)):
        new = nib.Nifti1Image(boxes((40, 36), shift=shift)[..., None], None)
        new.set_qform(np.diag([-1.0, -1, 1, 1]), 1)
        new.set_sform(rotated((0.3, 0.2, 0), (1, 1, 1), (5, 6, 7)), 2)
        paths.append(tmp_path / f"{name}.nii.gz")
        nib.save(new, paths[-1])
    pair, displacement = read_pair(*paths), wavy((40, 36))
    write_field(tmp_path / "u.nii.gz", pair, displacement)
    field = read_field(tmp_path / "u.nii.gz")
    assert not field.laid_flat and field.note
    np.testing.assert_allclose(displacement_on(pair, field), displacement, atol=1e-4)


@settings(BOUNDED, max_examples=40)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    order=st.permutations([0, 1]),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 2),
    pad=st.tuples(*[st.integers(0, 4)] * 4),
    seed=st.integers(0, 99),
)
def test_a_slice_of_any_plane_may_be_stored_on_another_grid(tmp_path, angles, order, flips, pad, seed):
    affine, shape = rotated(angles, (0.8, 1.5, 2.2), (5, -3, 8)), (20, 24, 1)
    values = boxes(shape[:2], shift=2)[..., None]
    fixed, moving = write(tmp_path / "f.nii", boxes(shape[:2])[..., None], affine), tmp_path / "m.nii"
    write(moving, values, affine)
    pair, displacement = read_pair(fixed, moving), wavy(shape[:2], seed=seed)
    assume(pair.grids[0].tilted)
    write_field(tmp_path / "u.nii", pair, displacement)

    place = affine.copy()
    place[:3, 3] -= affine[:3, :2] @ [pad[0], pad[2]]
    padded = np.pad(values, [pad[:2], pad[2:], (0, 0)])
    ornt = [[axis, flip] for axis, flip in zip(order, flips, strict=True)]
    other = write(tmp_path / "o.nii", *turned(padded, place, [*ornt, [2, 1]]))
    field = read_field(tmp_path / "u.nii")
    warp_image(field, other, tmp_path / "w.nii")
    expected = pair.warped_moving(displacement)
    assert (image(tmp_path / "w.nii") == expected).mean() > 0.995 and expected.any()
    np.testing.assert_allclose(nib.load(tmp_path / "w.nii").affine, affine, atol=1e-4)
    found = displacement_on(read_pair(fixed, other, resample=True), field)
    np.testing.assert_allclose(found, displacement, atol=1e-3)

    x, y = 9, 13
    points = csv_file(tmp_path / "p.csv", [(affine @ [x, y, 0, 1])[:3].tolist()])
    move_landmarks(field, points, tmp_path / "q.csv")
    there = np.loadtxt(tmp_path / "q.csv", delimiter=",")
    u = displacement[:, x, y].double().numpy()
    np.testing.assert_allclose(there, (affine @ [x + u[0], y + u[1], 0, 1])[:3], atol=1e-2)


# -------------------------------------------------------------------------------------------------- edges


def resampled(field: sitk.Image, moving: sitk.Image) -> np.ndarray:
    transform = sitk.DisplacementFieldTransform(sitk.Image(field))
    return sitk.GetArrayFromImage(
        sitk.Resample(moving, field, transform, sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    ).T


def test_the_view_ends_where_that_of_itk_does(tmp_path):
    values = np.arange(1, 6 * 5 * 4 + 1, dtype=np.uint8).reshape(6, 5, 4)
    moving = sitk.GetImageFromArray(values.T)
    for u in ((0.5, -0.5, 0.5), (-0.5, 0.5, -0.5), (0.5, 0.5, 0.5), (-0.5, -0.5, -0.5)):
        field = sitk.GetImageFromArray(np.broadcast_to(u, (4, 5, 6, 3)).copy(), isVector=True)
        found = sample(values, np.broadcast_to(np.reshape(u, (3, 1, 1, 1)), (3, 6, 5, 4)))
        assert np.array_equal(found, resampled(field, moving)) and (found == 0).any() == (max(u) > 0)


def test_another_grid_ends_where_that_of_itk_does(tmp_path):
    fixed = write(tmp_path / "f.nii", np.pad(np.ones((31, 27, 23), np.uint8), [(1, 0)] * 3), np.eye(4))
    moving = write(tmp_path / "m.nii", np.ones((16, 14, 12), np.uint8), np.diag([2.0, 2, 2, 1]))
    pair = read_pair(fixed, moving, resample=True)
    still = torch.zeros(3, 32, 28, 24)
    write_field(tmp_path / "u.nii", pair, still)
    field = sitk.ReadImage(str(tmp_path / "u.nii"), sitk.sitkVectorFloat64)
    expected = resampled(field, sitk.ReadImage(str(moving)))
    assert np.array_equal(pair.warped_moving(still), expected) and not expected[-1].any() and expected[:-1, 0, 0].all()


# -------------------------------------------------------------------------------------------------- affines


def singular(path: Path, values: np.ndarray) -> Path:
    new = nib.Nifti1Image(values, None)
    new.set_sform(SINGULAR, 1)
    nib.save(new, path)
    return path


@pytest.mark.parametrize("which", ["moving", "onto", "field", "field of landmarks", "evaluated field"])
def test_an_affine_without_an_inverse_is_refused(tmp_path, which):
    shape = (12, 10, 8)
    fixed, moving = (write(tmp_path / f"{shift}.nii", boxes(shape, shift=shift)) for shift in (0, 1))
    field, bad = tmp_path / "u.nii", singular(tmp_path / "bad.nii", boxes(shape))
    write_field(field, read_pair(fixed, moving), wavy(shape))
    bad_field = singular(tmp_path / "bad_field.nii", image(field))
    points = csv_file(tmp_path / "p.csv", [(1, 2, 3)])
    arguments = {
        "moving": ("apply", field, bad, "--out", tmp_path / "o.nii"),
        "onto": ("apply", field, moving, "--onto", bad, "--out", tmp_path / "o.nii"),
        "field": ("apply", bad_field, moving, "--out", tmp_path / "o.nii"),
        "field of landmarks": ("apply", bad_field, points, "--out", tmp_path / "o.csv"),
        "evaluated field": ("evaluate", "--pair", fixed, moving, "--field", bad_field),
    }[which]
    culprit = bad_field if "field" in which else bad
    fails(call(*arguments), f"{culprit} has an affine without an inverse")
