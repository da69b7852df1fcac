"""The training loop, which all stages share."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from pairdiff_core.storage import Progress
from pairdiff_core.training import distributed
from pairdiff_core.training.batches import batch_loader
from pairdiff_core.training.devices import new_fabric
from pairdiff_core.training.interrupt import Paused
from pairdiff_core.training.seeds import seed_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

History = list[dict[str, float]]  # one entry every LOG_EVERY steps: "step", and the mean of each logged number
LOG_EVERY = 20  # steps
LINE_MINUTES = 10.0  # where no bar is shown, a line is logged this often, and at each tenth of the steps
log = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], dict[str, torch.Tensor]],
    batches: Callable[[int], Any],
    settings: Any,
    *,
    seed: int = 0,
    fabric: Fabric | None = None,
    progress: Progress | None = None,
    description: str = "training",
) -> History:
    """Train ``model`` in place with AdamW; the learning rate has a short warm-up, then a cosine down to zero.

    Every step depends only on its number, the seed and the state before it. On a CPU, a training that was interrupted
    and continued therefore gives bit-identical results.

    Args:
        loss: from (model, batch) to named scalars; the one called "loss" is minimised, all are logged.
        batches: from the number of a step, 0 to ``steps - 1``, to its batch, a tensor or a tuple of tensors.
        settings: of a stage: ``steps`` and ``learning_rate``, the peak. If it has an ``average``, a decay, the moving
            average of the weights replaces them at the end. If it has a ``momentum``, it replaces AdamW's 0.9.
        seed: of random numbers that the model itself draws.
        fabric: device, precision and processes; by default the best available device, in 32 bit.
        progress: where the state is saved and restored from; by default nothing is saved.
        description: of the progress bar and the errors.

    Raises:
        FloatingPointError: if the loss or its gradient is not finite; saved progress remains valid.
        ValueError: if bfloat16 is used where PyTorch computes wrong gradients in it.
        Paused: if there is a reason to pause; the state is saved.
    """
    fabric, decay = fabric or new_fabric(), getattr(settings, "average", 0.0)
    betas = (getattr(settings, "momentum", 0.9), 0.99)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=betas, weight_decay=0)
    wrapped, optimiser = fabric.setup(model, optimiser)
    state: dict[str, Any] = {"model": model, "optimiser": optimiser, "step": 0, "history": [], "sums": {}}
    if decay:
        state["average"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    if progress:
        progress.restore(fabric, state)
    model.train()
    loader = batch_loader(batches, state["step"], settings.steps, fabric.device)
    bar = tqdm(  # not around the loader: tqdm.auto would start a second iterator with its own worker
        desc=description, initial=state["step"], total=settings.steps, leave=False, mininterval=1.0,
        # None: shown in a terminal or a notebook only. Set outright, it hides tqdm's own variable.
        disable=True if distributed.rank() or os.environ.get("TQDM_DISABLE") else None,
    )  # fmt: skip
    last_line = time.monotonic()
    with bar, torch.random.fork_rng(), _right_gradients(model):
        for batch in loader:
            step = state["step"]
            torch.manual_seed(seed_of(seed, "step", step))
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * _warm_up_and_cosine(step, settings.steps)
            terms = loss(wrapped, fabric.to_device(batch))
            optimiser.zero_grad()
            fabric.backward(terms["loss"])
            norm = fabric.clip_gradients(wrapped, optimiser, max_norm=1.0, error_if_nonfinite=False)
            optimiser.step()
            if decay:
                state["average"].update_parameters(model)
            state["step"] += 1
            _add(state["sums"], terms | {"gradient norm": norm})
            if state["step"] % LOG_EVERY == 0 or state["step"] == settings.steps:
                _log(state, description)
                bar.set_postfix({name: state["history"][-1][name] for name in terms})
            bar.update()
            tenth = 10 * state["step"] // settings.steps > 10 * step // settings.steps
            if bar.disable and not distributed.rank() and (tenth or time.monotonic() - last_line > 60 * LINE_MINUTES):
                log.info("%s: step %d of %d", description, state["step"], settings.steps)
                last_line = time.monotonic()
            if progress and state["step"] < settings.steps:
                _save(fabric, progress, state, description)
    if decay:
        model.load_state_dict(state["average"].module.state_dict())
    model.eval()
    return state["history"]


def _add(sums: dict[str, torch.Tensor], terms: dict[str, torch.Tensor]) -> None:
    """Add the terms of a step to the sums since the last entry of the history, without waiting for a GPU."""
    for name, value in terms.items():
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value


def _log(state: dict[str, Any], description: str) -> None:
    """Turn the sums into an entry of the history.

    Raises:
        FloatingPointError: if one of them is not finite.
    """
    sums, step = state["sums"], state["step"]
    means = distributed.mean(torch.stack(list(sums.values()))) / (step - (step - 1) // LOG_EVERY * LOG_EVERY)
    entry = dict(zip(sums, means.tolist(), strict=True))
    for name, value in entry.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{description}: the {name} is {value} by step {step}; lower the learning rate")
    state["history"].append({"step": step, **entry})
    state["sums"] = {}


def _save(fabric: Fabric, progress: Progress, state: dict[str, Any], description: str) -> None:
    """Save the state if it is due; if any process has a reason to pause, save it and pause."""
    reason = progress.saving.should_pause()
    pause = distributed.any_of(reason is not None)
    if not pause and not distributed.any_of(progress.due()):
        return
    if not all(bool(value.isfinite()) for value in state["sums"].values()):
        raise FloatingPointError(f"{description}: no finite loss by step {state['step']}; lower the learning rate")
    progress.save(fabric, state)
    if pause:
        reason = reason or "another process was asked to stop"
        raise Paused(f"{description}: {reason}, paused after step {state['step']}")


@contextmanager
def _right_gradients(model: nn.Module) -> Iterator[None]:
    """Refuse what PyTorch 2.13 gets wrong on CPUs: in bfloat16, a 3D convolution of an input that is two voxels deep.

    The gradient of its weights is then uninitialised memory. The forward pass and other sizes are right.
    """

    def refuse(convolution: nn.Conv3d, inputs: tuple[torch.Tensor, ...]) -> None:
        given, low = inputs[0], torch.is_autocast_enabled("cpu") or inputs[0].dtype == torch.bfloat16
        if low and given.device.type == "cpu" and given.shape[2] == 2 and convolution.stride[0] == 1:
            raise ValueError(
                f"a 3D convolution gets {tuple(given.shape[2:])} voxels in bfloat16, for which PyTorch computes wrong "
                "gradients on a CPU: remove this stage from the profile's mixed_precision, or use larger images"
            )

    convolutions = (part for part in model.modules() if isinstance(part, nn.Conv3d))
    hooks = [part.register_forward_pre_hook(refuse) for part in convolutions if part.kernel_size[0] > 1]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _warm_up_and_cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a linear rise over the first 5 %, then half a cosine."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
