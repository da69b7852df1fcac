"""Labels keep their values, whatever their type, size and scale factor; otherwise the file is refused."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import call, fails, json_of, works
from test_volume_files import BOUNDED, SHAPE, STRAIGHT, boxes, change, write

from pairdiff_cli.volume_files import read_pair
from pairdiff_core.data.image_files import read_label_image
from pairdiff_core.errors import DataError


def held(path):
    return np.asanyarray(nib.load(path).dataobj)


@settings(BOUNDED, max_examples=40)
@given(first=st.integers(1, 2**64 - 2), dtypes=st.tuples(*[st.sampled_from([np.uint64, np.int64, np.float64])] * 2))
def test_two_labels_in_a_row_stay_two_however_large(tmp_path, first, dtypes):
    """A type that cannot hold the labels is not used to write them."""
    labels = np.array([0, first, first + 1], np.uint64)
    dtypes = [dtype if first < {np.int64: 2**63 - 1, np.float64: 2**53}.get(dtype, 2**64) else np.uint64
              for dtype in dtypes]  # fmt: skip
    index = [np.searchsorted([0, 3, 7], boxes(shift=shift)) for shift in (0, 1)]
    paths = [
        write(tmp_path / f"{each}.nii", labels[index[each]].astype(dtype), STRAIGHT)
        for each, dtype in enumerate(dtypes)
    ]
    pair = read_pair(*paths)
    assert pair.values.tolist() == labels.tolist()
    assert np.array_equal(pair.labels.numpy(), np.stack(index))
    still = np.zeros((3, *SHAPE), np.float32)
    warped = pair.warped_moving(torch.from_numpy(still))
    assert warped.dtype == dtypes[1] and np.array_equal(warped, labels[index[1]].astype(dtypes[1]))


@pytest.mark.parametrize("dtype", [np.uint64, np.int64])
def test_large_labels_through_the_commands(tmp_path, dtype):
    labels = np.array([0, 720575940621039145, 720575940621039146], dtype)
    paths = [
        write(tmp_path / f"{shift}.nii.gz", labels[np.searchsorted([0, 3, 7], boxes(shift=shift))], STRAIGHT)
        for shift in (0, 1)
    ]
    field, warped, applied = (tmp_path / f"{name}.nii.gz" for name in "uwa")
    works(call("register", *paths, "--out", field, "--warped", warped, "--steps", 2))
    assert "nearest" in works(call("apply", field, paths[1], "--out", applied)).stdout
    for path in (warped, applied):
        assert held(path).dtype == dtype and np.array_equal(np.unique(held(path)), labels)
    assert np.array_equal(held(warped), held(applied))
    names = json_of("evaluate", "--pair", *paths, json_file=tmp_path / "e.json")["summary"]["dice_per_structure"]
    assert list(names) == [str(label) for label in labels[1:]]


def test_labels_that_no_type_holds_are_refused(tmp_path):
    good = write(tmp_path / "g.nii", boxes(), STRAIGHT)
    huge = write(tmp_path / "h.nii", boxes() * 1e30, STRAIGHT)
    fails(call("register", good, huge, "--out", tmp_path / "u.nii"), f"{huge} holds the label 7e+30, too large for 64")
    scaled = write(tmp_path / "s.nii.gz", (boxes() > 0).astype(np.int64) * (2**60 + 1), STRAIGHT)
    change(scaled, {116: np.float32(1).tobytes(), 112: np.float32(1).tobytes()})  # plus 1
    with pytest.raises(DataError, match="s.nii.gz holds labels up to .* with the scale factor 1,"):
        read_label_image(scaled)


@settings(BOUNDED, max_examples=40)
@given(
    labels=st.lists(st.integers(1, 60_000), min_size=1, max_size=5, unique=True),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int16, np.int32]),
    floats=st.booleans(),
)
def test_apply_takes_for_labels_what_register_takes(tmp_path, labels, dtype, floats):
    """With a scale factor, or as floats; the result is the same as with ``--warped``."""
    values = np.array([0, *labels])[np.minimum(boxes(), len(labels))]
    header, path = nib.Nifti1Header(), tmp_path / "m.nii"
    header.set_data_dtype(np.float32 if floats else dtype)
    nib.save(nib.Nifti1Image(values.astype(float), STRAIGHT, header), path)
    try:
        read_label_image(path)
    except DataError:  # the scale is too coarse
        return
    field, warped, applied = (tmp_path / f"{name}.nii" for name in "uwa")
    works(call("register", path, path, "--out", field, "--warped", warped, "--steps", 0, "--overwrite"))
    result = works(call("apply", field, path, "--out", applied, "--overwrite"))
    assert result.stdout.endswith("voxels, nearest\n")
    assert applied.read_bytes() == warped.read_bytes() and np.array_equal(held(applied), values)


def test_scans_are_interpolated_behind_a_scale_factor_too(tmp_path):
    fixed, scan = write(tmp_path / "f.nii", boxes(), STRAIGHT), np.random.default_rng(0).uniform(0, 9, SHAPE)
    many, header = np.arange(np.prod(SHAPE), dtype=float).reshape(SHAPE), nib.Nifti1Header()  # whole, but no labels
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(scan, STRAIGHT, header), tmp_path / "s.nii")
    works(call("register", fixed, fixed, "--out", tmp_path / "u.nii", "--steps", 0))
    for path in (tmp_path / "s.nii", write(tmp_path / "m.nii", many, STRAIGHT)):
        result = works(call("apply", tmp_path / "u.nii", path, "--out", tmp_path / "a.nii", "--overwrite"))
        assert result.stdout.endswith("voxels, linear\n")
