"""A run that is interrupted anywhere continues and ends with the same bits."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from small_run import small_run

from pairdiff_core import pipeline
from pairdiff_core.errors import CheckpointError
from pairdiff_core.storage import Saving, load_checkpoint, write_json

NEW = multiprocessing.get_context("forkserver")  # a process that starts with everything imported
NEW.set_forkserver_preload(["small_run", "pairdiff_core.pipeline", "monai", "lightning_fabric"])


def killed(function, *arguments):
    """Call a function in another process; returns whether that was killed before it ended."""
    process = NEW.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def toy_stages(folder):
    """Tokens in three shards and a denoiser of four steps; progress is saved after every step."""
    settings = replace(small_run(folder).profile.denoiser, layers=0, steps=4, batch=2)
    run = small_run(folder, saving=Saving(every_minutes=0), denoiser=settings)
    tokens = pipeline.load_or_make(run, "tokens", {}, lambda shard: torch.full((1, 6, 10), shard), shards=3)
    pipeline.train_denoiser(run, tokens)


def killed_toy_stages(folder, count):
    """The same, killed right before the ``count``-th time that a file is flushed to disk or moved to its place."""
    calls = iter(range(1, 10_000))

    def watched(function):
        def call(*arguments):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    os.fsync, os.replace = watched(os.fsync), watched(os.replace)
    toy_stages(folder)


def same_results(one, other):
    """Assert that all stages have the same tensors, histories and settings; dates and durations may differ."""
    names = {path.name for path in one.glob("*.safetensors")}
    assert names == {path.name for path in other.glob("*.safetensors")} and names
    for name in names:
        (tensors, made_by), (tensors_other, made_by_other) = (load_checkpoint(folder / name) for folder in (one, other))
        assert tensors.keys() == tensors_other.keys()
        assert all(torch.equal(tensors[key], tensors_other[key]) for key in tensors), name
        assert made_by["config"] == made_by_other["config"]
        assert made_by.get("history") == made_by_other.get("history")


def test_killed_at_every_point_of_every_write(tmp_path):
    """Each time, existing files can be loaded, and the next start ends with the bits of an undisturbed run."""
    toy_stages(tmp_path / "calm")
    for count in range(1, 100):
        folder = tmp_path / str(count)
        if not killed(killed_toy_stages, folder, count):
            break
        for path in (*folder.glob("*.safetensors"), *folder.glob("*.shards/[0-9]*")):
            load_checkpoint(path)
        toy_stages(folder)
        same_results(tmp_path / "calm", folder)
        assert not [*folder.rglob("*.writing"), *folder.glob("*.progress"), *folder.glob("*.shards")]
        shutil.rmtree(folder)
    assert count == 19, "nine files are written, each flushed and then put in its place"


def all_stages(folder, threads, checkpoints=None, seconds=None):
    """Run everything, saved after every step; it is killed ``seconds`` after that number of checkpoints exists."""
    torch.set_num_threads(threads)

    def kill():
        while len([*folder.glob("*.safetensors")]) < checkpoints:
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    if checkpoints is not None:
        threading.Thread(target=kill, daemon=True).start()
    write_json(folder / "metrics.json", pipeline.measure(small_run(folder, saving=Saving(every_minutes=0))))


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if "seconds" not in key and key != "date"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_killed_in_every_part_it_ends_with_the_same_result_file(tmp_path, trained, measured):
    """Killed in the first training, between shards and short trainings, in the last trainings, and in measuring."""
    calm, folder, draw = trained[0].path, tmp_path / "killed", random.Random(0)
    for checkpoints in (0, 1, 5, 8):
        assert killed(all_stages, folder, torch.get_num_threads(), checkpoints, draw.uniform(0, 0.4))
    assert not killed(all_stages, folder, torch.get_num_threads())
    same_results(calm, folder)
    write_json(tmp_path / "calm.json", measured)
    results = [json.loads(path.read_text()) for path in (tmp_path / "calm.json", folder / "metrics.json")]
    assert without_times(results[0]) == without_times(results[1])


def hold(folder, started):
    with small_run(folder).working():
        started.set()
        time.sleep(60)


def test_two_runs_in_one_folder_exclude_each_other(tmp_path):
    started = NEW.Event()
    other = NEW.Process(target=hold, args=(tmp_path, started))
    other.start()
    assert started.wait(60)
    with pytest.raises(CheckpointError, match="is in use: another process works in it"):
        toy_stages(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    other.kill()
    other.join()
    toy_stages(tmp_path)  # the killed process left nothing locked


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """Every write from the eighth on fails; once there is space again, the run continues."""
    toy_stages(tmp_path / "calm")
    calls, fsync = iter(range(1, 10_000)), os.fsync

    def full(file):
        if next(calls) >= 8:
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"could not be written .*No space left"):
            toy_stages(tmp_path / "full")
    assert (tmp_path / "full" / "denoiser.progress").exists(), "the last state that there was room for"
    toy_stages(tmp_path / "full")
    same_results(tmp_path / "calm", tmp_path / "full")
