"""Which device computes, at which precision, in how many processes."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

from pairdiff_core.errors import DataError
from pairdiff_core.training import distributed

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def best_device() -> torch.device:
    """The device that PAIRDIFF_DEVICE names, "cpu" or "cuda"; if it is not set, a GPU if CUDA has one.

    Raises:
        DataError: if it names something else, or "cuda" without a GPU.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = os.environ.get("PAIRDIFF_DEVICE") or found
    if wanted not in ("cpu", "cuda"):
        raise DataError(f"PAIRDIFF_DEVICE is {wanted!r}, but the devices are cpu and cuda")
    if wanted == "cuda" and found != "cuda":
        raise DataError(
            "PAIRDIFF_DEVICE asks for cuda, but torch finds no GPU: install a CUDA build of torch, or unset it"
        )
    return torch.device(wanted)


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16, which make it faster than 32 bit.

    On x86 CPUs without them, PyTorch is up to hundreds of times slower (pytorch/pytorch, issues 146508 and 183815).
    Other CPUs were not tested, so the answer for them is no.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = getattr(torch.cpu, "get_capabilities", dict)()  # older versions lack it
    return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def precision(bfloat16: bool) -> str:
    """The precision for Fabric: "bf16-mixed" if bfloat16 is allowed and fast on the device, else "32-true"."""
    return "bf16-mixed" if bfloat16 and fast_in_bfloat16(best_device()) else "32-true"


def new_fabric(bfloat16: bool = False) -> Fabric:
    """A Fabric for the device, precision and processes of a training; joins the processes that ``torchrun`` started."""
    from lightning_fabric import Fabric  # here: its import takes seconds

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # otherwise a line for each use of bfloat16
    options = {"accelerator": best_device().type, "precision": precision(bfloat16)}
    if distributed.count() == 1:
        return Fabric(devices=1, **options)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.count()))
    fabric = Fabric(strategy="ddp", devices=here, num_nodes=distributed.count() // here, **options)
    if "LT_CLI_USED" not in os.environ:  # Fabric's own launcher has done so
        fabric.launch()
    return fabric
