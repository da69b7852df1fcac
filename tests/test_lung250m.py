"""Lung vessels: both layouts, the common frame, landmarks after crop and pooling, and all kinds of bad input."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LUNG_SHAPES, write_vessels

from pairdiff_core.data import lung250m
from pairdiff_core.data.lung250m import load_lung250m_pairs
from pairdiff_core.data.lung_frame import FRAME, frame_offset, to_frame
from pairdiff_core.errors import DataError

HALF, QUARTER = (128, 104, 128), (64, 52, 64)
TRAIN, HELD_OUT = (Path(name) for name in LUNG_SHAPES)
VOLUME = TRAIN / "case_036_2.nii.gz"  # the file that tests damage
POINTS = Path("corrfieldTr") / "case_036.csv"
LANDMARKS = Path("lms_validation_cropped.pth")
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "lung250m"
on_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data/lung250m beside this checkout")


def refuses(folder: Path, *parts: str, split: str = "train", spatial: tuple[int, ...] = QUARTER) -> None:
    """Loading fails with one DataError that names all ``parts``."""
    with pytest.raises(DataError) as error:
        load_lung250m_pairs(folder, split, spatial=spatial)
    for part in parts:
        assert part in str(error.value)


# ------------------------------------------------------------------------------------------ good input


@pytest.mark.parametrize(
    "split, cases",
    [
        ("train", ["case_032", "case_035", "case_036"]),
        ("validation", ["case_002", "case_054", "case_114"]),
        ("test", ["case_104"]),
    ],
)
def test_splits(lung_folder: Path, split: str, cases: list[str]) -> None:
    pairs = load_lung250m_pairs(lung_folder, split, spatial=QUARTER)
    assert pairs.names == tuple(f"{case}_1~{case}_2" for case in cases)
    assert pairs.spatial == QUARTER and pairs.spacing == (4.0, 4.0, 4.0)
    assert pairs.labels.unique().tolist() == [0, 1]  # both vessel trees are vessel
    assert pairs.num_labels == len(pairs.label_colours) == 2
    assert pairs.displacement is None


def test_fixed_is_1_and_moving_is_2(lung_folder: Path) -> None:
    pairs = load_lung250m_pairs(lung_folder, "train", spatial=FRAME)
    assert pairs.labels.dtype == torch.uint8
    assert torch.equal(pairs.fixed[2].roll(2, dims=2), pairs.moving[2])
    shape = LUNG_SHAPES["dilated_vessels_10"]["case_036"]
    crossing = [size // 2 + pad for size, pad in zip(shape, frame_offset(shape), strict=True)]
    assert pairs.fixed[2][tuple(crossing)] == 1
    assert pairs.fixed[2].sum() == (nib.load(lung_folder / TRAIN / "case_036_1.nii.gz").get_fdata() > 0).sum()


def test_coarser_grids_are_the_frame_pooled(lung_folder: Path) -> None:
    full = load_lung250m_pairs(lung_folder, "train", spatial=FRAME)
    for factor, spatial in ((2, HALF), (4, QUARTER)):
        pairs, pooled = load_lung250m_pairs(lung_folder, "train", spatial=spatial), full.pooled(factor)
        assert torch.equal(pairs.labels, pooled.labels)
        assert pairs.spacing == pooled.spacing
        torch.testing.assert_close(pairs.landmarks, pooled.landmarks)
        fractions = F.avg_pool3d(full.fixed[:1].float(), factor)[0]  # soft maps; their support is the maximum
        assert torch.equal(fractions > 0, pairs.fixed[0] > 0) and 0 < fractions[fractions > 0].min() < 0.5


@pytest.mark.parametrize("spatial", [(80, 96), (64, 64, 64), (32, 26, 32), (512, 416, 512)])
def test_other_grids_are_refused(lung_folder: Path, spatial: tuple[int, ...]) -> None:
    refuses(lung_folder, str(spatial), "(128, 104, 128)", spatial=spatial)


def test_landmarks_are_all_or_empty(lung_folder: Path) -> None:
    pairs = load_lung250m_pairs(lung_folder, "train", spatial=QUARTER)
    assert [tuple(points.shape) for points in pairs.landmarks] == [(0, 2, 3), (0, 2, 3), (20, 2, 3)]
    (lung_folder / POINTS).unlink()
    assert load_lung250m_pairs(lung_folder, "train", spatial=QUARTER).landmarks is None
    (lung_folder / LANDMARKS).unlink()
    assert load_lung250m_pairs(lung_folder, "validation", spatial=QUARTER).landmarks is None


def test_a_seeded_choice_of_max_pairs(lung_folder: Path) -> None:
    every = load_lung250m_pairs(lung_folder, "train", spatial=QUARTER)
    some = [
        load_lung250m_pairs(lung_folder, "train", spatial=QUARTER, max_pairs=2, seed=seed) for seed in (0, *range(4))
    ]
    assert some[0].names == some[1].names and len(some[0]) == 2
    assert len({part.names for part in some}) > 1
    for name, labels in zip(some[0].names, some[0].labels, strict=True):
        assert torch.equal(labels, every.labels[every.names.index(name)])


def test_cases_by_name(lung_folder: Path) -> None:
    """Names may be written in any way; all cases come in sorted order, whatever max_pairs is."""
    for cases in (["36", "032"], ["case_032", "case_036", "36"]):
        pairs = load_lung250m_pairs(lung_folder, "train", cases=cases, spatial=QUARTER, max_pairs=1)
        assert pairs.names == ("case_032_1~case_032_2", "case_036_1~case_036_2")
        assert [len(points) for points in pairs.landmarks] == [0, 20]
    only = load_lung250m_pairs(lung_folder, "validation", cases=["54"], spatial=FRAME)
    every = load_lung250m_pairs(lung_folder, "validation", spatial=FRAME)
    assert torch.equal(only.labels, every.labels[1:2]) and torch.equal(only.landmarks[0], every.landmarks[1])


def test_raw_label_volumes_come_out_as_the_published_ones(lung_folder: Path, tmp_path: Path) -> None:
    """segTr in both spellings of the file names, dilated here, with more cases than dilated_vessels_10."""
    published = load_lung250m_pairs(lung_folder, "train", spatial=FRAME)
    thin = torch.from_numpy((nib.load(lung_folder / TRAIN / "case_032_1.nii.gz").get_fdata() > 0).astype(np.uint8))
    for name in ("case_032_1", "032_2", "033_1", "case_033_2"):
        write_vessels(lung_folder / "segTr" / f"{name}.nii.gz", thin.numpy())
    (lung_folder / "segTr" / "._case_032_1.nii.gz").write_bytes(b"of macOS, not an image")
    raw = load_lung250m_pairs(lung_folder, "train", spatial=FRAME)
    assert raw.names == ("case_032_1~case_032_2", "case_033_1~case_033_2")
    expected = torch.zeros_like(published.fixed[0])
    for place in published.fixed[0].nonzero().tolist():
        x, y, z = place
        expected[x - 1 : x + 2, y - 1 : y + 2, z - 1 : z + 2] = 1
    assert all(torch.equal(image, expected) for image in raw.labels.flatten(0, 1))


def test_the_whole_training_set_goes_before_the_ten_pairs(lung_folder: Path) -> None:
    shutil.copytree(lung_folder / TRAIN, lung_folder / "dilated_vessels")
    for path in (lung_folder / TRAIN).iterdir():
        path.unlink()
    assert len(lung250m.case_files(lung_folder, "train")) == 3


def test_raw_test_volumes_serve_where_there_are_no_others(lung_folder: Path) -> None:
    (lung_folder / HELD_OUT).rename(lung_folder / "segTs")
    assert list(lung250m.case_files(lung_folder, "validation")) == ["case_002", "case_054", "case_114"]


def test_find_lung250m(lung_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_data_set: None) -> None:
    with pytest.raises(DataError, match="pairdiff fetch lung250m"):
        lung250m.find_lung250m()
    assert lung250m.find_lung250m(lung_folder) == lung250m.find_lung250m(tmp_path) == lung_folder
    for place in (lung_folder, tmp_path):
        monkeypatch.setenv("PAIRDIFF_DATA", str(place))
        assert lung250m.find_lung250m() == lung_folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty.*from data.*dilated_vessels_10"):
        lung250m.find_lung250m(tmp_path / "empty")
    monkeypatch.setenv("PAIRDIFF_DATA", str(tmp_path / "mistyped"))
    with pytest.raises(DataError, match="mistyped.*PAIRDIFF_DATA.*not a folder"):
        lung250m.find_lung250m()


# -------------------------------------------------------------------------------------- the common frame


@pytest.mark.parametrize(
    "shape, offset",
    [
        ((320, 250, 353), (-32, -29, -49)),  # an odd last axis beyond 352: rounded down, as the reference does
        ((236, 189, 208), (10, 1, 24)),
        ((268, 188, 280), (-6, 2, -12)),
        ((256, 208, 256), (0, -8, 0)),
    ],
)
def test_where_a_volume_lies_in_the_frame(shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
    assert frame_offset(shape) == offset
    volume = torch.zeros(shape, dtype=torch.uint8)
    place = torch.tensor([100, 90, 110])
    volume[tuple(place)] = 1
    framed = to_frame(volume)
    assert tuple(framed.shape) == FRAME and framed.dtype == torch.uint8
    assert framed.nonzero().tolist() == [(place + torch.tensor(offset)).tolist()]


def test_case_035_is_cut_from_above(lung_folder: Path) -> None:
    """Its last axis keeps the first 280 voxels, which determine the padding; other cases are not cut."""
    values = np.zeros((20, 22, 451), np.uint8)
    values[10, 11, 100], values[10, 11, 267], values[10, 11, 268] = 1, 2, 2  # 268 is just above the frame
    for case in ("case_032", "case_035"):
        for number in (1, 2):
            write_vessels(lung_folder / TRAIN / f"{case}_{number}.nii.gz", values)
    pairs = load_lung250m_pairs(lung_folder, "train", spatial=FRAME)
    uncut, cut = (image.nonzero()[:, 2].tolist() for image in pairs.fixed[:2])
    assert cut == [100 - 12, 267 - 12]
    assert uncut == [100 - 98, 267 - 98, 268 - 98]  # without the cut: eighty-six voxels off


def test_case_035_is_dilated_before_it_is_cut(lung_folder: Path) -> None:
    values = np.zeros((20, 22, 451), np.uint8)
    values[10, 11, 280] = 1
    write_vessels(lung_folder / "segTr" / "case_035_1.nii.gz", values)
    assert lung250m.read_vessels(lung_folder / "segTr" / "case_035_1.nii.gz", "case_035").sum() == 9


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_point_goes_through_crop_and_pooling_with_its_half_voxel(lung_folder: Path, factor: int) -> None:
    """The landmark of a single vessel voxel stays inside it, cropped on two axes and padded on one."""
    shape, fixed, moving = (301, 190, 283), (120, 77, 141), (122.25, 75.75, 150.75)
    for path in (lung_folder / TRAIN).glob("*"):
        path.unlink()
    for number, place in ((1, fixed), (2, [round(x) for x in moving])):
        values = np.zeros(shape, np.uint8)
        values[tuple(place)] = 2
        write_vessels(lung_folder / TRAIN / f"case_036_{number}.nii.gz", values)
    outside = "2,100,100,2,100,100"  # cropped away: the frame begins at 23
    (lung_folder / POINTS).write_text(",".join(map(str, (*fixed, *moving))) + "\n" + outside + "\n")
    pairs = load_lung250m_pairs(lung_folder, "train", spatial=[size // factor for size in FRAME])
    ((landmark,),) = pairs.landmarks
    offset = torch.tensor([-23.0, 1.0, -14.0])
    assert frame_offset(shape) == tuple(offset.tolist())
    expected = (torch.tensor([fixed, moving]) + offset + 0.5) / factor - 0.5
    torch.testing.assert_close(landmark, expected)
    assert pairs.fixed[0].nonzero().tolist() == [landmark[0].round().tolist()]
    assert pairs.moving[0].nonzero().tolist() == [landmark[1].round().tolist()]
    millimetres = (landmark[1] - landmark[0]) * torch.tensor(pairs.spacing)  # the same on every grid
    torch.testing.assert_close(millimetres, torch.tensor(moving) - torch.tensor(fixed))


def test_affines_do_not_move_voxels(lung_folder: Path) -> None:
    """Headers may have another orientation, or two in one pair: only the grids matter."""
    before = load_lung250m_pairs(lung_folder, "train", spatial=QUARTER)
    values = np.asarray(nib.load(lung_folder / VOLUME).dataobj)
    write_vessels(lung_folder / VOLUME, values, np.eye(4))
    assert torch.equal(load_lung250m_pairs(lung_folder, "train", spatial=QUARTER).labels, before.labels)


# --------------------------------------------------------------------------------------------- landmarks


@pytest.mark.parametrize(
    "remove, keep",
    [
        ((), ("case_002", "case_054", "case_104", "case_114")),  # the public download: volumes and points of all
        ((), ("case_002", "case_054", "case_114")),  # points of the validation cases only
        (("case_104",), ("case_002", "case_054", "case_114")),  # as ../shared/data
        (("case_054",), ("case_002", "case_104", "case_114")),
    ],
)
def test_landmarks_find_their_case(lung_folder: Path, remove: tuple[str, ...], keep: tuple[str, ...]) -> None:
    """The crossing is at a different voxel in each held-out case, and must be found whichever cases exist."""
    fixed, moving = torch.load(lung_folder / LANDMARKS, weights_only=True)
    chosen = [list(LUNG_SHAPES["dilated_vessels_ts"]).index(case) for case in keep]
    torch.save([[part[i] for i in chosen] for part in (fixed, moving)], lung_folder / LANDMARKS)
    for case in remove:
        for number in (1, 2):
            (lung_folder / HELD_OUT / f"{case}_{number}.nii.gz").unlink()
    pairs = load_lung250m_pairs(lung_folder, "validation", spatial=FRAME)
    for name, image, points in zip(pairs.names, pairs.fixed, pairs.landmarks, strict=True):
        shape = LUNG_SHAPES["dilated_vessels_ts"][name[:8]]
        expected = [size // 2 + pad for size, pad in zip(shape, frame_offset(shape), strict=True)]
        assert points[0, 0].tolist() == expected and image[tuple(expected)] == 1
        assert (points[:, 1] - points[:, 0]).tolist() == [[0, 0, 2]]


def test_the_public_landmarks_fit_the_validation_cases_alone(tmp_path: Path) -> None:
    """27 entries, but the volumes of the ten official test cases are not there."""
    validation = [2, 8, 54, 55, 56, 94, 97, *range(114, 124)]
    entries = sorted([*validation, *range(104, 114)])
    points = [torch.full((1, 3), float(number)) for number in entries]
    torch.save([points, points], tmp_path / LANDMARKS)
    cases = [f"case_{number:03d}" for number in validation]
    found = lung250m.read_validation_landmarks(tmp_path / LANDMARKS, cases)
    assert len(found) == 27
    assert all(int(case[-3:]) == points[0, 0, 0] for case, points in found.items())


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_landmarks_of_another_number_of_cases(lung_folder: Path, count: int) -> None:
    torch.save([[torch.ones(4, 3)] * count] * 2, lung_folder / LANDMARKS)
    refuses(lung_folder, str(LANDMARKS), f"{count} cases", "4 cases", "3 without", split="validation")


@pytest.mark.parametrize(
    "content",
    [
        {"2": torch.ones(4, 6)},  # the landmarks of Lung250M-4B itself, in voxels of the whole volumes
        [[torch.ones(4, 3)] * 4],
        [[torch.ones(4, 3)] * 4, [torch.ones(4, 3)] * 3],
        [[torch.ones(4, 3)] * 4, [torch.ones(5, 3)] * 4],
        [[torch.ones(4, 2)] * 4] * 2,
        [[torch.full((4, 3), torch.nan)] * 4] * 2,
        [[1, 2, 3, 4]] * 2,
        [[torch.tensor(1.0)] * 4] * 2,
        "landmarks",
    ],
)
def test_landmarks_of_another_form(lung_folder: Path, content: object) -> None:
    torch.save(content, lung_folder / LANDMARKS)
    refuses(lung_folder, str(LANDMARKS), "two lists", split="validation")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_truncated_landmark_file(lung_folder: Path, share: float) -> None:
    data = (lung_folder / LANDMARKS).read_bytes()
    (lung_folder / LANDMARKS).write_bytes(data[: int(share * len(data))])
    refuses(lung_folder, str(LANDMARKS), "damaged", split="validation")


def test_a_landmark_file_with_code_in_it_is_not_run(lung_folder: Path) -> None:
    torch.save([Path("anything but tensors")], lung_folder / LANDMARKS)
    refuses(lung_folder, str(LANDMARKS), "damaged or something else", split="validation")


@pytest.mark.parametrize(
    "text, part",
    [
        ("1,2,3,4,5\n1,2,3,4,5\n", "six numbers"),
        ("1,2,3,4,5,6\n1,2,3,4,5\n", "table of numbers"),
        ("1,2,3,4,5,6,7\n", "six numbers"),
        ("x,y,z,u,v,w\n1,2,3,4,5,6\n", "table of numbers"),
        ("<html>404 not found</html>\n", "table of numbers"),
        ("1,2,3,4,5,nan\n", "six numbers"),
        ("", "six numbers"),
    ],
)
def test_correspondences_of_another_form(lung_folder: Path, text: str, part: str) -> None:
    (lung_folder / POINTS).write_text(text)
    refuses(lung_folder, str(POINTS), part)


def test_correspondences_that_are_no_text(lung_folder: Path) -> None:
    (lung_folder / POINTS).write_bytes(b"\x1f\x8b\xff\xfe")
    refuses(lung_folder, str(POINTS), "table of numbers")


# --------------------------------------------------------------------------------------------- bad input


def test_a_split_without_cases(lung_folder: Path) -> None:
    shutil.move(lung_folder / HELD_OUT, lung_folder / "all")
    refuses(lung_folder, str(lung_folder), "'validation'", "dilated_vessels_ts", "segTs", split="validation")
    (lung_folder / HELD_OUT).mkdir()
    for number in (1, 2):
        shutil.copy(lung_folder / "all" / f"case_002_{number}.nii.gz", lung_folder / HELD_OUT)
    refuses(lung_folder, str(lung_folder), "'test'", split="test")
    for number in (1, 2):
        (lung_folder / HELD_OUT / f"case_002_{number}.nii.gz").unlink()
        shutil.copy(lung_folder / "all" / f"case_104_{number}.nii.gz", lung_folder / HELD_OUT)
    refuses(lung_folder, "only official test cases: the split 'test'", split="validation")


def test_cases_that_are_not_there(lung_folder: Path) -> None:
    for split, case in (("validation", "104"), ("validation", "case_999"), ("train", "54"), ("train", "first")):
        with pytest.raises(DataError, match=f"{case}; there are case_0.., case_0.., case_...") as error:
            load_lung250m_pairs(lung_folder, split, cases=("36", "54", case), spatial=QUARTER)
        assert repr(split) in str(error.value)


@pytest.mark.parametrize("number, missing", [(1, 2), (2, 1)])
def test_a_partner_is_missing(lung_folder: Path, number: int, missing: int) -> None:
    (lung_folder / TRAIN / f"case_036_{missing}.nii.gz").unlink()
    refuses(lung_folder, f"{TRAIN} holds only the image _{number} of case_036")


@pytest.mark.parametrize("content", [b"<html>404 not found</html>" * 50, gzip.compress(b"not an image" * 50)])
def test_a_file_that_is_not_nifti(lung_folder: Path, content: bytes) -> None:
    (lung_folder / VOLUME).write_bytes(content)
    refuses(lung_folder, str(VOLUME), "not a NIfTI image")


@pytest.mark.parametrize("share", [0.98, 0.5, 0.0])
def test_truncated_gzip(lung_folder: Path, share: float) -> None:
    data = (lung_folder / VOLUME).read_bytes()
    (lung_folder / VOLUME).write_bytes(data[: int(share * len(data))])
    refuses(lung_folder, str(VOLUME), "again")


@pytest.mark.parametrize("shape", [(33, 30), (33, 30, 41, 2)])
def test_a_wrong_number_of_axes(lung_folder: Path, shape: tuple[int, ...]) -> None:
    write_vessels(lung_folder / VOLUME, np.ones(shape, np.uint8))
    refuses(lung_folder, str(VOLUME), str(shape), "one volume")


def test_two_shapes_in_one_pair(lung_folder: Path) -> None:
    write_vessels(lung_folder / VOLUME, np.ones((33, 30, 40), np.uint8))
    refuses(lung_folder, str(VOLUME), "(33, 30, 40)", "case_036_1.nii.gz has (33, 30, 41)")


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (1.0, 1.0, 0.98), (0.7, 0.7, 1.0)])
def test_another_spacing(lung_folder: Path, spacing: tuple[float, ...]) -> None:
    write_vessels(lung_folder / VOLUME, np.ones((33, 30, 41), np.uint8), np.diag([*spacing, 1.0]))
    refuses(lung_folder, str(VOLUME), " x ".join(f"{mm:g}" for mm in spacing), "Resample it to 1 mm")


def test_spacings_of_the_real_headers_are_accepted_as_1_mm(lung_folder: Path) -> None:
    values = np.asarray(nib.load(lung_folder / VOLUME).dataobj)
    write_vessels(lung_folder / VOLUME, values, np.diag([0.9983, 1.0016, 0.9969, 1.0]))
    assert load_lung250m_pairs(lung_folder, "train", spatial=HALF).spacing == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("value, part", [(np.nan, "NaN"), (np.inf, "NaN"), (0.5, "0.5"), (-1.0, "-1")])
def test_values_that_are_no_labels(lung_folder: Path, value: float, part: str) -> None:
    values = np.ones((33, 30, 41), np.float32)
    values[3, 4, 5] = value
    write_vessels(lung_folder / VOLUME, values)
    refuses(lung_folder, str(VOLUME), part)


def test_an_empty_mask(lung_folder: Path) -> None:
    write_vessels(lung_folder / VOLUME, np.zeros((33, 30, 41), np.uint8))
    refuses(lung_folder, str(VOLUME), "no vessel")


# --------------------------------------------------------------------------------------------- real data


@on_real_data
def test_real_training_pair() -> None:
    """Case 036: a quarter of the automatic correspondences are on a vessel, which needs the right offset."""
    file = REAL / TRAIN / "case_036_1.nii.gz"
    mask = lung250m.read_vessels(file, "case_036")
    framed = to_frame(mask)
    points = lung250m.in_frame(lung250m.read_correspondences(REAL / POINTS), mask.shape)
    assert 6400 < len(points) < 6576  # a few lie outside the frame
    on_vessel = framed[tuple(points[:, 0].round().long().T)].float().mean()
    assert 0.27 < on_vessel < 0.32
    wrong = points[:, 0].round().long() - torch.tensor(frame_offset(mask.shape))
    assert framed[tuple(wrong.clamp(max=207).T)].float().mean() < 0.1
    assert 0.02 < framed.float().mean() < 0.03


@on_real_data
def test_real_validation_landmarks() -> None:
    """The mean over cases before registration is 13.91 mm, as published, so each case has its own landmarks."""
    cases = list(lung250m.case_files(REAL, "validation"))
    known = lung250m.read_validation_landmarks(REAL / LANDMARKS, cases)
    errors = [(known[case][:, 1] - known[case][:, 0]).norm(dim=1).mean() for case in cases]
    assert torch.stack(errors).mean().item() == pytest.approx(13.91, abs=0.01)
    assert len(known["case_054"]) == 79


@on_real_data
def test_real_case_035_is_cut() -> None:
    file = lung250m.case_files(REAL, "train")["case_035"][0]
    assert nib.load(file).shape == (268, 188, 451)
    assert tuple(lung250m.read_vessels(file, "case_035").shape) == (268, 188, 280)
