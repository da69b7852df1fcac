"""Checkpoints that cannot run code, cannot be half written, and say where they come from.

A checkpoint is one safetensors file. Its header holds, beside the shapes, the description as JSON
(configuration, step, provenance) and a SHA-256 over both, so weights and description cannot drift apart. It
is written under another name and then renamed: a reader sees the old file or the new one, never a piece of
one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

import pairdiff_core

FORMAT = "pairdiff-1"
UNFINISHED = ".writing"  # how the names of files end that are being written
AGAIN = "Delete the file and train again, or copy it again from where it came."


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the file and says what to do."""


def save_checkpoint(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and their description into one safetensors file; an old one is replaced at the very end.

    Args:
        path: file to write; its folder is made.
        tensors: what ``module.state_dict()`` gives, on any device.
        metadata: anything that JSON can hold.

    Raises:
        CheckpointError: if ``metadata`` does not fit into JSON, or the file cannot be written. What was there
            before is then still there.
    """
    path = Path(path)
    try:
        description = json.dumps(dict(metadata), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was not written: its description does not fit into JSON ({error})."
        ) from error
    # a copy each: safetensors refuses tensors that share memory, as tied weights do
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # one entry: safetensors writes several in no fixed order, and the same contents should give the same file
    header = {FORMAT: json.dumps({"sha256": _digest(stored, description), "description": description})}
    write_file(path, save(stored, metadata=header))


def write_file(path: Path, content: bytes) -> None:
    """Write a file aside, onto the disk, and then rename it: at every moment there is the old one or the new one.

    Raises:
        CheckpointError: if it cannot be written; what was there before is then still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED, delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # temporary files are private, results are not
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error}). Is the disk full or the folder read-only?"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)  # gone already if it was renamed


def load_checkpoint(
    path: str | Path, expected_shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and description of a checkpoint.

    Args:
        path: a file that :func:`save_checkpoint` wrote.
        expected_shapes: if given, exactly these tensors of these shapes must be in it.

    Raises:
        CheckpointError: if the file is missing, is no checkpoint, is damaged, or holds other tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist. Run the stage that trains it, or give another run folder."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}). {AGAIN}") from error
    other = next((key for key in header if key.startswith("pairdiff-") and key != FORMAT), None)
    if other is not None:
        raise CheckpointError(
            f"{path} was written by another version of this program (format {other}, this one reads {FORMAT}). "
            "Use that version, or another run folder."
        )
    if FORMAT not in header:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of this program. {AGAIN}")
    try:
        entry = json.loads(header[FORMAT])
        intact = entry["sha256"] == _digest(tensors, entry["description"])
    except (ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged: its contents do not match the SHA-256 in it. {AGAIN}")
    if expected_shapes is not None:
        _compare_shapes(
            path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected_shapes
        )
    return tensors, json.loads(entry["description"])


def load_into(module: nn.Module, path: str | Path, prefix: str = "") -> dict[str, Any]:
    """Load the tensors whose names begin with ``prefix`` into a module; returns the description.

    Raises:
        CheckpointError: as :func:`load_checkpoint`, and if the tensors are not exactly those of the module;
            the module then keeps what it had.
    """
    tensors, metadata = load_checkpoint(path)
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _compare_shapes(Path(path), {name: tuple(tensor.shape) for name, tensor in mine.items()}, expected)
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in mine.items()})
    return metadata


def _compare_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError for the first tensor that is missing, has another shape, or is not expected."""
    advice = "It was written with other settings: use the profile it was trained with, or a new run folder."
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{path} lacks the tensor {name} of shape {tuple(shape)}. {advice}")
        if found[name] != tuple(shape):
            raise CheckpointError(
                f"{path}: the tensor {name} has shape {found[name]}, expected {tuple(shape)}. {advice}"
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{path} holds the tensor {name}, which is not expected. {advice}")


def _digest(tensors: Mapping[str, torch.Tensor], description: str) -> str:
    """SHA-256 over description, names, types, shapes and bytes."""
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------
# Provenance


def data_hashes(paths: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of every file; the keys are the paths below the folder that all of them share."""
    files = [Path(path).resolve() for path in paths]
    if not files:
        return {}
    shared = os.path.commonpath([file.parent for file in files])
    return {file.relative_to(shared).as_posix(): _file_hash(file) for file in sorted(files)}


def folder_hash(folder: str | Path, pattern: str = "**/*") -> str:
    """One SHA-256 over the names and contents of all files below a folder that match a glob pattern."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.glob(pattern) if file.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {_file_hash(file)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(
    profile_name: str, seed: int, device: str | torch.device, data: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Where a result comes from, as a dictionary for JSON: all but the wall time, which the caller knows.

    Args:
        profile_name: name of the profile.
        seed: seed of the run.
        device: torch device that computed.
        data: hashes of the data read, from :func:`data_hashes` or ``{"name": folder_hash(...)}``.
    """
    return {
        "commit": _commit(),
        "profile": profile_name,
        "seed": seed,
        "versions": {
            "pairdiff": pairdiff_core.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # with the build, which the package's own version may leave out
            **{package: version(package) for package in ("monai", "numpy")},
        },
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "data": dict(data or {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Commit of the code that runs, "+changes" behind it if that differs; "unknown" outside a repository."""
    package = Path(pairdiff_core.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):  # installed somewhere inside another project's repository
            return "unknown"
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    """What a person calls the device, such as "NVIDIA H200" or "AMD EPYC (AVX2)".

    A processor is named with the instructions that PyTorch uses of it: makers give one name to very different ones.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
