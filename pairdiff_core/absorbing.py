"""Stages 3 and 4: absorbing (masked) discrete diffusion over tokens.

Forward, every token is replaced by MASK independently with probability t; at t = 1 all are masked. A transformer that
does not see t learns to fill in masks. Sampling starts from masks only and reveals tokens step by step; a revealed
token never changes. Background: Austin et al., "Structured Denoising Diffusion Models in Discrete State-Spaces",
NeurIPS 2021; Bond-Taylor et al., "Unleashing Transformers", ECCV 2022; Hoogeboom et al., "Autoregressive Diffusion
Models", ICLR 2022. Sequences are (N, L): the grid of tokens in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pairdiff_core.profiles import DenoiserSettings

Predict = Callable[[torch.Tensor], torch.Tensor]  # tokens int64 (N, L), some masked -> logits float (N, L, K)


class Denoiser(nn.Module):
    """A transformer encoder that predicts each token from those that are not masked.

    It has learned positions and no time input. The published sizes (K = 1024, 16 x 13 x 16 tokens, 12 layers, width
    512, 16 heads, feed-forward 1024) give 28.0 M parameters. Positions are initialised by :func:`position_code` instead
    of noise, which shows from the start which tokens are neighbours.

    Args:
        settings: layers (0 for none), width, heads and feed-forward of the transformer (Vaswani et al., "Attention Is
            All You Need", NeurIPS 2017), with normalisation before each of its two blocks; and the number of residual
            blocks of two convolutions over the grid that come before it. A transformer has to learn what neighbours
            mean at each position separately; a convolution learns it for all positions at once.
        codes: K; token K is MASK.
        grid: of the tokens of a pair; L is the product of its sizes.
    """

    def __init__(self, settings: DenoiserSettings, codes: int, grid: Sequence[int]) -> None:
        super().__init__()
        width = settings.width
        self.codes, self.grid, self.length = codes, tuple(grid), math.prod(grid)
        self.token = nn.Embedding(codes + 1, width)
        self.position = nn.Parameter(position_code(grid, width) / 2)
        self.given = nn.Embedding(codes + 1, width, padding_idx=codes) if settings.given else None
        from monai.networks.blocks.segresnet_block import ResBlock  # here, because importing it takes seconds

        norm = ("group", {"num_groups": 8})
        self.convolutions = nn.Sequential(
            *(ResBlock(len(grid), width, norm, act="gelu") for _ in range(settings.convolutions))
        )
        for block in self.convolutions:  # start as the identity
            nn.init.zeros_(block.conv2.conv.weight)
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, settings.feed_forward, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks: nn.Module = nn.LayerNorm(width)
        if settings.layers:
            self.blocks = nn.TransformerEncoder(layer, settings.layers, self.blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, codes, bias=False)
        nn.init.normal_(self.token.weight, std=0.3)  # about as strong as the positions
        if self.given is not None:
            nn.init.zeros_(self.given.weight)

    @property
    def mask_token(self) -> int:
        return self.codes

    def forward(self, tokens: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float (N, L, K) for tokens int64 (N, L), of which some are MASK.

        Args:
            given: int64 (N, L), the tokens of the fixed image paired with itself, MASK where they are unknown; None if
                nothing is known of it.
        """
        if tokens.shape[1] != self.length:
            raise ValueError(f"a grid of {self.grid} has {self.length} tokens, got {tokens.shape[1]}")
        hidden = self.token(tokens) + self.position  # (N, L, width)
        if given is not None:
            if self.given is None:
                raise ValueError("this denoiser was trained without fixed images: it cannot be given one")
            hidden = hidden + self.given(given)
        if len(self.convolutions):
            image = hidden.movedim(1, 2).unflatten(2, self.grid)  # (N, L, width) -> (N, width, *grid)
            hidden = self.convolutions(image).flatten(2).movedim(1, 2)
        with no_fast_path():
            return self.head(self.blocks(hidden))


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Disable the fast path of PyTorch's encoder layers, which stores all attention weights, (heads, L, L).

    It also does so under autocast, and stays in 32 bit when compiled (pytorch/pytorch, issue 191796).
    """
    usual = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(usual)


def position_code(grid: Sequence[int], width: int) -> torch.Tensor:
    """Sines and cosines of the position of each token on its grid, float (L, width), in row-major order.

    Along each axis, wavelengths range from four tokens to four times the grid's longest side, in equal ratios; unused
    channels are zero. As in Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.5, with equal parts of
    the width for all axes. MONAI's ``build_sincos_position_embedding`` does not support the published width in 3D.
    """
    frequencies = width // (2 * len(grid))
    slowest, fastest = math.pi / (2 * max(grid)), math.pi / 2  # radians per token
    rates = torch.logspace(math.log10(slowest), math.log10(fastest), frequencies)
    positions = torch.meshgrid(*[torch.arange(size) + 0.5 for size in grid], indexing="ij")
    angles = [position.flatten()[:, None] * rates for position in positions]  # (L, frequencies) each
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
    return F.pad(waves, (0, width - waves.shape[1]))


class Masked(NamedTuple):
    """Tokens after the forward process."""

    tokens: torch.Tensor  # int64 (N, L), MASK where masked
    masked: torch.Tensor  # bool (N, L)


def mask_tokens(tokens: torch.Tensor, t: torch.Tensor, mask_token: int, generator: torch.Generator) -> Masked:
    """The forward process: mask each of the tokens (N, L) independently with probability t (N,), 0 to 1."""
    chance = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    masked = chance < t[:, None]
    return Masked(tokens.masked_fill(masked, mask_token), masked)


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Sum over the masked tokens of -ln p(token), in nats, (N,)."""
    loss = logits.new_zeros(tokens.shape, dtype=torch.float32)
    loss[masked] = F.cross_entropy(logits[masked].float(), tokens[masked], reduction="none")  # of these only
    return loss.sum(1)


def reweighted_loss(predict: Predict, tokens: torch.Tensor, state: Masked, t: torch.Tensor) -> torch.Tensor:
    """The published training loss: for uniform t, cross-entropy on the masked tokens times (1 - t), in bits per token.

    Bond-Taylor et al. 2022, eq. 9: the exact bound weights a step by 1 / t, which is nearly all noise at small t and
    carries little information at large t; 1 - t is less noisy and proportional to the share of visible tokens.

    Args:
        predict: the denoiser, tokens (N, L) -> logits (N, L, K).
        tokens: int64 (N, L), unmasked.
        state: the tokens after :func:`mask_tokens`.
        t: (N,), drawn uniformly from 0 to 1, the probabilities with which they were masked.

    Returns:
        Scalar.
    """
    nats = cross_entropy(predict(state.tokens), tokens, state.masked)
    return ((1 - t) * nats).mean() / (tokens.shape[1] * math.log(2))


class Batch(NamedTuple):
    """Sequences for one training step."""

    tokens: torch.Tensor  # int64 (N, L)
    t: torch.Tensor  # float (N,)
    state: Masked  # the tokens, masked with probability t
    given: torch.Tensor | None = None  # int64 (N, L), of the fixed images; MASK for those that are not shown


def training_batch(
    tokens: torch.Tensor,
    mask_token: int,
    generators: Sequence[torch.Generator],
    given: torch.Tensor | None = None,
    share: float = 0.0,
) -> Batch:
    """Mask sequences (N, L), each with its own t, uniform from 0 to 1, from its own generator.

    Args:
        given: int (N, L), the tokens of the fixed images, each of which is shown with probability ``share``.
    """
    drawn = []
    for row, generator in zip(tokens.long()[:, None], generators, strict=True):
        t = torch.rand(1, generator=generator)
        state = mask_tokens(row, t, mask_token, generator)
        drawn.append((row, t, *state, torch.rand(1, generator=generator) < share))
    sequences, t, masked, mask, shown = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    if given is not None:
        given = given.long().masked_fill(~shown[:, None], mask_token)
    return Batch(sequences, t, Masked(masked, mask), given)


def training_loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """What a training step minimises and logs: :func:`reweighted_loss` of a :func:`training_batch`."""
    predict = model if batch.given is None else partial(model, given=batch.given)
    return {"loss": reweighted_loss(predict, batch.tokens, batch.state, batch.t)}


@torch.no_grad()
def bits_per_token(
    predict: Predict, tokens: torch.Tensor, mask_token: int, generator: torch.Generator, draws: int = 8
) -> torch.Tensor:
    """The evidence lower bound as bits per token, an upper bound on -log2 p(tokens) / L, for each sequence (N,).

    The exact bound of the absorbing process in continuous time is the expectation, over n uniform on 1..L and a
    uniformly random set of n masked tokens, of the mean -log2 p over the masked tokens (Hoogeboom et al. 2022,
    eq. 9). Each sequence is measured at ``draws`` values of n, one in each of ``draws`` equal parts of 1..L, which
    keeps the estimate unbiased and its noise small.
    """
    number, length = tokens.shape
    total = torch.zeros(number, device=tokens.device)
    for draw in range(draws):
        uniform = torch.rand(number, generator=generator, device=tokens.device)
        count = ((draw + uniform) / draws * length).long().clamp(0, length - 1) + 1  # n in 1..L, stratified
        order = torch.rand(tokens.shape, generator=generator, device=tokens.device).argsort(1).argsort(1)
        masked = order < count[:, None]
        hidden = tokens.masked_fill(masked, mask_token)
        rows = zip(*(each.split(4) for each in (hidden, tokens, masked)), strict=True)  # logits are large
        total += torch.cat([cross_entropy(predict(x), true, where) for x, true, where in rows]) / count
    return total / (draws * math.log(2))


def draw_tokens(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """Draw one token (...,) from each row of logits (..., K) at a temperature > 0; below 1 favours likely tokens.

    Draws in 64 bit: sampling in 32 bit lowers the effective temperature (Zheng et al. 2024, arXiv 2409.02908).
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    chances = (logits.double() / temperature).softmax(-1)
    drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator)
    return drawn.reshape(logits.shape[:-1])


# From the share of the steps that remain to the share of the tokens that is masked, t.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "uniform": lambda remaining: remaining,
    "cosine": lambda remaining: math.sin(math.pi / 2 * remaining),
}


@torch.no_grad()
def reveal(
    predict: Predict,
    tokens: torch.Tensor,
    mask_token: int,
    generator: torch.Generator,
    steps: int = 256,
    temperature: float = 1.0,
    schedule: str = "uniform",
) -> Iterator[torch.Tensor]:
    """The published sampler, one step at a time: yields the tokens (N, L) after each of ``steps`` steps.

    With s steps remaining, each token that is still masked is revealed with probability 1 / s, so that the last step
    reveals the rest; revealed tokens are drawn from the denoiser's prediction, independently of each other.

    Args:
        tokens: int64 (N, L) to start from: all MASK, or partly known.
        schedule: "uniform" as published, or "cosine" (Chang et al., "MaskGIT", CVPR 2022), which reveals few tokens
            at first, when little is known and each one matters most, and more later.

    Raises:
        ValueError: for an unknown schedule, or a temperature that is not above 0.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"the schedules are {', '.join(SCHEDULES)}, not {schedule!r}")
    tokens, masked = tokens.clone(), SCHEDULES[schedule]
    for left in range(steps, 0, -1):
        chance = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        share = 1 - masked((left - 1) / steps) / masked(left / steps)  # 1 / left on the uniform schedule
        now = (tokens == mask_token) & (chance < share)
        if now.any():  # a step that reveals nothing changes nothing
            tokens[now] = draw_tokens(predict(tokens)[now], temperature, generator)
        yield tokens.clone()


def sample(
    predict: Predict,
    number: int,
    length: int,
    mask_token: int,
    generator: torch.Generator,
    steps: int = 256,
    temperature: float = 1.0,
    schedule: str = "uniform",
) -> torch.Tensor:
    """``number`` new token sequences int64 (number, L), revealed from all MASK by :func:`reveal`."""
    masked = torch.full((number, length), mask_token, device=generator.device)
    *_, tokens = reveal(predict, masked, mask_token, generator, steps, temperature, schedule)
    return tokens
