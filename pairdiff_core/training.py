"""The one training loop, and the seeded, freshly warped batches that feed it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from pairdiff_core import fields
from pairdiff_core.profiles import Augmentation

History = list[dict[str, float]]


def best_device() -> torch.device:
    """The GPU if CUDA has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def warped_batches(
    labels: torch.Tensor, batch: int, augmentation: Augmentation, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Endless batches of pairs of label maps uint8 (batch, 2, *spatial), each freshly warped by :func:`augment`.

    Every pair of ``labels`` (N, 2, *spatial) comes once in each round of N, in a new random order.
    """
    for chosen in shuffled(len(labels), batch, generator):
        yield augment(labels[chosen], augmentation, generator)


def patches(
    batches: Iterator[torch.Tensor], size: Sequence[int], cuts: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """From each batch of pairs (N, 2, *spatial) ``cuts`` batches of pieces (N, 2, *size), at one random place a pair.

    Warping a volume takes longer than a training step on a piece of it, so each is used several times.
    """
    for batch in batches:
        free = torch.tensor(batch.shape[2:]) - torch.tensor(size) + 1
        for _ in range(cuts):
            starts = (torch.rand((len(batch), len(free)), generator=generator) * free).long().tolist()
            places = [tuple(slice(a, a + b) for a, b in zip(start, size, strict=True)) for start in starts]
            yield torch.stack(
                [pair[(slice(None), *place)] for pair, place in zip(batch, places, strict=True)]
            )


def shuffled(number: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of indices int64 (batch,): each of ``number`` comes once a round, in a new random order."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(number, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def augment(labels: torch.Tensor, augmentation: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """Pairs of label maps uint8 (N, 2, *spatial), warped by random affine jitter and a random smooth flow.

    One affine and one flow are common to both images of a pair: what their relation is stays. A second, smaller
    flow of its own moves each image.
    """
    number, spatial = len(labels), labels.shape[2:]
    common = _affine_jitter(number, spatial, augmentation.affine, generator)
    if augmentation.common > 0:
        common = fields.compose(
            common, _random_flow(number, spatial, augmentation.common, augmentation, generator)
        )
    displacement = common.repeat_interleave(2, 0)  # (N, D, *s) -> (2N, D, *s), as labels flatten
    if augmentation.own > 0:
        own = _random_flow(2 * number, spatial, augmentation.own, augmentation, generator)
        displacement = fields.compose(displacement, own)
    return fields.warp_labels(labels.flatten(0, 1), displacement).unflatten(0, (number, 2))


def _random_flow(
    number: int, spatial: torch.Size, amplitude: float, augmentation: Augmentation, generator: torch.Generator
) -> torch.Tensor:
    factor = augmentation.coarser or 1
    velocity = fields.random_velocity(
        number,
        [size // factor for size in spatial],
        amplitude=amplitude / factor,
        smoothness=augmentation.smoothness / factor,
        generator=generator,
    )
    flow = fields.exponentiate(velocity, squarings=4)
    return flow if factor == 1 else fields.resize_field(flow, spatial)


def _affine_jitter(
    number: int, spatial: torch.Size, scale: float, generator: torch.Generator
) -> torch.Tensor:
    """Displacement (N, D, *spatial) of affine maps whose entries differ by about ``scale`` from the identity's."""
    dims = len(spatial)
    matrix = scale * torch.randn((number, dims, dims), generator=generator)
    shift = scale * torch.randn((number, dims, 1), generator=generator) * torch.tensor(spatial)[:, None] / 4
    centre = torch.tensor(spatial).reshape(-1, *[1] * dims) / 2 - 0.5
    position = (fields.identity_grid(spatial) - centre).flatten(1)  # (D, *s) -> (D, voxels)
    return (matrix @ position + shift).unflatten(2, spatial)  # (N, D, voxels) -> (N, D, *s)


def fit(
    module: nn.Module,
    batches: Iterator[Any],
    loss: Callable[[nn.Module, Any], dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    average: float = 0.0,
    fabric: Fabric | None = None,
    description: str = "training",
    log_every: int = 20,
) -> History:
    """Train ``module`` in place: AdamW, a short warm-up, then a cosine down to zero.

    Args:
        batches: an iterator of tensors or tuples of tensors; ``steps`` batches are taken.
        loss: from (module, batch) to named scalars; the one called "loss" is minimised, all are logged.
        learning_rate: the peak.
        average: decay of an exponential moving average of the weights, which replaces them in the end; 0 for none.
        fabric: device and precision; by default the best device there is, in 32 bit.
        log_every: steps over which the logged numbers are averaged.

    Returns:
        One dict every ``log_every`` steps: "step" and the mean of each named scalar.

    Raises:
        FloatingPointError: if the loss is not finite; the weights of the last good step stay in the module.
    """
    fabric = fabric or Fabric(accelerator=best_device().type, devices=1)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warm_up_and_cosine(step, steps))
    wrapped, optimiser = fabric.setup(module, optimiser)
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
    module.train()
    history: History = []
    sums: dict[str, float] = {}
    progress = tqdm(range(1, steps + 1), desc=description, leave=False, mininterval=1.0)
    for step in progress:
        terms = loss(wrapped, fabric.to_device(next(batches)))
        if not torch.isfinite(terms["loss"]):
            raise FloatingPointError(
                f"{description}: the loss is {float(terms['loss'])} at step {step}; lower the learning rate"
            )
        optimiser.zero_grad()
        fabric.backward(terms["loss"])
        fabric.clip_gradients(wrapped, optimiser, max_norm=1.0)
        optimiser.step()
        schedule.step()
        if averaged is not None:
            averaged.update_parameters(module)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        if step % log_every == 0 or step == steps:
            since = (step - 1) % log_every + 1
            history.append({"step": step, **{name: value / since for name, value in sums.items()}})
            progress.set_postfix(loss=f"{history[-1]['loss']:.4f}")
            sums = {}
    if averaged is not None:
        module.load_state_dict(averaged.module.state_dict())
    module.eval()
    return history


def _warm_up_and_cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a linear rise over the first 5 %, then half a cosine."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
