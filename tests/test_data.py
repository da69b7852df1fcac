"""load_pairs, which loads all data sets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pairdiff_core.data import DATASETS, default_dataset, load_pairs
from pairdiff_core.errors import DataError
from pairdiff_core.profiles import Profile, get_profile

SMALL = replace(get_profile("quick"), spatial=(40, 48), max_pairs=6, phantom_subjects=4)
DETAILED = replace(SMALL, spatial=(80, 96), num_labels=25, max_pairs=1000)
LUNGS = replace(get_profile("quick", 3), spatial=(64, 52, 64), max_pairs=1000, phantom_subjects=3)
DATASETS_2D, DATASETS_3D = ([name for name, dims in DATASETS.items() if dims == d] for d in (2, 3))
HELD_OUT = ("train", "validation")  # the splits that every data set has


@pytest.mark.parametrize("profile", [SMALL, DETAILED])
@pytest.mark.parametrize("split", HELD_OUT)
@pytest.mark.parametrize("dataset", DATASETS_2D)
def test_every_data_set_at_the_size_of_the_profile(
    dataset: str, split: str, profile: Profile, oasis_folder: Path
) -> None:
    pairs = load_pairs(dataset, split, profile, data=oasis_folder)
    assert pairs.spatial == profile.spatial
    assert pairs.num_labels == profile.num_labels
    assert 2 <= len(pairs) <= profile.max_pairs
    assert pairs.label_colours is not None and len(pairs.label_colours) == profile.num_labels
    assert (pairs.displacement is not None) == (pairs.landmarks is not None) == (dataset == "phantom2d")


@pytest.mark.parametrize("dataset", DATASETS_2D)
def test_no_subject_is_in_both_splits(dataset: str, oasis_folder: Path) -> None:
    train, validation = (
        {name.split("_S")[0] for pair in pairs.names for name in pair.split("~")}
        for pairs in (load_pairs(dataset, split, DETAILED, data=oasis_folder) for split in HELD_OUT)
    )
    assert len(train) >= 3 and len(validation) >= 2
    assert not train & validation


@pytest.mark.parametrize("dataset", DATASETS_3D)
def test_lungs(dataset: str, lung_folder: Path) -> None:
    train, validation = (load_pairs(dataset, split, LUNGS, data=lung_folder) for split in HELD_OUT)
    for pairs in (train, validation):
        assert pairs.spatial == LUNGS.spatial and pairs.num_labels == 2 and len(pairs) == 3
        assert pairs.spacing == (4.0, 4.0, 4.0)
        assert pairs.landmarks is not None and (pairs.displacement is not None) == (dataset == "phantom3d")
        assert all(len({part[:-2] for part in name.split("~")}) == 1 for name in pairs.names)  # one person
    assert not set(train.names) & set(validation.names)
    assert len(load_pairs(dataset, "train", replace(LUNGS, max_pairs=2), data=lung_folder)) == 2


def test_the_official_test_cases_of_the_lungs(lung_folder: Path) -> None:
    assert load_pairs("lung250m", "test", LUNGS, data=lung_folder).names == ("case_104_1~case_104_2",)


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "lung250m"])
def test_only_lung250m_has_a_test_split_and_cases(dataset: str) -> None:
    with pytest.raises(DataError, match=f"{dataset} has no split 'test'; choose one of train, validation$"):
        load_pairs(dataset, "test", SMALL)
    with pytest.raises(DataError, match=f"{dataset} has no cases.*lung250m"):
        load_pairs(dataset, "train", SMALL, cases=["1"])


def test_some_cases_of_the_lungs(lung_folder: Path) -> None:
    one = replace(LUNGS, max_pairs=1)
    pairs = load_pairs("lung250m", "validation", one, data=lung_folder, cases=["114", "2"])
    assert pairs.names == ("case_002_1~case_002_2", "case_114_1~case_114_2")
    with pytest.raises(DataError, match="case_032; there are case_002, case_054, case_114"):
        load_pairs("lung250m", "validation", one, data=lung_folder, cases=["32"])


@pytest.mark.parametrize("dataset", DATASETS_3D)
@pytest.mark.parametrize(
    "change, message", [({"num_labels": 5}, "2 labels"), ({"spatial": (80, 96)}, r"on \(80, 96\)")]
)
def test_what_the_lungs_do_not_have(dataset: str, change: dict, message: str, lung_folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_pairs(dataset, "train", replace(LUNGS, **change), data=lung_folder)


@pytest.mark.parametrize("dims, profile", [(2, DETAILED), (3, LUNGS)])
def test_phantom_and_real_data_agree_on_labels(
    dims: int, profile: Profile, oasis_folder: Path, lung_folder: Path
) -> None:
    folder = oasis_folder if dims == 2 else lung_folder
    names = [name for name, d in DATASETS.items() if d == dims]
    phantom, real = (load_pairs(name, "validation", profile, data=folder) for name in names)
    assert (phantom.label_names, phantom.label_colours) == (real.label_names, real.label_colours)


def test_default_dataset_3d(
    lung_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_data_set: None
) -> None:
    assert default_dataset(3) == "phantom3d"
    (tmp_path / "slices only").mkdir()
    monkeypatch.setenv("PAIRDIFF_DATA", str(tmp_path / "slices only"))
    assert default_dataset(3) == "phantom3d"
    for place in (tmp_path, lung_folder):
        monkeypatch.setenv("PAIRDIFF_DATA", str(place))
        assert (default_dataset(3), default_dataset(2)) == ("lung250m", "phantom2d")
    assert len(load_pairs("lung250m", "train", LUNGS)) == 3
    monkeypatch.setenv("PAIRDIFF_DATA", str(tmp_path / "mistyped"))
    with pytest.raises(DataError, match="mistyped.*PAIRDIFF_DATA"):
        load_pairs(default_dataset(3), "train", LUNGS)


def test_default_dataset(
    oasis_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_data_set: None
) -> None:
    assert default_dataset() == "phantom2d"
    monkeypatch.setenv("PAIRDIFF_DATA", str(tmp_path))  # exists, but holds no slices: lungs only, say
    assert default_dataset() == "phantom2d"
    shutil.copytree(oasis_folder, tmp_path / "brain2d")
    assert default_dataset() == "oasis2d"
    assert len(load_pairs("oasis2d", "validation", SMALL)) > 0
    monkeypatch.delenv("PAIRDIFF_DATA")
    monkeypatch.setenv("PAIRDIFF_OASIS2D", str(oasis_folder))
    assert default_dataset() == "oasis2d"


@pytest.mark.parametrize("variable", ["PAIRDIFF_DATA", "PAIRDIFF_OASIS2D"])
def test_a_mistyped_data_folder_is_reported_and_not_replaced_by_phantoms(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_data_set: None
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "mistyped"))
    with pytest.raises(DataError, match=f"mistyped.*{variable}"):
        load_pairs(default_dataset(), "train", SMALL)


def test_held_out_phantoms_are_a_quarter_of_the_subjects() -> None:
    names = load_pairs("phantom2d", "validation", replace(SMALL, max_pairs=1000, phantom_subjects=16)).names
    assert len({name for pair in names for name in pair.split("~")}) == 4
    assert len(names) == 4 * 3


@pytest.mark.parametrize("dataset", DATASETS_2D)
def test_the_seed_decides(dataset: str, oasis_folder: Path) -> None:
    first, again, other = (load_pairs(dataset, "train", SMALL, data=oasis_folder, seed=seed) for seed in (3, 3, 4))
    assert first.names == again.names
    assert torch.equal(first.labels, again.labels)
    assert first.names != other.names


def test_unknown_names() -> None:
    with pytest.raises(DataError, match="phantom2d, oasis2d"):
        load_pairs("phantom", "train", SMALL)
    with pytest.raises(DataError, match="train, validation, test"):
        load_pairs("lung250m", "official_test", LUNGS)
    with pytest.raises(DataError, match="phantom2d has 5 or 25 labels .* not 7"):
        load_pairs("phantom2d", "train", replace(SMALL, num_labels=7))
