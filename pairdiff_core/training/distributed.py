"""Training in one or several processes: their number, rank and communication.

``torchrun`` starts several processes and :meth:`lightning_fabric.Fabric.launch` joins them. Without them, each function
returns the result for one process. Fabric's own ``all_gather`` needs the Fabric object, which a model does not have.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as distributed
from torch.distributed.nn.functional import all_gather


def joined() -> bool:
    """Whether the processes can communicate."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if joined() else int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if joined() else int(os.environ.get("WORLD_SIZE", 1))


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors (N, ...) of all P processes, in their order, as (P N, ...). Gradients flow back to each process."""
    return torch.cat(all_gather(tensor.contiguous())) if joined() else tensor


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes."""
    if joined():
        distributed.all_reduce(tensor)
    return tensor / count()


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes get the same answer, so that they can act alike."""
    if not joined():
        return flag
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    return bool(mean(torch.tensor(float(flag), device=device)) > 0)
