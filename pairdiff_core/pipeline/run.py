"""A run: one data set, one profile, one seed, and the folder with their results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

import pairdiff_core
from pairdiff_core import data as data_sets
from pairdiff_core.errors import CheckpointError, DataError
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import OWN, Profile, profile_from_json, to_json
from pairdiff_core.storage import Saving, read_config, rounded, working_in
from pairdiff_core.training import Paused, distributed, generator, new_fabric, seed_of


@dataclass(frozen=True, eq=False)
class Run:
    """A data set, a profile and a seed. Several processes may work on one run, if all see its folder.

    Attributes:
        dataset: one of ``data.DATASETS``, or "own".
        profile: all settings.
        seed: of everything random in the run.
        folder: where results are kept; None takes ``<dataset>-<profile>-seed<seed>`` in the folder that
            ``PAIRDIFF_RUNS`` names, else in ``runs``.
        data: folder of the real data; None takes the one that the environment variables name.
        saving: when unfinished work is saved, and when it pauses.

    Raises:
        DataError: for a seed outside 0 to 2**31 - 1.
    """

    dataset: str
    profile: Profile
    seed: int = 0
    folder: str | Path | None = None
    data: str | Path | None = None
    saving: Saving = field(default_factory=Saving)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise DataError(f"the seed is {self.seed}; give a whole number from 0 to {2**31 - 1}")

    @cached_property
    def path(self) -> Path:
        """The run's folder; it need not exist yet."""
        name = f"{self.dataset}-{self.profile.name}-seed{self.seed}"
        return Path(self.folder or Path(os.environ.get("PAIRDIFF_RUNS", "runs")) / name)

    @cached_property
    def train(self) -> PairSet:
        """Pairs of the training subjects."""
        return self._pairs("train")

    @cached_property
    def validation(self) -> PairSet:
        """Pairs of the held-out subjects."""
        return self._pairs("validation")

    def _pairs(self, split: str) -> PairSet:
        if self.dataset == OWN:
            prepared = data_sets.read_own(self.data)
            if rounded(prepared.described.to_json()) != rounded(self.description.to_json()):
                raise CheckpointError(
                    f"{self.path} belongs to other data than {prepared.path}: labels or grid differ. Choose another "
                    "run folder."
                )
        return data_sets.load_pairs(self.dataset, split, self.profile, data=self.data, seed=self.seed)

    @cached_property
    def description(self) -> data_sets.DataDescription:
        """Labels and grid of the data. A run on data of your own keeps them in its folder."""
        if self.dataset == OWN and (self.path / "config.json").is_file():
            try:
                return data_sets.description_from_json(read_config(self.path)["description"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{self.path / 'config.json'} does not describe its data ({error!r}). Choose another run folder."
                ) from error
        return data_sets.describe_data(self.dataset, self.profile, self.data)

    def seed_of(self, stage: str) -> int:
        """A seed for one stage, the same whether the stages before it were trained or loaded."""
        return seed_of(self.seed, stage)

    def generator(self, stage: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A random generator seeded by :meth:`seed_of`."""
        return generator(self.seed, stage, device=device)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Lock the run's folder for this process, or for the first of several, while results are written."""
        if distributed.count() > 1 and not distributed.joined():
            new_fabric()
        if distributed.rank():
            yield
            return
        identity = {"dataset": self.dataset, "profile": self.profile.name, "seed": self.seed}
        settings = {"pairdiff": pairdiff_core.__version__, "settings": to_json(self.profile)}
        if self.dataset == OWN:
            settings["description"] = rounded(self.description.to_json())
        with working_in(self.path, identity, settings):
            yield

    def pause_if_asked(self, doing: str) -> None:
        """Raise :class:`Paused` if any process has a reason to pause; all processes must call it."""
        reason = self.saving.should_pause()
        if distributed.any_of(reason is not None):
            raise Paused(f"{doing}: {reason or 'another process was asked to stop'}, paused")


def open_run(folder: str | Path, data: str | Path | None = None) -> Run:
    """The run that a folder belongs to, by its ``config.json``: a run folder, or a pretrained model.

    Raises:
        CheckpointError: if the folder is neither, or was made by another version.
    """
    config = read_config(folder)
    try:
        return Run(config["dataset"], profile_from_json(config["settings"]), config["seed"], Path(folder), data)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{Path(folder) / 'config.json'} does not fit this version ({error}). Train again in another run folder."
        ) from error
