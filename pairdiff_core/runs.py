"""Run folders: what one data set, profile and seed have produced so far, each piece loaded or made once."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn

from pairdiff_core import data as data_sets
from pairdiff_core.checkpoints import CheckpointError, load_checkpoint, load_into, provenance, save_checkpoint
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Profile, get_profile
from pairdiff_core.training import History, best_device

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # else a line for each use of bfloat16


@dataclass(frozen=True, eq=False)
class Run:
    """A data set, a profile and a seed, and the folder that keeps what is made of them.

    Attributes:
        dataset: one of ``data.DATASETS``.
        profile: sizes, steps and weights of everything.
        seed: of everything random in the run.
        folder: where results are kept; None takes ``<dataset>-<profile>-seed<seed>`` in the folder that
            ``PAIRDIFF_RUNS`` names, else in ``runs``.
        data: folder of the real data; None looks where the environment variables say.
    """

    dataset: str
    profile: Profile
    seed: int = 0
    folder: str | Path | None = None
    data: str | Path | None = None

    @cached_property
    def path(self) -> Path:
        """The run's folder; it need not exist yet."""
        default = (
            Path(os.environ.get("PAIRDIFF_RUNS", "runs"))
            / f"{self.dataset}-{self.profile.name}-seed{self.seed}"
        )
        return Path(self.folder or default)

    def provided(self, name: str) -> Path | None:
        """The file of that stage in the provided models that PAIRDIFF_MODELS names, if it has one for this run.

        Raises:
            CheckpointError: if PAIRDIFF_MODELS names no folder.
        """
        folder = os.environ.get("PAIRDIFF_MODELS")
        if not folder:
            return None
        if not Path(folder).is_dir():
            raise CheckpointError(
                f"PAIRDIFF_MODELS is {folder!r}, which is no folder. Name the project's folder models, or unset it."
            )
        path = Path(folder) / f"{self.dataset}-{self.profile.name}" / f"{name}.safetensors"
        return path if path.exists() else None

    @cached_property
    def train(self) -> PairSet:
        """Pairs of the training subjects."""
        return data_sets.load_pairs(self.dataset, "train", self.profile, data=self.data, seed=self.seed)

    @cached_property
    def test(self) -> PairSet:
        """Pairs of subjects that no training pair shows."""
        return data_sets.load_pairs(self.dataset, "test", self.profile, data=self.data, seed=self.seed)

    def stages(self) -> dict[str, dict[str, Any]]:
        """What made each result in the run's folder: ``seconds``, commit, date, device and threads, by its name."""
        told = {}
        for path in sorted(self.path.glob("*.safetensors")):
            metadata = load_checkpoint(path)[1]
            made_by = metadata["provenance"]
            told[path.stem] = {"seconds": metadata["seconds"]} | {
                key: made_by[key] for key in ("commit", "date", "device", "threads")
            }
        return told

    def fabric(self, stage: str) -> Fabric:
        """Device and precision of "vqae", "denoiser", "synthesis" or "registration", as the profile says."""
        mixed = stage in self.profile.mixed_precision
        precision = "bf16-mixed" if mixed else "32-true"
        return Fabric(accelerator=best_device().type, devices=1, precision=precision)

    def seed_of(self, stage: str) -> int:
        """A seed for one stage, the same whether the stages before it were trained or loaded."""
        return int(digest(f"{self.seed} {stage}".encode()), 16) % 2**31

    def generator(self, stage: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A random generator seeded by :meth:`seed_of`."""
        return torch.Generator(device).manual_seed(self.seed_of(stage))


def open_run(folder: str | Path, data: str | Path | None = None) -> Run:
    """The run that a folder belongs to, as the results in it tell: a run folder, or one of the provided models.

    Args:
        folder: holds at least one finished stage.
        data: folder of the real data; None looks where the environment variables say.

    Raises:
        CheckpointError: if there is no such folder, nothing in it, or what this version does not know.
    """
    folder = Path(folder)
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        what = "holds no finished stage" if folder.is_dir() else "is no folder"
        raise CheckpointError(f"{folder} {what}. Give a run folder, or the folder of a provided model.")
    metadata = load_checkpoint(found[0])[1]
    try:
        dataset, made_by = metadata["dataset"], metadata["provenance"]
        profile = get_profile(made_by["profile"], data_sets.DATASETS[dataset])
        return Run(dataset, profile, made_by["seed"], folder, data)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{found[0]} does not tell data set, profile and seed ({error}).") from error


class Stage(NamedTuple):
    """A trained model and how it came to be."""

    model: nn.Module
    history: History
    seconds: float  # of training
    loaded: bool  # found in the run folder, not trained just now
    fingerprint: str  # of the weights


def load_or_train(
    run: Run,
    name: str,
    config: Mapping[str, Any],
    make: Callable[[], nn.Module],
    fit: Callable[[nn.Module], History],
) -> Stage:
    """The model of the checkpoint ``name`` in the run folder, or else the provided one (:meth:`Run.provided`).

    If there is neither, it is trained and saved there. A provided model may come from other data than the run's, so
    that a line is printed which says so.

    Args:
        config: everything that the result depends on, JSON-able. A checkpoint made with another is refused.
        make: builds the untrained model; random initialisation is seeded by the run.
        fit: trains it in place and returns the history.

    Raises:
        CheckpointError: if the checkpoint is damaged or was made with another config; it stays as it is.
    """
    path, config = run.path / f"{name}.safetensors", _complete(run, name, config)
    given = run.provided(name)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed_of(name))
        model = make()
        if path.exists():
            metadata = load_into(model, path)
            _check_config(path, metadata, config)
        elif given is not None:
            metadata = load_into(model, given)
            print(f"{name}: not trained here but taken from {given}")
        else:
            started = time.perf_counter()
            history = fit(model)
            metadata = _describe(run, config, time.perf_counter() - started) | {"history": history}
            save_checkpoint(path, model.state_dict(), metadata)
            metadata["trained"] = True
    model.to(best_device()).eval()
    loaded = "trained" not in metadata
    return Stage(
        model, metadata["history"], metadata["seconds"], loaded, fingerprint(*model.state_dict().values())
    )


def load_or_make(
    run: Run, name: str, config: Mapping[str, Any], make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """The tensor that the checkpoint ``name`` in the run folder holds; made and saved there if there is none.

    Raises:
        CheckpointError: as :func:`load_or_train`.
    """
    path, config = run.path / f"{name}.safetensors", _complete(run, name, config)
    if path.exists():
        tensors, metadata = load_checkpoint(path)
        _check_config(path, metadata, config)
        return tensors["tensor"]
    started = time.perf_counter()
    tensor = make()
    save_checkpoint(path, {"tensor": tensor}, _describe(run, config, time.perf_counter() - started))
    return tensor


def _complete(run: Run, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the precision of the stage that the result is of, "registration" for "registration-real"."""
    mixed = name.split("-")[0] in run.profile.mixed_precision
    return {**config, **({"bfloat16": True} if mixed else {})}


def _describe(run: Run, config: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    made_by = provenance(run.profile.name, run.seed, best_device())
    return {"config": dict(config), "dataset": run.dataset, "seconds": seconds, "provenance": made_by}


def _check_config(path: Path, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    was = metadata.get("config", {})
    different = [key for key in sorted({*was, *config}) if _plain(was.get(key)) != _plain(config.get(key))]
    if different:
        raise CheckpointError(
            f"{path} was made with other settings ({', '.join(different)} differ from now). It stays as it is: "
            "choose another run folder (PAIRDIFF_RUNS), or delete the file to make it again."
        )


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them; without what is None, so that a setting may be added later."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def fingerprint(*tensors: torch.Tensor) -> str:
    """A short hash of the contents of tensors."""
    return digest(b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors))


def digest(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]
