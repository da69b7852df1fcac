"""Run folders: what one data set, profile and seed have produced so far, each piece loaded or made once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import nn

import pairdiff_core
from pairdiff_core import data as data_sets
from pairdiff_core import processes, run_folder
from pairdiff_core.checkpoints import CheckpointError, load_checkpoint, load_into, provenance, save_checkpoint
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Profile, get_profile
from pairdiff_core.randomness import generator, seed_of
from pairdiff_core.resume import Bookmark, Paused, check_config
from pairdiff_core.training import History, best_device, fast_in_bfloat16

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # else a line for each use of bfloat16


@dataclass(frozen=True, eq=False)
class Run:
    """A data set, a profile and a seed, and the folder that keeps what is made of them.

    Several processes may work on one run, if all see its folder; :mod:`pairdiff_core.processes` counts them.

    Attributes:
        dataset: one of ``data.DATASETS``.
        profile: sizes, steps and weights of everything.
        seed: of everything random in the run.
        folder: where results are kept; None takes ``<dataset>-<profile>-seed<seed>`` in the folder that
            ``PAIRDIFF_RUNS`` names, else in ``runs``.
        data: folder of the real data; None looks where the environment variables say.
        save_minutes: after so many, what is done of a stage is kept (:class:`pairdiff_core.resume.Bookmark`).
        should_pause: asked often; if it gives a reason, what is done is kept and ``resume.Paused`` raised.
    """

    dataset: str
    profile: Profile
    seed: int = 0
    folder: str | Path | None = None
    data: str | Path | None = None
    save_minutes: float = 5.0
    should_pause: Callable[[], str | None] | None = None

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

    def precision(self, stage: str) -> str:
        """Of "vqae", "denoiser", "synthesis" or "registration", in Fabric's words.

        It is "bf16-mixed" where the profile allows that and the device is fast in it, else "32-true".
        """
        low = stage in self.profile.mixed_precision and fast_in_bfloat16(best_device())
        return "bf16-mixed" if low else "32-true"

    def fabric(self, stage: str) -> Fabric:
        """Device, precision and processes of a stage, named as for :meth:`precision`."""
        precision, device = self.precision(stage), best_device().type
        if processes.count() == 1:
            return Fabric(accelerator=device, devices=1, precision=precision)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes.count()))
        fabric = Fabric(
            accelerator=device,
            strategy="ddp",
            devices=here,
            num_nodes=processes.count() // here,
            precision=precision,
        )
        if "LT_CLI_USED" not in os.environ:  # Fabric's own launcher has done so
            fabric.launch()
        return fabric

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep the run's folder for this process, or for the first of several, while something is made in it."""
        config = {"dataset": self.dataset, "profile": self.profile.name, "seed": self.seed}
        if processes.count() > 1 and not processes.joined():
            self.fabric("any")
        if processes.rank():
            yield
        else:
            told = {**config, "pairdiff": pairdiff_core.__version__, "numbers": asdict(self.profile)}
            with run_folder.working_in(self.path, told):
                yield

    def pause_if_asked(self) -> None:
        """Raise ``Paused`` if there is a reason to."""
        if self.should_pause and (reason := self.should_pause()):
            raise Paused(f"{reason}: paused")

    def bookmark(self, name: str, config: Mapping[str, Any]) -> Bookmark:
        """Where a stage that is not finished keeps what is done of it."""
        return Bookmark(self.path / name, config, self.save_minutes, self.should_pause)

    def seed_of(self, stage: str) -> int:
        """A seed for one stage, the same whether the stages before it were trained or loaded."""
        return seed_of(self.seed, stage)

    def generator(self, stage: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A random generator seeded by :meth:`seed_of`."""
        return generator(self.seed, stage, device=device)


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
    fit: Callable[[nn.Module, Bookmark], History],
) -> Stage:
    """The model of the checkpoint ``name`` in the run folder, or else the provided one (:meth:`Run.provided`).

    If there is neither, it is trained and saved there. A provided model may come from other data than the run's, so
    that a line is printed which says so.

    Args:
        config: everything that the result depends on, JSON-able. A checkpoint made with another is refused.
        make: builds the untrained model; random initialisation is seeded by the run.
        fit: trains it in place, from where the bookmark is, and returns the history.

    Raises:
        CheckpointError: if the checkpoint is damaged, was made with another config, or cannot be written, or another
            process works in the folder. What is there stays as it is.
        Paused: if the run was asked to pause; the next call goes on from there.
    """
    path, config = run.path / f"{name}.safetensors", _complete(run, name, config)
    given = run.provided(name)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed_of(name))
        model = make()
        loaded = True
        if path.exists():
            metadata = load_into(model, path)
            check_config(path, metadata.get("config", {}), config)
            _tell(f"{name}: found in {run.path.name}, not trained again")
            # left behind if the process was killed between saving and removing
            (run.path / f"{name}.part").unlink(missing_ok=True)
        elif given is not None:
            metadata = load_into(model, given)
            _tell(f"{name}: not trained here but taken from {given}")
        else:
            loaded = False
            with run.working():
                bookmark = run.bookmark(f"{name}.part", {**config, "processes": processes.count()})
                bookmark.log = partial(run_folder.write_log, run.path, name)
                history = fit(model, bookmark)
                metadata = _describe(run, name, config, bookmark.seconds) | {"history": history}
                if processes.rank() == 0:
                    bookmark.log(history)
                    _finish(run, name, model.state_dict(), metadata)
                    bookmark.remove()
                processes.wait()
            _tell(f"{name}: trained in {metadata['seconds']:.0f} s")
    model.to(best_device()).eval()
    return Stage(
        model, metadata["history"], metadata["seconds"], loaded, fingerprint(*model.state_dict().values())
    )


def load_or_make(
    run: Run, name: str, config: Mapping[str, Any], make: Callable[[int], torch.Tensor], pieces: int = 1
) -> torch.Tensor:
    """The tensor that the checkpoint ``name`` in the run folder holds; made and saved there if there is none.

    It is made in pieces, which several processes share and an interruption does not lose.

    Args:
        config: as for :func:`load_or_train`.
        make: from the number of a piece, 0 to ``pieces - 1``, to that piece, which depends on nothing else; the
            pieces one behind the other are the tensor.

    Raises:
        CheckpointError, Paused: as :func:`load_or_train`.
    """
    path, config = run.path / f"{name}.safetensors", _complete(run, name, config)
    found = path.exists()
    if not found:
        with run.working():
            _make_pieces(run, name, config, make, pieces)
    tensors, metadata = load_checkpoint(path)
    check_config(path, metadata.get("config", {}), config)
    shutil.rmtree(run.path / f"{name}.part", ignore_errors=True)  # as above
    _tell(f"{name}: found in {run.path.name}" if found else f"{name}: made in {metadata['seconds']:.0f} s")
    return tensors["tensor"]


def _tell(line: str) -> None:
    if processes.rank() == 0:
        print(line)


def _make_pieces(
    run: Run, name: str, config: Mapping[str, Any], make: Callable[[int], torch.Tensor], pieces: int
) -> None:
    """Make this process's share of the pieces, each a file; when all are there, the first process joins them."""
    files = [run.bookmark(f"{name}.part/{piece:04d}", config) for piece in range(pieces)]
    reason = None
    for piece in range(processes.rank(), pieces, processes.count()):
        if files[piece].load() is not None:
            continue
        if reason := files[piece].reason_to_pause():
            break
        files[piece].begin()
        files[piece].write({"tensor": make(piece)}, {})
    if processes.any_of(reason is not None):  # which is also where each waits for the others
        raise Paused(f"{name}: paused after a piece ({reason or 'another process was asked to stop'})")
    if processes.rank() == 0:
        tensor = torch.cat([file.load()[0]["tensor"] for file in files])
        seconds = sum(file.seconds_before for file in files) / processes.count()
        _finish(run, name, {"tensor": tensor}, _describe(run, name, config, seconds))
        shutil.rmtree(run.path / f"{name}.part")
    processes.wait()


def _stage(name: str) -> str:
    """The stage that a result is of: "registration" for "registration-real"."""
    return name.split("-")[0]


def _complete(run: Run, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, and whether the profile allows the stage to be in bfloat16 and compiles it.

    Not whether it was in bfloat16: a run may go on where another processor began it. The provenance tells.
    """
    stage = _stage(name)
    return {
        **config,
        **({"bfloat16": True} if stage in run.profile.mixed_precision else {}),
        **({"compiled": True} if stage in (run.profile.compiled or ()) else {}),
    }


def _describe(run: Run, name: str, config: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    made_by = provenance(run.profile.name, run.seed, best_device())
    made_by |= {"processes": processes.count(), "precision": run.precision(_stage(name))}
    return {"config": dict(config), "dataset": run.dataset, "seconds": seconds, "provenance": made_by}


def _finish(run: Run, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    made_by = metadata["provenance"] | {"seconds": metadata["seconds"]}
    run_folder.write_provenance(run.path, name, made_by)
    save_checkpoint(run.path / f"{name}.safetensors", tensors, metadata)


def fingerprint(*tensors: torch.Tensor) -> str:
    """A short hash of the contents of tensors: the first 16 hexadecimal digits of the SHA-256."""
    content = b"".join(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]
