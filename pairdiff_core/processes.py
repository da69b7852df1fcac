"""One process or several that train together: what each must know of the others.

Several are started by ``torchrun`` or Fabric's launcher and joined by :meth:`lightning_fabric.Fabric.launch`. Without
them, each function gives what holds for one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as distributed


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if joined() else int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if joined() else int(os.environ.get("WORLD_SIZE", 1))


def joined() -> bool:
    """Whether the processes can talk to each other."""
    return distributed.is_available() and distributed.is_initialized()


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors (N, ...) of all P processes, in their order, as (P N, ...). Gradients flow back to each process."""
    if not joined():
        return tensor
    return _Gather.apply(tensor.contiguous())


class _Gather(torch.autograd.Function):
    """What others make of a process's tensor counts for it: backward adds up the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(count())]
        distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(count())[rank()]


def mean(values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over all processes, which must all name the same ones in the same order."""
    if not joined():
        return values
    together = torch.tensor(list(values.values()), dtype=torch.float64, device=_device())
    distributed.all_reduce(together)
    return dict(zip(values, (together / count()).tolist(), strict=True))


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes get the same answer, so that they can act alike."""
    if not joined():
        return flag
    flags = torch.tensor(float(flag), device=_device())
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)


def wait() -> None:
    """Until all processes have come here."""
    any_of(False)


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"
