"""Files of a run: they are read as written; damaged or incomplete files, or those of another run, are refused."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import nn

import pairdiff_core
from pairdiff_core.errors import CheckpointError
from pairdiff_core.storage import (
    Progress,
    Saving,
    fingerprint,
    load_checkpoint,
    measured_once,
    provenance,
    read_config,
    save_checkpoint,
    working_in,
    write_json,
    write_log,
)
from pairdiff_core.training import new_fabric

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "tokens": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "nothing": torch.zeros(0, 4),
}
DESCRIPTION = {"step": 7, "config": {"channels": [8, 16], "name": "quick"}, "rate": 0.1, "note": "häuser"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "vqae.safetensors"
    save_checkpoint(path, TENSORS, DESCRIPTION)
    return path


def test_what_is_written_comes_back(checkpoint: Path) -> None:
    tensors, description = load_checkpoint(checkpoint)
    assert description == DESCRIPTION
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["vqae.safetensors"]  # no temporary file is left


def test_tied_sliced_and_transposed_tensors(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    save_checkpoint(tmp_path / "a", {"one": whole, "two": whole, "part": whole[:, 1], "turned": whole.T}, {})
    tensors, _ = load_checkpoint(tmp_path / "a")
    assert torch.equal(tensors["two"], whole)
    assert torch.equal(tensors["part"], whole[:, 1])
    assert torch.equal(tensors["turned"], whole.T)


def test_the_same_contents_give_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "again", TENSORS, dict(reversed(DESCRIPTION.items())))
    assert load_checkpoint(tmp_path / "again")[1] == DESCRIPTION
    assert (tmp_path / "again").read_bytes() == checkpoint.read_bytes()


# ------------------------------------------------------------------------------------------ bad input


def spoiled(checkpoint: Path, data: bytes) -> None:
    """Loading ``data`` instead of the checkpoint fails with an error that names the file, which is kept."""
    checkpoint.write_bytes(data)
    with pytest.raises(CheckpointError, match="vqae.safetensors.*rain again"):
        load_checkpoint(checkpoint)
    assert checkpoint.read_bytes() == data


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_checkpoint(checkpoint: Path, share: float) -> None:
    data = checkpoint.read_bytes()
    spoiled(checkpoint, data[: int(share * len(data))])


def test_a_flipped_bit_in_the_weights(checkpoint: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    data[-3] ^= 1
    spoiled(checkpoint, bytes(data))


def test_a_changed_description(checkpoint: Path) -> None:
    data = checkpoint.read_bytes()
    assert b"quick" in data
    spoiled(checkpoint, data.replace(b"quick", b"paper"))


def test_swapped_names(checkpoint: Path) -> None:
    """Bytes and sizes are the same, but the tensors would be swapped."""
    save_checkpoint(checkpoint, {"a": torch.zeros(3), "b": torch.ones(3)}, {})
    data = checkpoint.read_bytes()
    spoiled(checkpoint, data.replace(b'"a"', b'"c"').replace(b'"b"', b'"a"').replace(b'"c"', b'"b"'))


@pytest.mark.parametrize("data", [b"not a checkpoint", b"\x80\x04\x95pickle", b"\xff" * 64])
def test_a_file_that_is_no_checkpoint(checkpoint: Path, data: bytes) -> None:
    spoiled(checkpoint, data)


def test_a_pickled_checkpoint_is_not_opened(checkpoint: Path) -> None:
    torch.save(TENSORS, checkpoint)
    spoiled(checkpoint, checkpoint.read_bytes())


def test_a_safetensors_file_of_another_program(checkpoint: Path) -> None:
    save_file({"weight": torch.zeros(2)}, checkpoint)
    spoiled(checkpoint, checkpoint.read_bytes())


def test_a_checkpoint_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere.safetensors does not exist. Run the stage"):
        load_checkpoint(tmp_path / "nowhere.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_description_that_is_no_json_changes_nothing(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(checkpoint, TENSORS, {"weights": torch.zeros(2)})
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint(checkpoint: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(CheckpointError, match="vqae.safetensors could not be written.*No space left"):
        save_checkpoint(checkpoint, {"weight": torch.ones(9)}, {})
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["vqae.safetensors"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(tmp_path / "run" / "vqae.safetensors", TENSORS, {})
    assert (tmp_path / "run").read_text() == "in the way"


def test_a_fingerprint_follows_the_contents() -> None:
    tensor = torch.arange(6.0)
    assert fingerprint(tensor) == fingerprint(tensor.clone()) == fingerprint(tensor.reshape(2, 3).T.T)
    assert fingerprint(tensor) != fingerprint(tensor + 1e-6)


# ----------------------------------------------------------------------------------------------- JSON


def test_json_is_rounded_and_holds_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "x.json", {"a": [1.23456789, float("nan"), (2, "b")], "c": {"d": 1e-12}})
    text = (tmp_path / "deep" / "x.json").read_text()
    assert json.loads(text) == {"a": [1.23457, None, [2, "b"]], "c": {"d": 1e-12}}


def test_json_is_whole_or_untouched(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("inf")})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_measurement_is_made_again_when_what_it_depends_on_changes(tmp_path: Path) -> None:
    results = iter(({"dice": 0.81234567}, {"dice": 0.9}, {"dice": 0.7}))

    def measure(**depends_on: object) -> dict:
        return measured_once(tmp_path / "measured" / "x.json", depends_on, lambda: next(results))

    first = measure(levels=((8, 1), (4, 1)), code="a")
    assert first == {"dice": 0.812346} == measure(levels=((8, 1), (4, 1)), code="a")
    assert measure(levels=((8, 1), (4, 2)), code="a") == {"dice": 0.9}
    assert measure(levels=((8, 1), (4, 2)), code="b") == {"dice": 0.7}


# ----------------------------------------------------------------------------------------------- progress


def test_progress_comes_back_into_what_is_there(tmp_path: Path) -> None:
    path, fabric, layer = tmp_path / "x.progress", new_fabric(), nn.Linear(2, 1)
    state = {"layer": nn.Linear(2, 1), "history": []}
    Progress(path, {}, Saving()).restore(fabric, state)
    assert state["history"] == [], "nothing is there yet"
    first = Progress(path, {"steps": (3, 4)}, Saving())
    first.started -= 100
    first.save(fabric, {"layer": layer, "history": [{"step": 20, "loss": 0.5}]})
    second = Progress(path, {"steps": (3, 4)}, Saving())
    second.restore(fabric, state)
    assert state["history"] == read_log(tmp_path, "x") == [{"step": 20, "loss": 0.5}]
    assert torch.equal(state["layer"].weight, layer.weight)
    assert 100 <= second.seconds < 110, "the seconds before the interruption count"


def test_progress_that_is_damaged_or_of_other_settings_is_named(tmp_path: Path) -> None:
    path, state = tmp_path / "x.progress", {"history": [], "value": 0}
    Progress(path, {"steps": 3}, Saving()).save(new_fabric(), {"history": [], "value": 1})
    with pytest.raises(CheckpointError, match=r"x\.progress was made with other settings \(steps differ"):
        Progress(path, {"steps": 4}, Saving()).restore(new_fabric(), state)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"x\.progress is damaged .* Delete it"):
        Progress(path, {"steps": 3}, Saving()).restore(new_fabric(), state)
    assert state["value"] == 0 and path.exists()


def test_progress_is_due_now_and_then(tmp_path: Path) -> None:
    assert Progress(tmp_path / "x", {}, Saving(every_minutes=0)).due()
    progress = Progress(tmp_path / "x", {}, Saving(every_minutes=5))
    assert not progress.due()
    progress.saved -= 301
    assert progress.due()
    progress.save(new_fabric(), {"history": []})
    assert not progress.due()


# --------------------------------------------------------------------------------------------- run folders

IDENTITY = {"dataset": "phantom2d", "profile": "quick", "seed": 0}


def enter(folder: Path, **changes: object) -> None:
    with working_in(folder, IDENTITY | changes, {"settings": {"steps": 3}}):
        pass


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    enter(tmp_path)
    assert read_config(tmp_path) == IDENTITY | {"settings": {"steps": 3}}
    with pytest.raises(CheckpointError, match=r"holds another run \(seed 0\)"):
        enter(tmp_path, seed=1)
    with working_in(tmp_path, IDENTITY, {"settings": {"steps": 4}}):  # what differs may be a later stage
        assert read_config(tmp_path)["settings"] == {"steps": 4}
    for content in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            enter(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="holds no config.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_config(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/run cannot be written"):
        enter(tmp_path / "file" / "run")


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path: Path) -> None:
    left = [tmp_path / ".vqae.progress.abc.writing", tmp_path / "tokens.shards" / ".0001.abc.writing"]
    left[1].parent.mkdir()
    for path in left:
        path.write_text("half")
    enter(tmp_path)
    assert not any(path.exists() for path in left)


def test_one_process_may_enter_its_folder_twice(tmp_path: Path) -> None:
    with working_in(tmp_path, IDENTITY, {}):
        enter(tmp_path)
        with pytest.raises(Timeout):  # the inner one has not freed it
            FileLock(tmp_path / ".lock").acquire(timeout=0)
    enter(tmp_path)
    with FileLock(tmp_path / ".lock").acquire(timeout=0) as lock:
        assert lock.is_locked, "both have left, so the folder is free"


# ---------------------------------------------------------------------------------------------------- logs


def read_log(folder: Path, stage: str) -> list[dict[str, float]]:
    with (folder / "logs" / stage / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_log_is_the_history_whatever_was_there(tmp_path: Path) -> None:
    history = [{"step": 20, "loss": 1.0}, {"step": 40, "loss": 0.5, "perplexity": 3.0}]
    write_log(tmp_path, "denoiser", history[:1])
    write_log(tmp_path, "vqae", history[:1])
    write_log(tmp_path, "vqae", history)
    assert read_log(tmp_path, "vqae") == history
    assert read_log(tmp_path, "denoiser") == history[:1]


@pytest.mark.parametrize("garbage", [b"", b"\n\n", b"step,loss\n\n1", b"\x00\xff\xfe\n\n\x80"])
def test_garbage_among_the_logs_does_not_stop_a_run(tmp_path: Path, garbage: bytes) -> None:
    for name in ("metrics.csv", "hparams.yaml", "events.out.tfevents.0", "notes"):
        (tmp_path / "logs" / "vqae").mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs" / "vqae" / name).write_bytes(garbage)
    (tmp_path / "logs" / "stray").write_bytes(garbage)
    write_log(tmp_path, "vqae", [{"step": 20, "loss": 1.0}])
    assert read_log(tmp_path, "vqae") == [{"step": 20, "loss": 1.0}]


# ---------------------------------------------------------------------------------------------- provenance


def test_provenance_says_what_ran() -> None:
    record = provenance("quick", 3, "cpu", {"brain2d": "abc"})
    assert json.loads(json.dumps(record)) == record
    assert record["profile"] == "quick" and record["seed"] == 3 and record["data"] == {"brain2d": "abc"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["pairdiff"] == pairdiff_core.__version__
    assert record["device"] and record["threads"] == torch.get_num_threads()
    assert record["date"].endswith("+00:00")


def test_provenance_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "repository" / "pairdiff_core"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setitem(provenance.__globals__, "PACKAGE", package)
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(package.parent), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit() -> str:
        return provenance("quick", 0, "cpu")["commit"]

    assert commit() == "unknown"  # no repository
    git("init", "--quiet")
    assert commit() == "unknown"  # the package is not part of this repository
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    assert commit() == git("rev-parse", "HEAD")
    (package.parent / "results.json").write_text("{}")
    assert commit() == git("rev-parse", "HEAD")  # results do not change the code
    (package / "__init__.py").write_text("changed = True")
    assert commit() == git("rev-parse", "HEAD") + "+changes"


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance("quick", 0, "cpu")["commit"] == "unknown"
