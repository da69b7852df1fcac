"""Checkpoints that cannot run code, are never half written, and record how they were made.

A checkpoint is one safetensors file. Its header holds the description as JSON (settings, history, provenance) and a
SHA-256 over description and tensors, so a mismatch is detected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pairdiff_core.errors import CheckpointError
from pairdiff_core.storage.files import write_file

FORMAT = "pairdiff-2"
AGAIN = "Delete the file and train again, or copy it again from its source."


def save_checkpoint(path: str | Path, tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and their description into one safetensors file.

    Args:
        path: file to write; its folder is created.
        tensors: what ``module.state_dict()`` returns, on any device.
        description: anything that JSON can hold.

    Raises:
        CheckpointError: if it cannot be written; an existing file is then kept.
    """
    # a copy each: safetensors refuses tensors that share memory, as tied weights do
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(dict(description), sort_keys=True)
    # one entry: safetensors writes several in no fixed order, and the same contents should give the same file
    header = {FORMAT: json.dumps({"sha256": _digest(stored, text), "description": text})}
    write_file(Path(path), save(stored, metadata=header))


def load_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and description of a file that :func:`save_checkpoint` wrote.

    Raises:
        CheckpointError: if the file is missing, not a checkpoint, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Run the stage that trains it, or give another run folder.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}). {AGAIN}") from error
    if FORMAT not in header:
        raise CheckpointError(f"{path} is not a checkpoint of this version ({FORMAT}). {AGAIN}")
    try:
        entry = json.loads(header[FORMAT])
        intact = entry["sha256"] == _digest(tensors, entry["description"])
    except (ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged: its contents do not match the SHA-256 in it. {AGAIN}")
    return tensors, json.loads(entry["description"])


def check_config(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a file was made with the settings that are requested now.

    Raises:
        CheckpointError: if a setting differs; the message names it.
    """
    was, now = json.loads(json.dumps([was, now]))
    different = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
    if different:
        raise CheckpointError(
            f"{path} was made with other settings ({', '.join(different)} differ). It was not changed. Choose "
            "another run folder (--run; in Python, PAIRDIFF_RUNS), or delete the file to make it again."
        )


def fingerprint(*tensors: torch.Tensor) -> str:
    """A short hash of the contents of tensors: the first 16 hexadecimal digits of the SHA-256."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _digest(tensors: Mapping[str, torch.Tensor], description: str) -> str:
    """SHA-256 over description, names, types, shapes and bytes."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
