"""A run folder tells its story, and keeps telling it after interruptions."""

import csv
import json
from dataclasses import replace

import pytest
from small_run import small_run

from pairdiff_core import pipeline, run_folder
from pairdiff_core.resume import Paused
from pairdiff_core.run_folder import working_in, write_log

RUN = {"dataset": "phantom2d", "profile": "quick", "seed": 0}


def read_log(folder):
    with (folder / "log.csv").open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


def test_a_run_says_what_it_is_how_it_went_and_what_made_it(tmp_path):
    run = small_run(tmp_path)
    stage = pipeline.train_vqae(run)
    config = json.loads((tmp_path / "config.json").read_text())
    assert RUN.items() <= config.items() and config["numbers"]["vqae"]["steps"] == run.profile.vqae.steps
    rows = read_log(tmp_path)
    assert rows[0] == ("stage", "step", "name", "value")
    last = stage.history[-1]
    assert ("vqae", str(last["step"]), "loss", str(last["loss"])) in rows
    assert ("vqae", str(last["step"]), "codes used", str(last["codes used"])) in rows
    made_by = json.loads((tmp_path / "provenance.json").read_text())["vqae"]
    assert made_by["seconds"] == stage.seconds and made_by["processes"] == 1 and made_by["versions"]["torch"]


def longer(folder, should_pause=None):
    run = small_run(folder)
    profile = replace(run.profile, vqae=replace(run.profile.vqae, steps=45))
    return replace(run, profile=profile, should_pause=should_pause)


def test_the_log_of_a_paused_training_is_there_and_later_complete(tmp_path):
    asked = iter([None] * 24 + ["time is over"])
    with pytest.raises(Paused):
        pipeline.train_vqae(longer(tmp_path, lambda: next(asked)))
    before = read_log(tmp_path)
    assert {row[1] for row in before[1:]} == {"20"}
    pipeline.train_vqae(longer(tmp_path))
    assert set(before) <= set(read_log(tmp_path))
    assert {row[1] for row in read_log(tmp_path)[1:]} == {"20", "40", "45"}


def test_a_stage_that_is_trained_again_replaces_only_its_own_lines(tmp_path):
    write_log(tmp_path, "vqae", [{"step": 20, "loss": 1.0}])
    write_log(tmp_path, "denoiser", [{"step": 20, "loss": 2.0}])
    write_log(tmp_path, "vqae", [{"step": 20, "loss": 3.0}])
    assert read_log(tmp_path)[1:] == [("denoiser", "20", "loss", "2.0"), ("vqae", "20", "loss", "3.0")]


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path):
    left = tmp_path / ".vqae.part.abc.writing"
    left.write_text("half")
    with working_in(tmp_path, RUN):
        assert not left.exists()


def test_one_process_may_enter_its_folder_twice(tmp_path):
    with working_in(tmp_path, RUN), working_in(tmp_path, RUN):
        pass
    with working_in(tmp_path, RUN):
        pass


def test_events_for_tensorboard_come_once(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            written.clear()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    monkeypatch.setattr(run_folder, "SummaryWriter", Writer)
    write_log(tmp_path, "vqae", [{"step": 20, "loss": 1.0}])
    write_log(tmp_path, "vqae", [{"step": 20, "loss": 1.0}, {"step": 40, "loss": 0.5}])
    assert written == [("loss", 1.0, 20), ("loss", 0.5, 40)]
