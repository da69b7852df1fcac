"""Label maps of one's own: a folder that is prepared, trained on, registered, evaluated and exported."""

from __future__ import annotations

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from own_data import KINDS, write_folders
from small_run import small_run, small_run_3d
from typer.testing import CliRunner

from pairdiff_cli import cli
from pairdiff_core.data import load_pairs, read_own
from pairdiff_core.errors import DataError
from pairdiff_core.pipeline import Run, open_run, profile_for
from pairdiff_core.profiles import PROFILES, Patches, UNetSettings, with_levels


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def works(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def small(monkeypatch):
    """The profile quick with two steps of everything, and networks for images of 16 voxels a side."""
    for run in (small_run("unused"), small_run_3d("unused")):
        profile = with_levels(run.profile, steps=2)
        one = replace(
            profile.registration, unets=(UNetSettings(1, (4, 4, 4, 4, 4, 4)),), control=1, correlation=None, steps=2
        )
        patches = Patches((16, 16, 16), cuts=2) if profile.spatial_dims == 3 else None
        tiny = replace(
            profile,
            vqae=replace(profile.vqae, steps=2, patches=patches),
            denoiser=replace(profile.denoiser, steps=2),
            synthesis=replace(profile.synthesis, pairs=3),
            registration=one,
        )
        monkeypatch.setitem(PROFILES[profile.spatial_dims], "quick", tiny)
    for variable in ("PAIRDIFF_DATA", "PAIRDIFF_PROFILE"):
        monkeypatch.delenv(variable, raising=False)


# What each kind becomes: its grid, which grows to sides of at least 16 (the longest 32) that the autoencoder can halve,
# and the label values of its files.
GRIDS = {"organs": (32, 24, 20), "slices": (72, 56), "thick_slices": (40, 32, 16)}
VALUES = {"organs": (*range(10), 17, 1001), "slices": (0, 10, 20, 30), "thick_slices": (0, 1, 2, 3, 4)}
LAST = {"organs": "registration", "slices": "registration", "thick_slices": "all"}  # measuring takes longest


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_path(small, tmp_path, kind):
    """Prepare, train, register an unseen pair of the original files, evaluate, and export."""
    fixed, moving = KINDS[kind](tmp_path / "files")
    prepared, folder = tmp_path / "prepared", tmp_path / "run"
    works("prepare", fixed, moving, "--to", prepared)
    works("run", LAST[kind], "--dataset", "own", "--data", prepared, "--run", folder, "--quiet")

    run = open_run(folder)  # from here on, the data are not needed
    assert run.profile.spatial == GRIDS[kind] and run.profile.num_labels == len(VALUES[kind])
    assert run.description == read_own(prepared).described and run.description.label_values == VALUES[kind]
    files = fixed / "person5.nii.gz", moving / "person5.nii.gz"
    out = tmp_path / "field.nii.gz"
    result = works("register", *files, "--out", out, "--run", folder, "--steps", "0")
    assert nib.load(out).shape[:3] == nib.load(files[0]).shape and "voxels of" not in result.output
    works("export", "--run", folder, "--to", tmp_path / "drawn")
    drawn = nib.load(tmp_path / "drawn" / "imagesTr" / "PairDiff-own_0001_0000.nii.gz")
    assert drawn.shape == (*GRIDS[kind], 1)[:3]
    np.testing.assert_allclose(drawn.affine, run.description.directions, atol=1e-4)
    if LAST[kind] == "all":
        measured = json.loads((folder / "metrics.json").read_text())
        assert measured["provenance"]["dataset"] == "own" and measured["partners"]["motions_mm"] == []
        assert {row["method"] for row in measured["registration"]} >= {"real, warped", "synthetic, warped"}
        moved = tmp_path / "evaluated.json"
        method = ("--method", "network", "--json", moved, "--quiet")
        works("evaluate", "--dataset", "own", "--data", prepared, "--run", folder, *method)
        assert json.loads(moved.read_text())["cases"][0]["name"] == "fixed/person5~moving/person5"


def test_a_run_refuses_other_data(small, tmp_path):
    prepared, other = tmp_path / "prepared", tmp_path / "other"
    works("prepare", *KINDS["slices"](tmp_path / "files"), "--to", prepared)
    run = Run("own", profile_for(prepared, "quick"), folder=tmp_path / "run", data=prepared)
    with run.working():
        pass
    works("prepare", *write_folders(tmp_path / "others", [(71, 53)] * 2, (1.5, 1.5), [10, 20, 31]), "--to", other)
    refused = call("run", "vqae", "--dataset", "own", "--data", other, "--run", tmp_path / "run")
    assert refused.exit_code == 1 and "belongs to other data" in refused.stderr and str(other) in refused.stderr
    big = replace(PROFILES[2]["quick"].registration, control=4)
    with pytest.raises(DataError, match="needs 128 x 64. Prepare the data again with --profile quick"):
        profile_for(prepared, replace(PROFILES[2]["quick"], registration=big))


# ------------------------------------------------------------------------------------------------------- prepare


def write(path, labels, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.eye(4) if affine is None else affine), path)


def block(shape=(40, 36, 20), value=1, dtype=np.int16, at=0):
    labels = np.zeros(shape, dtype)
    labels[tuple(slice(size // 4 + at, size // 2 + at) for size in shape)] = value
    return labels


def pairs_of(folder, number=2, **options):
    """Two folders with pairs of blocks."""
    for index in range(number):
        for role in ("fixed", "moving"):
            write(folder / role / f"{index}.nii.gz", block(**options))
    return folder / "fixed", folder / "moving"


def test_a_report_writes_nothing(small, tmp_path):
    folders = KINDS["organs"](tmp_path / "files")
    before = sorted(tmp_path.rglob("*"))
    lines = works("prepare", *folders).stdout.splitlines()
    assert sorted(tmp_path.rglob("*")) == before
    rows = {line.split("  ")[0]: line for line in lines}
    assert "5 train, 1 validation" in rows["pairs"]
    assert "32 x 22 x 19 to 32 x 23 x 19" in rows["grid"] and rows["grid"].endswith("32 x 24 x 20")
    assert "12, of 0 to 1001" in rows["labels"] and rows["labels"].endswith("0 to 11")
    assert "1001, in 12 of 12 images" in "".join(lines) and lines[-1].startswith("nothing was written")


def test_prepared_pairs_are_those_of_the_files(small, tmp_path):
    """Orientation and padding change where a voxel is stored, not where it is in the world nor what it is."""
    folders = pairs_of(tmp_path, 3, value=300)
    labels = block(value=300)
    write(folders[0] / "2.nii.gz", labels[::-1], np.diag([-1.0, 1, 1, 1]) + np.array([[0, 0, 0, 39.0]] + 3 * [[0] * 4]))
    works("prepare", *folders, "--to", tmp_path / "prepared")
    prepared = tmp_path / "prepared"
    profile = profile_for(prepared, "quick")
    train, held_out = (load_pairs("own", split, profile, data=prepared) for split in ("train", "validation"))
    assert (len(train), len(held_out), train.num_labels) == (2, 1, 2)
    assert train.label_names == ("background", "label 300") and train.spacing == (1.0, 1.0, 1.0)
    assert torch.equal(held_out.labels, train.labels[:1]) and int(train.labels[0, 0].sum()) == int((labels > 0).sum())
    image = nib.load(prepared / "imagesTr" / "PairDiff-own_0003_0000.nii.gz")
    corner = np.argwhere(np.asarray(image.dataobj)).min(0)
    np.testing.assert_allclose(nib.affines.apply_affine(image.affine, corner), [10, 9, 5])


def test_voxel_size_and_size(small, tmp_path):
    folders = pairs_of(tmp_path)
    result = works("prepare", *folders, "--spacing", "2,1,1", "--size", "20,36,8", "--to", tmp_path / "prepared")
    own = read_own(tmp_path / "prepared")
    assert own.described.spacing(3) == (2.0, 1.0, 1.0)
    assert own.spatial == (20, 36, 16)  # the shortest side that the networks accept is 16
    assert "cropped about their centre; up to" in result.stderr
    labels = load_pairs("own", "train", profile_for(tmp_path / "prepared", "quick"), data=tmp_path / "prepared").labels
    assert torch.equal(labels[0, 0].nonzero().amin(0), torch.tensor([5, 9, 3]))
    assert int(labels[0, 0].sum()) == 5 * 9 * 5


def test_names_and_labels_that_are_missing(small, tmp_path):
    """A label that only some images have is kept; one that no training image has is reported."""
    folders = pairs_of(tmp_path, 3)
    for role in folders:
        write(role / "2.nii.gz", block() + block(value=6, at=8))
    (tmp_path / "names.txt").write_text("# ours\n1 liver\n7 spleen\n")
    result = works("prepare", *folders, "--names", tmp_path / "names.txt")
    assert "liver" in result.stdout and "label 7" not in result.stdout
    assert "6, in 2 of 6 images" in result.stdout
    assert "in no image of the split 'train': label 6" in result.stderr


def test_probabilities(small, tmp_path):
    """The most likely label, whether the background has a map of its own or not."""
    one, other = block().astype(np.float32), block(at=8).astype(np.float32)
    with_background = np.stack([1 - 0.9 * one - 0.6 * other, 0.9 * one, 0.6 * other], 3)
    for role in ("fixed", "moving"):
        write(tmp_path / role / "0.nii.gz", with_background)
        write(tmp_path / role / "1.nii.gz", with_background[..., 1:])
    works("prepare", tmp_path / "fixed", tmp_path / "moving", "--probabilities", "--to", tmp_path / "prepared")
    profile = profile_for(tmp_path / "prepared", "quick")
    train, held_out = (
        load_pairs("own", split, profile, data=tmp_path / "prepared") for split in ("train", "validation")
    )
    assert torch.equal(train.labels, held_out.labels) and train.num_labels == 3
    write(tmp_path / "fixed" / "0.nii.gz", 2 * with_background)
    fails("prepare", tmp_path / "fixed", tmp_path / "moving", "--probabilities", texts=["0.nii.gz", "from 0 to 2"])


def test_a_csv_file(small, tmp_path):
    pairs_of(tmp_path, 3)
    table = tmp_path / "pairs.csv"
    lines = ["fixed,moving,split", "fixed/0.nii.gz,fixed/1.nii.gz,train", "fixed/0.nii.gz,moving/2.nii.gz,validation"]
    table.write_text("\n".join(lines))
    result = works("prepare", "--csv", table, "--to", tmp_path / "prepared")
    assert "fixed/0.nii.gz is in pairs of training and in held-out pairs" in result.stderr
    assert [pair["name"] for pair in read_own(tmp_path / "prepared").splits["train"]] == ["fixed/0~fixed/1"]
    table.write_text("\n".join(line.rpartition(",")[0] for line in lines))
    fails("prepare", "--csv", table, texts=["connected by images that they share", "a column split"])
    for wrong, text in {
        "": "needs the columns fixed and moving",
        "fixed\na": "needs the columns fixed and moving",
        "fixed,moving\na,": "line 2: a fixed or moving file is missing",
        "fixed,moving,split\na,b,exam": "there is no split 'exam'",
        "fixed,moving,split\na,b,train\nc,d,": "a split in some rows only",
        "fixed,moving,split\na,b,train": "no pair has the split 'validation'",
        "fixed,moving\na.nii,b.nii\nc.nii,d.nii": "a.nii does not exist",
    }.items():
        table.write_text(wrong)
        fails("prepare", "--csv", table, texts=[text])
    table.write_bytes(b"\xff\xfe\x00")
    fails("prepare", "--csv", table, texts=[str(table), "Save it as UTF-8 text"])


def fails(*arguments, texts=()):
    """The command ends with 1 and one line that contains the texts."""
    result = call(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for text in texts:
        assert text in result.stderr, result.stderr


def wrong_type(values):
    return values.astype(np.float32)


HOSTILE = {
    "fractions": (wrong_type(block()) / 3, "0.333333343"),
    "NaN": (np.where(block() > 0, np.nan, 0).astype(np.float32), "NaN or infinite values"),
    "several volumes": (np.stack([block()] * 3, 3), "3 volumes"),
    "negative": (block(value=-2), "negative labels: -2"),
    "empty": (block(value=0), "all its voxels are 0"),
    "another grid": (block((40, 36, 22)), "has shape 40 x 36 x 20, but"),
    "a slice": (block((40, 36))[..., None], "has shape 40 x 36 x 20, but"),
    "intensities": (np.arange(40 * 36 * 20, dtype=np.int16).reshape(40, 36, 20) % 999, "different values"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_named(small, tmp_path, kind):
    labels, text = HOSTILE[kind]
    folders = pairs_of(tmp_path)
    write(folders[0] / "1.nii.gz", labels)
    fails("prepare", *folders, "--to", tmp_path / "prepared", texts=["1.nii.gz", text])
    assert not (tmp_path / "prepared").exists()


def test_hostile_folders(small, tmp_path):
    folders = pairs_of(tmp_path)
    (tmp_path / "none").mkdir()
    fails("prepare", folders[0], tmp_path / "none", texts=[f"{tmp_path / 'none'} has no image"])
    fails("prepare", folders[0], tmp_path / "missing", texts=["missing is not a folder"])
    fails("prepare", *folders, "--to", tmp_path, texts=[f"{tmp_path} exists and is not empty"])
    fails("prepare", *folders, "--names", tmp_path / "no.txt", texts=["no.txt cannot be read"])
    (folders[1] / "1.nii.gz").rename(folders[1] / "9.nii.gz")
    fails("prepare", *folders, texts=["share only some of their names. 1 is in", "fixed only"])
    (folders[1] / "9.nii.gz").unlink()
    fails("prepare", *folders, texts=[f"{folders[0]} has 2 images, but {folders[1]} has 1. 1 is in"])
    (folders[0] / "1.nii.gz").unlink()
    fails("prepare", *folders, texts=["there is only one pair"])


def test_a_prepared_folder_that_was_damaged(small, tmp_path):
    prepared = tmp_path / "prepared"
    works("prepare", *pairs_of(tmp_path), "--to", prepared)
    profile = profile_for(prepared, "quick")
    image, described = prepared / "imagesTr" / "PairDiff-own_0001_0001.nii.gz", prepared / "PairDiff-own_dataset.json"
    write(image, block((40, 36, 20), value=9))
    with pytest.raises(DataError, match="0001_0001.nii.gz holds a label"):
        load_pairs("own", "train", profile, data=prepared)
    write(image, block((40, 36, 22)))
    with pytest.raises(DataError, match="0001_0001.nii.gz has shape"):
        load_pairs("own", "train", profile, data=prepared)
    with pytest.raises(DataError, match="no pair of the split 'test'"):
        load_pairs("own", "test", profile, data=prepared)
    described.write_text(described.read_text().replace("label_values", "values"))
    with pytest.raises(DataError, match="damaged or incomplete .*label_values"):
        read_own(prepared)
    described.unlink()
    why = [f"{prepared} (from data) holds none of PairDiff-own_dataset.json. Prepare", "pairdiff prepare FIXED MOVING"]
    fails("run", "vqae", "--dataset", "own", "--data", prepared, texts=why)
    fails("run", "vqae", "--dataset", "own", texts=["No folder with this data set is named", *why[1:]])
