"""load_pairs: the one way in to all data sets."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pairdiff_core.data import DATASETS, default_dataset, load_pairs
from pairdiff_core.pairs import DataError

SMALL = SimpleNamespace(spatial=(40, 48), num_labels=5, max_pairs=6, phantom_subjects=4)
DETAILED = SimpleNamespace(spatial=(80, 96), num_labels=25, max_pairs=1000, phantom_subjects=4)
LUNGS = SimpleNamespace(spatial=(64, 52, 64), num_labels=2, max_pairs=1000, phantom_subjects=3)
DATASETS_2D, DATASETS_3D = ([name for name, dims in DATASETS.items() if dims == d] for d in (2, 3))


@pytest.mark.parametrize("profile", [SMALL, DETAILED])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("dataset", DATASETS_2D)
def test_every_data_set_at_the_size_of_the_profile(
    dataset: str, split: str, profile: SimpleNamespace, oasis_folder: Path
) -> None:
    pairs = load_pairs(dataset, split, profile, data=oasis_folder)
    assert pairs.spatial == profile.spatial
    assert pairs.num_labels == profile.num_labels
    assert 2 <= len(pairs) <= profile.max_pairs
    assert pairs.label_colours is not None and len(pairs.label_colours) == profile.num_labels
    assert (pairs.displacement is not None) == (pairs.landmarks is not None) == (dataset == "phantom2d")


@pytest.mark.parametrize("dataset", DATASETS_2D)
def test_no_subject_is_in_both_splits(dataset: str, oasis_folder: Path) -> None:
    people = []
    for split in ("train", "test"):
        names = load_pairs(dataset, split, DETAILED, data=oasis_folder).names
        people.append(
            {
                name[:12].removesuffix("_S00").removesuffix("_S02")
                for pair in names
                for name in pair.split("~")
            }
        )
    assert len(people[0]) >= 3 and len(people[1]) >= 2
    assert not people[0] & people[1]


@pytest.mark.parametrize("dataset", DATASETS_3D)
def test_lungs(dataset: str, lung_folder: Path) -> None:
    train, test = (load_pairs(dataset, split, LUNGS, data=lung_folder) for split in ("train", "test"))
    for pairs in (train, test):
        assert pairs.spatial == LUNGS.spatial and pairs.num_labels == 2 and len(pairs) == 3
        assert pairs.spacing == (4.0, 4.0, 4.0)
        assert pairs.landmarks is not None and (pairs.displacement is not None) == (dataset == "phantom3d")
        assert all(len({part[:-2] for part in name.split("~")}) == 1 for name in pairs.names)  # one person
    assert not set(train.names) & set(test.names)
    few = SimpleNamespace(**{**vars(LUNGS), "max_pairs": 2})
    assert len(load_pairs(dataset, "train", few, data=lung_folder)) == 2


@pytest.mark.parametrize("dataset", DATASETS_3D)
@pytest.mark.parametrize(
    "change, message", [({"num_labels": 5}, "2 labels"), ({"spatial": (80, 96)}, r"on \(80, 96\)")]
)
def test_what_the_lungs_do_not_have(
    dataset: str, change: dict[str, object], message: str, lung_folder: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_pairs(dataset, "train", SimpleNamespace(**{**vars(LUNGS), **change}), data=lung_folder)


def test_both_lungs_agree_on_labels(lung_folder: Path) -> None:
    phantom, real = (load_pairs(dataset, "test", LUNGS, data=lung_folder) for dataset in DATASETS_3D)
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


def test_the_phantom_test_split_has_a_quarter_of_the_subjects() -> None:
    profile = SimpleNamespace(spatial=(40, 48), num_labels=5, max_pairs=1000, phantom_subjects=16)
    names = load_pairs("phantom2d", "test", profile).names
    assert len({name for pair in names for name in pair.split("~")}) == 4
    assert len(names) == 4 * 3


@pytest.mark.parametrize("dataset", DATASETS_2D)
def test_the_seed_decides(dataset: str, oasis_folder: Path) -> None:
    first, again, other = (
        load_pairs(dataset, "train", SMALL, data=oasis_folder, seed=seed) for seed in (3, 3, 4)
    )
    assert first.names == again.names
    assert torch.equal(first.labels, again.labels)
    assert first.names != other.names


def test_both_data_sets_agree_on_labels(oasis_folder: Path) -> None:
    phantom, real = (load_pairs(dataset, "test", DETAILED, data=oasis_folder) for dataset in DATASETS_2D)
    assert phantom.label_names == real.label_names
    assert phantom.label_colours == real.label_colours


def test_default_dataset(
    oasis_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_data_set: None
) -> None:
    assert default_dataset() == "phantom2d"
    monkeypatch.setenv("PAIRDIFF_DATA", str(tmp_path))  # exists, but holds no slices: lungs only, say
    assert default_dataset() == "phantom2d"
    shutil.copytree(oasis_folder, tmp_path / "brain2d")
    assert default_dataset() == "oasis2d"
    assert len(load_pairs("oasis2d", "test", SMALL)) > 0
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


def test_unknown_names() -> None:
    with pytest.raises(DataError, match="phantom2d, oasis2d"):
        load_pairs("phantom", "train", SMALL)
    with pytest.raises(DataError, match="train, test"):
        load_pairs("phantom2d", "validation", SMALL)
    with pytest.raises(DataError, match="4 spatial axes"):
        default_dataset(4)
