"""Run folders: made once, loaded after, never mixed, never lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import small_run
from torch import nn

from pairdiff_core import runs
from pairdiff_core.checkpoints import CheckpointError, load_checkpoint
from pairdiff_core.data import DataError
from pairdiff_core.profiles import get_profile
from pairdiff_core.resume import Paused
from pairdiff_core.runs import Run, load_or_make, load_or_train, open_run


def line(run, config=None, trained=None):
    """Load or train a linear layer; ``trained`` collects the calls of the training function."""

    def fit(model, bookmark):
        if trained is not None:
            trained.append(True)
        with torch.no_grad():
            model.weight.add_(1)
        return [{"step": 1, "loss": 0.5}]

    return load_or_train(run, "line", config or {"steps": 1, "sizes": (1, 2)}, lambda: nn.Linear(2, 1), fit)


def test_the_default_folder_tells_what_is_in_it(monkeypatch):
    monkeypatch.delenv("PAIRDIFF_RUNS", raising=False)
    assert Run("phantom2d", get_profile("quick"), seed=3).path == Path("runs/phantom2d-quick-seed3")
    monkeypatch.setenv("PAIRDIFF_RUNS", "/elsewhere")
    assert Run("phantom2d", get_profile("quick")).path == Path("/elsewhere/phantom2d-quick-seed0")
    assert Run("phantom2d", get_profile("quick"), folder="mine").path == Path("mine")


def test_trained_once_then_loaded(tmp_path):
    run, trained = small_run(tmp_path), []
    first, second = line(run, trained=trained), line(run, trained=trained)
    assert trained == [True]
    assert (first.loaded, second.loaded) == (False, True)
    assert torch.equal(first.model.weight, second.model.weight)
    assert first.history == second.history == [{"step": 1, "loss": 0.5}]
    assert first.fingerprint == second.fingerprint and second.seconds == first.seconds
    assert not second.model.training


def test_other_settings_are_refused_and_the_file_stays(tmp_path):
    run = small_run(tmp_path)
    line(run)
    before = (tmp_path / "line.safetensors").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"line\.safetensors was made with other settings \(steps differ"
    ):
        line(run, {"steps": 2, "sizes": (1, 2)})
    assert (tmp_path / "line.safetensors").read_bytes() == before


def test_a_setting_that_was_added_later_and_is_unset_changes_nothing(tmp_path):
    run, trained = small_run(tmp_path), []
    line(run, {"numbers": {"steps": 1}}, trained)
    line(run, {"numbers": {"steps": 1, "patches": None}}, trained)
    assert trained == [True]


def test_mixed_precision_is_the_stage_s_own_and_part_of_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "fast_in_bfloat16", lambda device: True)
    run = small_run(tmp_path)
    mixed = replace(run, profile=replace(run.profile, mixed_precision=("line",)))
    for fabric, expected in (
        (mixed.fabric("line"), torch.bfloat16),
        (mixed.fabric("other"), torch.float32),
        (run.fabric("line"), torch.float32),
    ):
        with fabric.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    line(run)
    with pytest.raises(CheckpointError, match=r"bfloat16 differ"):
        line(mixed)


def test_what_was_made_in_bfloat16_is_good_where_that_is_slow(tmp_path, monkeypatch):
    run = small_run(tmp_path)
    run = replace(run, profile=replace(run.profile, mixed_precision=("line", "other")))

    def made(name, fast):
        monkeypatch.setattr(runs, "fast_in_bfloat16", lambda device: fast)
        stage = load_or_train(run, name, {}, lambda: nn.Linear(2, 1), lambda model, bookmark: [])
        return stage.loaded, load_checkpoint(tmp_path / f"{name}.safetensors")[1]["provenance"]["precision"]

    assert made("line", fast=True) == (False, "bf16-mixed")
    assert made("line", fast=False) == (True, "bf16-mixed"), "not made again"
    assert made("other", fast=False) == (False, "32-true")


def test_a_corrupted_checkpoint_is_named_and_stays(tmp_path):
    run = small_run(tmp_path)
    line(run)
    file = tmp_path / "line.safetensors"
    broken = bytearray(file.read_bytes())
    broken[-3] ^= 0xFF
    file.write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"line\.safetensors is damaged"):
        line(run)
    assert file.read_bytes() == bytes(broken)


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    run = small_run(tmp_path)
    line(run)
    with pytest.raises(CheckpointError, match=r"the tensor weight has shape \(1, 2\), expected \(1, 3\)"):
        load_or_train(run, "line", {}, lambda: nn.Linear(3, 1), lambda model, bookmark: [])


def test_a_failed_training_leaves_nothing_behind(tmp_path):
    def fail(model, bookmark):
        raise FloatingPointError("not finite")

    with pytest.raises(FloatingPointError):
        load_or_train(small_run(tmp_path), "line", {}, lambda: nn.Linear(2, 1), fail)
    assert not list(tmp_path.glob("line*"))


def test_tensors_are_made_once(tmp_path):
    run, made = small_run(tmp_path), []

    def make(piece):
        made.append(piece)
        return torch.arange(5) + 5 * piece

    first, second = (load_or_make(run, "numbers", {"n": 5}, make, pieces=2) for _ in range(2))
    assert made == [0, 1] and torch.equal(first, second) and torch.equal(first, torch.arange(10))
    with pytest.raises(CheckpointError, match="n differ"):
        load_or_make(run, "numbers", {"n": 6}, make)


def test_pieces_that_are_made_are_not_made_again(tmp_path):
    run, made = small_run(tmp_path), []

    def make(piece):
        if piece == 2 and made.count(2) == 0:
            made.append(2)
            raise KeyboardInterrupt
        made.append(piece)
        return torch.full((1,), piece)

    with pytest.raises(KeyboardInterrupt):
        load_or_make(run, "numbers", {"n": 5}, make, pieces=4)
    with pytest.raises(CheckpointError, match=r"0000 was made with other settings \(n differ"):
        load_or_make(run, "numbers", {"n": 6}, make, pieces=4)
    asked = replace(
        run, should_pause=lambda: "time is over" if made[-1] == 2 and made.count(2) == 2 else None
    )
    with pytest.raises(Paused, match="numbers: paused after a piece"):
        load_or_make(asked, "numbers", {"n": 5}, make, pieces=4)
    assert torch.equal(load_or_make(run, "numbers", {"n": 5}, make, pieces=4), torch.arange(4))
    assert made == [0, 1, 2, 2, 3]
    assert not (tmp_path / "numbers.part").exists()


def test_a_stage_depends_on_the_seed_but_not_on_what_ran_before(tmp_path):
    torch.manual_seed(123)
    first = line(small_run(tmp_path / "a"))
    torch.rand(17)
    again = line(small_run(tmp_path / "b"))
    other = line(small_run(tmp_path / "c", seed=1))
    assert torch.equal(first.model.weight, again.model.weight)
    assert not torch.equal(first.model.weight, other.model.weight)


def test_train_and_test_show_different_subjects(tmp_path):
    run = small_run(tmp_path)

    def subjects(pairs):
        return {subject for name in pairs.names for subject in name.split("~")}

    assert not subjects(run.train) & subjects(run.test)
    assert run.train.spatial == run.test.spatial == run.profile.spatial


def test_an_unknown_data_set_is_named(tmp_path):
    with pytest.raises(DataError, match="'brains'"):
        _ = replace(small_run(tmp_path), dataset="brains").train


def test_a_folder_tells_its_run(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no finished stage"):
        open_run(tmp_path)
    made = Run("phantom3d", get_profile("quick", 3), 7, tmp_path)
    line(made)
    found = open_run(tmp_path)
    assert (found.dataset, found.profile, found.seed, found.path) == ("phantom3d", made.profile, 7, tmp_path)
    line(Run("phantom4d", made.profile, 7, tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"line\.safetensors does not tell .*phantom4d"):
        open_run(tmp_path / "other")
