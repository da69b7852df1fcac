"""Slices in the neurite-oasis layout: reading, splitting by subject, pairing, and each kind of bad input."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_oasis_folder, write_slice

from pairdiff_core.data import oasis
from pairdiff_core.data.oasis import load_oasis_pairs, load_subjects
from pairdiff_core.errors import DataError

SEGMENTATION = Path("BRAIN_02_S00") / "slice_seg4.nii.gz"  # the file that tests damage


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuses(folder: Path, *parts: str) -> None:
    """Loading fails with one DataError that names all ``parts``, and leaves the folder as it was."""
    before = contents(folder)
    with pytest.raises(DataError) as error:
        load_subjects(folder, 5)
    for part in parts:
        assert part in str(error.value)
    assert contents(folder) == before


# ----------------------------------------------------------------------------------------- good input


@pytest.mark.parametrize("num_labels", [5, 25])
def test_load_subjects(best_oasis_folder: Path, num_labels: int) -> None:
    names = oasis.read_subjects(best_oasis_folder)[:6]
    slices = load_subjects(best_oasis_folder, num_labels, names=names)
    assert slices.labels.dtype == torch.uint8
    assert slices.labels.shape[0] == 6 and slices.names == names
    assert len(slices.label_names) == len(slices.label_colours) == num_labels
    assert 0 < slices.labels.max() < num_labels
    assert all((labels > 0).float().mean() > 0.1 for labels in slices.labels)


def test_left_comes_out_at_low_indices(best_oasis_folder: Path) -> None:
    names = oasis.read_subjects(best_oasis_folder)[:4]
    slices = load_subjects(best_oasis_folder, 25, names=names)
    tissues = load_subjects(best_oasis_folder, 5, names=names)
    left_cortex, right_cortex = slices.label_names.index("Left-Cerebral-Cortex"), 15
    for labels, tissue in zip(slices.labels, tissues.labels, strict=True):
        place = [(labels == label).nonzero()[:, 0].float().mean() for label in (left_cortex, right_cortex)]
        assert place[0] < labels.shape[0] / 2 < place[1]
        assert (tissue[labels == left_cortex] == 1).float().mean() > 0.9  # both label maps are rotated in the same way


def test_data_that_already_has_left_first_is_not_flipped(oasis_folder: Path) -> None:
    before = load_subjects(oasis_folder, 5)
    for path in oasis_folder.rglob("slice_seg*.nii.gz"):
        values, _ = oasis.read_slice(path, 25)
        write_slice(path, values.flip(0).numpy())
    assert torch.equal(load_subjects(oasis_folder, 5).labels, before.labels)


def test_resizing_keeps_the_field_of_view(oasis_folder: Path) -> None:
    slices = load_subjects(oasis_folder, 5, spatial=(40, 48))
    assert slices.labels.shape == (10, 40, 48)
    assert slices.spacing == (4.0, 4.0)
    assert load_subjects(oasis_folder, 5).spacing == (2.0, 2.0)


def test_slices_without_a_third_axis_and_in_floats_are_read(oasis_folder: Path) -> None:
    expected = load_subjects(oasis_folder, 5).labels
    path = oasis_folder / SEGMENTATION
    values = np.asarray(nib.load(path).dataobj)[:, :, 0]
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), path)
    assert torch.equal(load_subjects(oasis_folder, 5).labels, expected)


def test_split_name() -> None:
    assert oasis.split_name("BRAIN_03_S08") == ("BRAIN_03", "S08")
    assert oasis.split_name("OASIS_OAS1_0001_MR1") == ("OASIS_OAS1_0001_MR1", "")


def test_split_by_subject() -> None:
    brains = [f"BRAIN_{subject:02d}_S{where:02d}" for subject in range(1, 15) for where in range(0, 18, 2)]
    train, validation = oasis.split_subjects(brains, "train"), oasis.split_subjects(brains, "validation")
    assert sorted(train + validation) == brains
    assert {name[:8] for name in train} == {f"BRAIN_{subject:02d}" for subject in range(1, 12)}
    assert {name[:8] for name in validation} == {"BRAIN_12", "BRAIN_13", "BRAIN_14"}
    people = [f"OASIS_OAS1_{number:04d}_MR1" for number in range(1, 415)]
    assert len(oasis.split_subjects(people, "train")) == 331
    assert len(oasis.split_subjects(people[::-1], "validation")) == 83  # in any order of subjects.txt


def test_no_subject_is_in_both_splits(best_oasis_folder: Path) -> None:
    people = []
    for split in ("train", "validation"):
        pairs = load_oasis_pairs(best_oasis_folder, split, spatial=(40, 48))
        people.append({oasis.split_name(name)[0] for pair in pairs.names for name in pair.split("~")})
    assert people[0] and people[1] and not people[0] & people[1]


def test_pairs_are_two_subjects_at_one_slice(best_oasis_folder: Path) -> None:
    pairs = load_oasis_pairs(best_oasis_folder, "validation", spatial=(40, 48))
    assert len(set(pairs.names)) == len(pairs)
    for name in pairs.names:
        (fixed, fixed_slice), (moving, moving_slice) = (oasis.split_name(part) for part in name.split("~"))
        assert fixed != moving and fixed_slice == moving_slice
    swapped = {"~".join(reversed(name.split("~"))) for name in pairs.names}
    assert swapped == set(pairs.names)  # both orders


def test_pairs_hold_the_images_they_are_named_after(oasis_folder: Path) -> None:
    slices = load_subjects(oasis_folder, 5)
    place = {name: number for number, name in enumerate(slices.names)}
    pairs = oasis.make_pairs(slices)
    assert len(pairs) == 5 * 4 * 2
    for labels, name in zip(pairs.labels, pairs.names, strict=True):
        fixed, moving = name.split("~")
        assert torch.equal(labels[0], slices.labels[place[fixed]])
        assert torch.equal(labels[1], slices.labels[place[moving]])


def test_a_seeded_choice_of_max_pairs(oasis_folder: Path) -> None:
    slices = load_subjects(oasis_folder, 5)
    every, some = oasis.make_pairs(slices), oasis.make_pairs(slices, max_pairs=7, seed=1)
    assert len(some) == 7 and set(some.names) < set(every.names)
    assert some.names == oasis.make_pairs(slices, max_pairs=7, seed=1).names
    assert some.names != oasis.make_pairs(slices, max_pairs=7, seed=2).names
    assert oasis.make_pairs(slices, max_pairs=1000).names == every.names


def test_the_layout_of_the_original(tmp_path: Path, oasis_folder: Path) -> None:
    """It has one slice per subject, other names, and files that are not needed."""
    names = [f"OASIS_OAS1_{number:04d}_MR1" for number in range(1, 6)]
    for number, name in enumerate(names, start=1):
        (oasis_folder / f"BRAIN_{number:02d}_S00").rename(oasis_folder / name)
        (oasis_folder / name / "slice_norm.nii.gz").write_bytes(b"never read")
    (oasis_folder / "subjects.txt").write_text("\r\n".join(names))
    pairs = load_oasis_pairs(oasis_folder, "validation")
    assert pairs.names == (f"{names[3]}~{names[4]}", f"{names[4]}~{names[3]}")


def test_find_oasis(oasis_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_data_set: None) -> None:
    with pytest.raises(DataError, match="PAIRDIFF_OASIS2D"):
        oasis.find_oasis()
    assert oasis.find_oasis(oasis_folder) == oasis_folder
    monkeypatch.setenv("PAIRDIFF_OASIS2D", str(oasis_folder))
    assert oasis.find_oasis() == oasis_folder
    monkeypatch.delenv("PAIRDIFF_OASIS2D")

    monkeypatch.setenv("PAIRDIFF_DATA", str(tmp_path))
    with pytest.raises(DataError, match="brain2d"):
        oasis.find_oasis()
    stand_in = Path(shutil.copytree(oasis_folder, tmp_path / "brain2d"))
    assert oasis.find_oasis() == stand_in
    original = Path(shutil.copytree(oasis_folder, tmp_path / "neurite-oasis.2d.v1.0"))
    assert oasis.find_oasis() == original  # the original takes precedence


# ------------------------------------------------------------------------------------------ bad input


def test_a_folder_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_data_set: None) -> None:
    missing = tmp_path / "nowhere"
    monkeypatch.setenv("PAIRDIFF_DATA", str(missing))
    with pytest.raises(DataError, match="nowhere.*PAIRDIFF_DATA.*pairdiff fetch oasis2d"):
        oasis.find_oasis()
    assert not missing.exists()


def test_a_file_that_is_not_nifti(oasis_folder: Path) -> None:
    (oasis_folder / SEGMENTATION).write_bytes(gzip.compress(b"<html>404 not found</html>" * 50))
    refuses(oasis_folder, str(SEGMENTATION), "not a NIfTI image")


def test_a_file_that_is_not_even_gzip(oasis_folder: Path) -> None:
    (oasis_folder / SEGMENTATION).write_text("<html>404 not found</html>" * 50)
    refuses(oasis_folder, str(SEGMENTATION), "not a NIfTI image")


@pytest.mark.parametrize("share", [0.99, 0.9, 0.5, 0.1, 0.0])
def test_truncated_gzip(oasis_folder: Path, share: float) -> None:
    path = oasis_folder / SEGMENTATION
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refuses(oasis_folder, str(SEGMENTATION), "again")


def test_a_truncated_file_that_is_not_compressed(oasis_folder: Path) -> None:
    path = oasis_folder / SEGMENTATION
    path.write_bytes(gzip.decompress(path.read_bytes())[:3000])
    refuses(oasis_folder, str(SEGMENTATION), "truncated")


def test_damaged_gzip(oasis_folder: Path) -> None:
    path = oasis_folder / SEGMENTATION
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 40):
        data[place] ^= 0xFF
    path.write_bytes(data)
    refuses(oasis_folder, str(SEGMENTATION), "damaged")


def test_a_shape_unlike_the_others(oasis_folder: Path) -> None:
    write_slice(oasis_folder / SEGMENTATION, np.ones((64, 96), np.uint8))
    refuses(oasis_folder, str(SEGMENTATION), "(64, 96)", "(80, 96)", "Resample")


def test_a_volume_instead_of_a_slice(oasis_folder: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((8, 9, 10), np.uint8), np.eye(4)), oasis_folder / SEGMENTATION)
    refuses(oasis_folder, str(SEGMENTATION), "(8, 9, 10)", "one slice")


def test_float_labels_that_are_no_integers(oasis_folder: Path) -> None:
    values = np.zeros((80, 96), np.float32)
    values[10, 20] = 1.5
    write_slice(oasis_folder / SEGMENTATION, values)
    refuses(oasis_folder, str(SEGMENTATION), "1.5", "whole numbers")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan(oasis_folder: Path, value: float) -> None:
    values = np.zeros((80, 96), np.float32)
    values[10, 20] = value
    write_slice(oasis_folder / SEGMENTATION, values)
    refuses(oasis_folder, str(SEGMENTATION), "NaN")


def test_a_colour_picture(oasis_folder: Path) -> None:
    values = np.zeros((80, 96, 1), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(values, np.eye(4)), oasis_folder / SEGMENTATION)
    refuses(oasis_folder, str(SEGMENTATION), "whole numbers")


@pytest.mark.parametrize("label", [5, -1, 300])
def test_an_unknown_label(oasis_folder: Path, label: int) -> None:
    values = np.zeros((80, 96), np.int16)
    values[10, 20] = label
    write_slice(oasis_folder / SEGMENTATION, values)
    refuses(oasis_folder, str(SEGMENTATION), f"label {label}", "label table")


def test_a_subject_without_its_segmentation(oasis_folder: Path) -> None:
    (oasis_folder / SEGMENTATION).unlink()
    refuses(oasis_folder, str(SEGMENTATION), "missing")
    shutil.rmtree(oasis_folder / SEGMENTATION.parent)
    refuses(oasis_folder, str(SEGMENTATION), "missing")


def test_no_subject_list(oasis_folder: Path) -> None:
    (oasis_folder / "subjects.txt").unlink()
    refuses(oasis_folder, "subjects.txt", "must list the slice folders", "No such file")


def test_a_subject_list_that_is_no_text(oasis_folder: Path) -> None:
    (oasis_folder / "subjects.txt").write_bytes(b"\xff\xfe\x00BRAIN")
    refuses(oasis_folder, "subjects.txt", "must list the slice folders", "decode")


def test_a_label_table_with_too_few_labels(oasis_folder: Path) -> None:
    table = oasis_folder / "seg4_labels.txt"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    refuses(oasis_folder, "seg4_labels.txt", "[0, 1, 2, 3]", "0 to 4")


def test_the_label_table_of_other_images(oasis_folder: Path) -> None:
    shutil.copy(oasis_folder / "seg24_labels.txt", oasis_folder / "seg4_labels.txt")
    refuses(oasis_folder, "seg4_labels.txt", "the images have 0 to 4")


def test_images_of_another_label_table(oasis_folder: Path) -> None:
    name = SEGMENTATION.parent
    shutil.copy(oasis_folder / name / "slice_seg24.nii.gz", oasis_folder / SEGMENTATION)
    refuses(oasis_folder, str(SEGMENTATION), "not in the label table")


@pytest.mark.parametrize("row", ["five Cortex 1 2 3 0", "1 Cortex 205 62", "1 Cortex red green blue 0"])
def test_a_label_table_that_cannot_be_read(oasis_folder: Path, row: str) -> None:
    table = oasis_folder / "seg4_labels.txt"
    lines = table.read_text().splitlines()
    lines[1] = row
    table.write_text("\n".join(lines))
    refuses(oasis_folder, "seg4_labels.txt", "id name R G B A", "row")


def test_no_label_table(oasis_folder: Path) -> None:
    (oasis_folder / "seg4_labels.txt").unlink()
    refuses(oasis_folder, "seg4_labels.txt", "id name R G B A", "not found")


def test_too_few_subjects_for_two_splits(tmp_path: Path) -> None:
    folder = write_oasis_folder(tmp_path / "few", subjects=3, slices=("S00",))
    with pytest.raises(DataError, match="names 3 subjects.*at least 4"):
        load_oasis_pairs(folder, "train")
    (folder / "subjects.txt").write_text("\n \n")
    with pytest.raises(DataError, match="names 0 subjects.*at least 4"):
        load_oasis_pairs(folder, "train")


def test_subjects_that_share_no_slice(oasis_folder: Path) -> None:
    names = ["BRAIN_01_S00", "BRAIN_02_S02"]
    with pytest.raises(DataError, match="share a slice"):
        oasis.make_pairs(load_subjects(oasis_folder, 5, names=names))
