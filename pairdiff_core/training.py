"""The one training loop."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from pairdiff_core import processes
from pairdiff_core.randomness import seed_of
from pairdiff_core.resume import Bookmark, Paused

History = list[dict[str, float]]


def best_device() -> torch.device:
    """What the environment variable PAIRDIFF_DEVICE names, "cpu" or "cuda"; without it, the GPU if CUDA has one.

    Raises:
        ValueError: if it names something else, or a GPU that is not there.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = os.environ.get("PAIRDIFF_DEVICE") or found
    if wanted not in ("cpu", "cuda"):
        raise ValueError(f"PAIRDIFF_DEVICE is {wanted!r}, but the devices are cpu and cuda")
    if wanted == "cuda" and found != "cuda":
        raise ValueError(
            "PAIRDIFF_DEVICE asks for cuda, but torch finds no GPU: install a CUDA build of torch, or unset it"
        )
    return torch.device(wanted)


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16, so that a stage in it takes less time than in 32 bit.

    On x86 processors without them PyTorch takes ways that are up to hundreds of times slower (pytorch/pytorch, issues
    146508 and 183815). Of processors of other makes nothing is known here, and the answer is no.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = getattr(torch.cpu, "get_capabilities", dict)()  # older versions cannot be asked
    return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def fit(
    module: nn.Module,
    batches: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    average: float = 0.0,
    seed: int = 0,
    fabric: Fabric | None = None,
    compiled: bool = False,
    bookmark: Bookmark | None = None,
    description: str = "training",
    log_every: int = 20,
) -> History:
    """Train ``module`` in place: AdamW, a short warm-up, then a cosine down to zero.

    Every step depends on its number, the seed and the state before it alone. So a training that was interrupted and
    goes on from its bookmark ends, on a CPU, with the very bits of one that was not.

    Args:
        batches: from the number of a step, 0 to ``steps - 1``, to its batch, a tensor or a tuple of tensors.
        loss: from (module, batch) to named scalars; the one called "loss" is minimised, all are logged.
        learning_rate: the peak.
        average: decay of an exponential moving average of the weights, which replaces them in the end; 0 for none.
        seed: of random numbers that the module itself draws.
        fabric: device, precision and processes; by default the best device there is, in 32 bit.
        compiled: whether the module runs through ``torch.compile``.
        bookmark: where the state is kept and taken up again; by default nothing is kept.
        log_every: steps over which the logged numbers are averaged.

    Returns:
        One dict every ``log_every`` steps: "step" and the mean of each named scalar, over all processes.

    Raises:
        FloatingPointError: if the loss or its gradient is not finite; the weights of the last good step stay in the
            module.
        ValueError: if bfloat16 is asked for where PyTorch computes wrong gradients in it.
        Paused: if the bookmark's ``should_pause`` gave a reason; the state is kept.
    """
    fabric = fabric or Fabric(accelerator=best_device().type, devices=1)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    wrapped, optimiser = fabric.setup(torch.compile(module) if compiled else module, optimiser)
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
    state = _State(module, averaged, optimiser)
    begun = state.take_up(bookmark) if bookmark else 0
    module.train()
    progress = tqdm(
        range(begun, steps), desc=description, initial=begun, total=steps, leave=False, mininterval=1.0,
        disable=True if processes.rank() else None,  # None: shown in a terminal or a notebook only
    )  # fmt: skip
    with torch.random.fork_rng(), _right_gradients(module):
        for step in progress:
            torch.manual_seed(seed_of(seed, "step", step))
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * _warm_up_and_cosine(step, steps)
            terms = loss(wrapped, fabric.to_device(batches(step)))
            if not torch.isfinite(terms["loss"]):
                raise FloatingPointError(
                    f"{description}: the loss is {float(terms['loss'])} at step {step + 1}; lower the learning rate"
                )
            optimiser.zero_grad()
            fabric.backward(terms["loss"])
            norm = fabric.clip_gradients(wrapped, optimiser, max_norm=1.0, error_if_nonfinite=False)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"{description}: the gradient is {float(norm)} at step {step + 1}; lower the learning rate"
                )
            optimiser.step()
            if averaged is not None:
                averaged.update_parameters(module)
            state.log(step + 1, terms, write=(step + 1) % log_every == 0 or step + 1 == steps)
            progress.set_postfix(state.latest())
            if bookmark and step + 1 < steps:
                state.keep(bookmark, step + 1)
    if averaged is not None:
        module.load_state_dict(averaged.module.state_dict())
    module.eval()
    return state.history


@contextmanager
def _right_gradients(module: nn.Module) -> Iterator[None]:
    """Refuse what PyTorch 2.13 gets wrong on CPUs: in bfloat16, a 3D convolution of an input that is two voxels deep.

    The gradient of its weights then holds whatever was in memory. The forward pass is right, and so are other sizes.
    """

    def refuse(convolution: nn.Conv3d, inputs: tuple[torch.Tensor, ...]) -> None:
        given, low = inputs[0], torch.is_autocast_enabled("cpu") or inputs[0].dtype == torch.bfloat16
        if low and given.device.type == "cpu" and given.shape[2] == 2 and convolution.stride[0] == 1:
            raise ValueError(
                f"a 3D convolution gets {tuple(given.shape[2:])} voxels in bfloat16, for which PyTorch computes wrong "
                "gradients on a CPU: take this stage out of the profile's mixed_precision, or use larger images"
            )

    convolutions = (part for part in module.modules() if isinstance(part, nn.Conv3d))
    hooks = [part.register_forward_pre_hook(refuse) for part in convolutions if part.kernel_size[0] > 1]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _State:
    """Everything that the next steps of a training depend on."""

    def __init__(self, module: nn.Module, averaged: AveragedModel | None, optimiser: Any) -> None:
        self.modules = {"module": module, **({"averaged": averaged} if averaged is not None else {})}
        self.optimiser = optimiser
        self.history: History = []
        self.sums: dict[str, float] = {}  # of the terms since the last entry of the history
        self.since = 0

    def log(self, step: int, terms: dict[str, torch.Tensor], write: bool) -> None:
        """Add the terms of a step; ``write`` makes an entry of their means."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.since += 1
        if write:
            means = processes.mean({name: value / self.since for name, value in self.sums.items()})
            self.history.append({"step": step, **means})
            self.sums, self.since = {}, 0

    def latest(self) -> dict[str, float]:
        return {name: value for name, value in (self.history or [{}])[-1].items() if name != "step"}

    def keep(self, bookmark: Bookmark, step: int) -> None:
        """Write the state if it is time to; if there is a reason to pause, in any process, write it and pause."""
        reason = bookmark.reason_to_pause()
        pause = processes.any_of(reason is not None)
        if processes.rank() == 0 and (pause or bookmark.due()):
            bookmark.write(self._tensors(), {"step": step, **self._numbers()})
            bookmark.log(self.history)
        if pause:
            raise Paused(f"{reason or 'another process was asked to stop'}: paused after step {step}")

    def take_up(self, bookmark: Bookmark) -> int:
        """Load what the bookmark keeps; returns the number of steps that are done."""
        kept = bookmark.load()
        if kept is None:
            return 0
        tensors, metadata = kept
        for name, module in self.modules.items():
            module.load_state_dict(_below(f"{name}.", tensors))
        by_parameter: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _below("optimiser.", tensors).items():
            index, _, key = name.partition(".")
            by_parameter.setdefault(int(index), {})[key] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": by_parameter, "param_groups": groups})
        self.history, self.sums, self.since = (metadata[name] for name in ("history", "sums", "since"))
        return metadata["step"]

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {
            f"{name}.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in module.state_dict().items()
        }
        for index, of_parameter in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{key}": tensor for key, tensor in of_parameter.items()}
        return tensors

    def _numbers(self) -> dict[str, Any]:
        return {"history": self.history, "sums": self.sums, "since": self.since}


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _warm_up_and_cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a linear rise over the first 5 %, then half a cosine."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
