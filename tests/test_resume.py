"""Interrupted anywhere, by anything, a run goes on and ends with the same bits."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from small_run import small_run
from torch import nn

from pairdiff_core import checkpoints, pipeline, results
from pairdiff_core.checkpoints import CheckpointError, load_checkpoint
from pairdiff_core.resume import Bookmark, pausing
from pairdiff_core.runs import load_or_make, load_or_train

NEW = multiprocessing.get_context("forkserver")  # a process that starts with everything imported
NEW.set_forkserver_preload(["small_run", "pairdiff_core.results"])


def in_another_process(function, *arguments):
    """Its exit code; minus the number of the signal that killed it."""
    process = NEW.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def kill_at(count, names=("fsync", "replace")):
    """Kill this process right before the ``count``-th of these calls into the operating system."""
    calls = iter(range(1, 10_000))

    def watched(function):
        def call(*arguments):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    for name in names:
        setattr(os, name, watched(getattr(os, name)))


def toy_stages(folder):
    """A tensor in three pieces and a network of five steps; what is done is kept after every step."""
    run = replace(small_run(folder), save_minutes=0)
    tensor = load_or_make(run, "numbers", {}, lambda piece: torch.full((2,), piece), pieces=3)

    def fit(model, bookmark):
        return pipeline.training.fit(
            model,
            lambda step: torch.full((1, 1), step + 1.0),
            lambda module, x: {"loss": (module(x + torch.rand(1)) - tensor.sum()).square().mean()},
            steps=5,
            learning_rate=0.1,
            average=0.5,
            bookmark=bookmark,
        )

    load_or_train(run, "line", {}, lambda: nn.Linear(1, 1), fit)


def killed_toy_stages(folder, count):
    kill_at(count)
    toy_stages(folder)


def all_stages(folder, seconds=None):
    """Everything, kept after every step; killed after so many seconds."""
    torch.set_num_threads(1)
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    run = replace(small_run(folder), save_minutes=0)
    results.write_results(folder / "metrics.json", results.measure(run))


def same_results(one, other):
    """Every stage: the same tensors, histories and settings. What differs is when and how long."""
    names = {path.name for path in one.glob("*.safetensors")}
    assert names == {path.name for path in other.glob("*.safetensors")} and names
    for name in names:
        (tensors, metadata), (tensors_other, metadata_other) = (
            load_checkpoint(folder / name) for folder in (one, other)
        )
        assert tensors.keys() == tensors_other.keys()
        assert all(torch.equal(tensors[key], tensors_other[key]) for key in tensors), name
        assert metadata["config"] == metadata_other["config"]
        assert metadata.get("history") == metadata_other.get("history")


def without_times(value):
    if isinstance(value, dict):
        return {
            key: without_times(item) for key, item in value.items() if "seconds" not in key and key != "date"
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_killed_at_every_point_of_every_write(tmp_path):
    """Each time, what is there loads, and the next start ends with the bits of a run that nothing happened to."""
    toy_stages(tmp_path / "calm")
    for count in range(1, 100):
        folder = tmp_path / str(count)
        code = in_another_process(killed_toy_stages, folder, count)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        for path in (*folder.rglob("*.safetensors"), *folder.rglob("*.part"), *folder.rglob("00*")):
            if path.is_file():
                load_checkpoint(path)
        toy_stages(folder)
        same_results(tmp_path / "calm", folder)
        assert not [path for path in folder.rglob("*") if ".writing" in path.name or ".part" in path.name]
        shutil.rmtree(folder)
    assert 20 < count < 99


def test_killed_at_random_times_it_ends_with_the_same_result_file(tmp_path):
    assert in_another_process(all_stages, tmp_path / "calm") == 0
    dice = random.Random(0)
    kills = 0
    while code := in_another_process(
        all_stages, tmp_path / "killed", dice.uniform(0.2, 0.8) * (1 + kills / 20)
    ):
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 10
    same_results(tmp_path / "calm", tmp_path / "killed")
    calm, killed = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("calm", "killed"))
    assert without_times(calm) == without_times(killed)


def hold(folder, started):
    with small_run(folder).working():
        started.set()
        time.sleep(60)


def test_two_runs_in_one_folder_exclude_each_other(tmp_path):
    started = NEW.Event()
    other = NEW.Process(target=hold, args=(tmp_path, started))
    other.start()
    assert started.wait(30)
    with pytest.raises(CheckpointError, match="is in use: another process works in it"):
        toy_stages(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    other.kill()
    other.join()
    toy_stages(tmp_path)  # the killed process left nothing locked


def test_a_folder_belongs_to_one_run(tmp_path):
    toy_stages(tmp_path)
    with (
        pytest.raises(CheckpointError, match=r"holds another run \(seed 0\)"),
        small_run(tmp_path, seed=1).working(),
    ):
        pass
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"), small_run(tmp_path).working():
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run cannot be written"):
        toy_stages(tmp_path / "file" / "run")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """Every write from the tenth on fails; when there is room again, the run goes on."""
    toy_stages(tmp_path / "calm")
    calls, fsync = iter(range(1, 10_000)), os.fsync

    def full(file):
        if next(calls) >= 10:
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"could not be written .*No space left"):
            toy_stages(tmp_path / "full")
    step = Bookmark(tmp_path / "full" / "line.part", {"processes": 1}).load()[1]["step"]
    assert 1 <= step < 5
    toy_stages(tmp_path / "full")
    same_results(tmp_path / "calm", tmp_path / "full")


def test_a_part_that_is_damaged_or_of_other_settings_is_named(tmp_path):
    bookmark = partial(Bookmark, tmp_path / "x.part")
    bookmark({"steps": 3}).write({"a": torch.zeros(2)}, {})
    with pytest.raises(CheckpointError, match=r"x\.part was made with other settings \(steps differ"):
        bookmark({"steps": 4}).load()
    content = bytearray((tmp_path / "x.part").read_bytes())
    (tmp_path / "x.part").write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=r"x\.part is not a readable"):
        bookmark({"steps": 3}).load()


def test_settings_of_what_comes_after_training_may_change(tmp_path):
    def config(instance, scale):
        return {"numbers": {"instance": instance, "scale": scale}, "warped": False}

    Bookmark(tmp_path / "x.part", config(((1, 4, 40, 0.2),), 2)).write({"a": torch.zeros(2)}, {})
    assert Bookmark(tmp_path / "x.part", config(((4, 2, 60, 0.3), (2, 2, 40, 0.2)), 2)).load() is not None
    with pytest.raises(CheckpointError, match=r"other settings \(numbers differ"):
        Bookmark(tmp_path / "x.part", config(((1, 4, 40, 0.2),), 1)).load()


def test_the_seconds_before_an_interruption_count(tmp_path):
    first = Bookmark(tmp_path / "x.part", {})
    first.started -= 100
    first.write({}, {})
    second = Bookmark(tmp_path / "x.part", {})
    second.load()
    assert 100 <= second.seconds < 110


def test_signals_and_time_ask_for_a_pause():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with pausing() as reason:
            assert reason() is None
            os.kill(os.getpid(), number)
            assert reason() == f"{signal.Signals(number).name} came"
            assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before, (
                "a second one kills"
            )
    with pausing(minutes=0) as reason:
        assert reason() == "0 minutes are over"
    with pausing(minutes=5) as reason:
        assert reason() is None
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
