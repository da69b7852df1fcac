"""Which samples a training step takes, as a function of the step.

A batch depends only on the seed and the step, so an interrupted run continues with the same batches. Each *sample* has
its own random generator, so several processes that share a batch make the same samples as a single process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pairdiff_core.errors import DataError
from pairdiff_core.training import distributed
from pairdiff_core.training.seeds import generator


@dataclass(frozen=True)
class Samples:
    """Which of N training items this process takes at which step.

    All samples of a training are numbered: step s of P processes takes numbers s P B to (s + 1) P B - 1. Each epoch of
    N numbers contains every item once, in a new random order.

    Attributes:
        items: N.
        batch: B, samples per step and process.
        seed: of order and augmentation.

    Raises:
        DataError: if there are fewer items than processes.
    """

    items: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.items < distributed.count():
            raise DataError(
                f"{distributed.count()} processes cannot share {self.items} training items: start at most {self.items}"
            )

    def at(self, step: int) -> list[int]:
        """Numbers of the ``batch`` samples that this process takes at a step, from 0."""
        first = (step * distributed.count() + distributed.rank()) * self.batch
        return list(range(first, first + self.batch))

    def chosen(self, step: int) -> torch.Tensor:
        """Indices int64 (batch,), 0 to N - 1, of the items that this process takes at a step."""
        positions = [divmod(number, self.items) for number in self.at(step)]
        orders = {
            each: torch.randperm(self.items, generator=generator(self.seed, "order", each))
            for each in {each for each, _ in positions}
        }
        return torch.stack([orders[each][position] for each, position in positions])

    def generators(self, step: int, purpose: str) -> list[torch.Generator]:
        """One generator for each sample of a step, for a given purpose."""
        return [generator(self.seed, purpose, number) for number in self.at(step)]


@dataclass(frozen=True)
class _Steps(Dataset):
    batches: Callable[[int], Any]
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Any:
        return self.batches(self.first + index)


def batch_loader(batches: Callable[[int], Any], first: int, last: int, device: torch.device) -> DataLoader:
    """The batches of steps ``first`` to ``last - 1``; for a GPU, another process prepares them in advance."""
    ahead = {"num_workers": 1, "prefetch_factor": 4, "pin_memory": True} if device.type == "cuda" else {}
    return DataLoader(_Steps(batches, first, last), batch_size=None, **ahead)
