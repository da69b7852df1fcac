"""Checkpoints: what is written comes back, and nothing damaged, half written or of another shape gets in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pairdiff_core
from pairdiff_core import checkpoints
from pairdiff_core.checkpoints import CheckpointError, load_checkpoint, load_into, save_checkpoint

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "tokens": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "nothing": torch.zeros(0, 4),
}
METADATA = {"step": 7, "config": {"channels": [8, 16], "name": "quick"}, "rate": 0.1, "note": "häuser"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "vqae.safetensors"
    save_checkpoint(path, TENSORS, METADATA)
    return path


def test_what_is_written_comes_back(checkpoint: Path) -> None:
    tensors, metadata = load_checkpoint(checkpoint)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [path.name for path in checkpoint.parent.iterdir()] == [
        "vqae.safetensors"
    ]  # no temporary file is left


def test_tied_sliced_and_transposed_tensors(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    save_checkpoint(tmp_path / "a", {"one": whole, "two": whole, "part": whole[:, 1], "turned": whole.T}, {})
    tensors, _ = load_checkpoint(tmp_path / "a")
    assert torch.equal(tensors["two"], whole)
    assert torch.equal(tensors["part"], whole[:, 1])
    assert torch.equal(tensors["turned"], whole.T)


def test_the_same_contents_give_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "again", TENSORS, dict(reversed(METADATA.items())))
    assert load_checkpoint(tmp_path / "again")[1] == METADATA
    assert (tmp_path / "again").read_bytes() == checkpoint.read_bytes()


def test_load_into_a_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / "models"
    both = {**one.state_dict(prefix="first."), **two.state_dict(prefix="second.")}
    save_checkpoint(path, both, {"step": 1})
    fresh = nn.Linear(3, 2)
    assert load_into(fresh, path, prefix="second.") == {"step": 1}
    assert torch.equal(fresh.weight, two.weight)
    save_checkpoint(path, one.state_dict(), {"step": 2})
    assert load_into(fresh, path) == {"step": 2}
    assert torch.equal(fresh.weight, one.weight)


def test_expected_shapes(checkpoint: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    load_checkpoint(checkpoint, shapes)
    with pytest.raises(
        CheckpointError, match=r"vqae.safetensors.*weight has shape \(2, 3\), expected \(4, 3\)"
    ):
        load_checkpoint(checkpoint, {**shapes, "weight": (4, 3)})
    with pytest.raises(CheckpointError, match="vqae.safetensors.*lacks the tensor bias"):
        load_checkpoint(checkpoint, {**shapes, "bias": (2,)})
    with pytest.raises(CheckpointError, match="vqae.safetensors.*holds the tensor mask"):
        load_checkpoint(checkpoint, {name: shape for name, shape in shapes.items() if name != "mask"})


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(3, 4), r"weight has shape \(2, 3\), expected \(4, 3\)"),
        (nn.Linear(3, 2, bias=False), "holds the tensor bias"),
        (nn.Sequential(nn.Linear(3, 2)), "lacks the tensor 0.weight"),
    ],
)
def test_a_checkpoint_of_another_shape(tmp_path: Path, module: nn.Module, message: str) -> None:
    path = tmp_path / "registration.safetensors"
    save_checkpoint(path, nn.Linear(3, 2).state_dict(), {})
    file, before = path.read_bytes(), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"registration.safetensors.*{message}.*profile"):
        load_into(module, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert path.read_bytes() == file


def spoiled(checkpoint: Path, data: bytes) -> None:
    """Loading ``data`` in place of the checkpoint fails with an error that names the file; the file stays."""
    checkpoint.write_bytes(data)
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    for load in (lambda: load_checkpoint(checkpoint), lambda: load_into(module, checkpoint)):
        with pytest.raises(CheckpointError, match="vqae.safetensors.*train again"):
            load()
    assert checkpoint.read_bytes() == data
    assert torch.equal(module.weight, before)


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
    """Same bytes and sizes, but the tensors would end up in each other's place."""
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
    with pytest.raises(CheckpointError, match="vqae.safetensors was not written.*JSON"):
        save_checkpoint(checkpoint, TENSORS, {"weights": torch.zeros(2)})
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint(
    checkpoint: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# ----------------------------------------------------------------------------------------- provenance


def test_data_hashes(tmp_path: Path) -> None:
    for name, text in (("a/slice", "one"), ("b/slice", "two")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    expected = {
        name: hashlib.sha256(text.encode()).hexdigest()
        for name, text in (("a/slice", "one"), ("b/slice", "two"))
    }
    assert checkpoints.data_hashes([tmp_path / "b/slice", tmp_path / "a/slice"]) == expected
    assert checkpoints.data_hashes([tmp_path / "a/slice"]) == {"slice": expected["a/slice"]}
    assert checkpoints.data_hashes([]) == {}


def test_folder_hash_sees_contents_and_names_but_not_the_place(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "slice.txt").write_text("one")
    (folder / "notes.md").write_text("notes")
    first = checkpoints.folder_hash(folder)
    assert checkpoints.folder_hash(Path(shutil.copytree(folder, tmp_path / "copy"))) == first
    only_slices = checkpoints.folder_hash(folder, "**/*.txt")
    (folder / "notes.md").write_text("other notes")
    assert checkpoints.folder_hash(folder) != first
    assert checkpoints.folder_hash(folder, "**/*.txt") == only_slices
    (folder / "a" / "slice.txt").rename(folder / "a" / "other.txt")
    assert checkpoints.folder_hash(folder, "**/*.txt") != only_slices


def test_provenance_says_what_ran() -> None:
    record = checkpoints.provenance("quick", 3, "cpu", {"brain2d": "abc"})
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
    monkeypatch.setattr(pairdiff_core, "__file__", str(package / "__init__.py"))
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(package.parent), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit() -> str:
        return checkpoints.provenance("quick", 0, "cpu")["commit"]

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
    assert checkpoints.provenance("quick", 0, "cpu")["commit"] == "unknown"
