"""The five stages of the method as functions: autoencoder, tokens, denoiser, new pairs, registration.

Each one loads its result from the run folder, or makes it and keeps it there; a result that was made with other
settings, data or earlier stages is refused, never mixed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from pairdiff_core import absorbing, metrics, processes, registration, training, vqae
from pairdiff_core.batches import Pieces, Samples, WarpedPairs, augment
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Profile
from pairdiff_core.randomness import generator
from pairdiff_core.registration import Deformation, TwoStepNetwork
from pairdiff_core.resume import Bookmark
from pairdiff_core.runs import Run, Stage, fingerprint, load_or_make, load_or_train

STAGES = ("vqae", "tokens", "diffusion", "synthesise", "registration")
PAIRS_A_PIECE = 8  # of new tokens: a piece of work that is kept or done anew
VOXELS_AT_ONCE = 2**18  # of the pairs that are registered together: larger tensors are slow on a CPU


def new_vqae(profile: Profile) -> vqae.PairedVQAE:
    """The untrained autoencoder at the sizes of a profile."""
    numbers = profile.vqae
    return vqae.PairedVQAE(
        len(profile.spatial),
        profile.num_labels,
        numbers.channels,
        numbers.strides,
        numbers.codes,
        numbers.fade_in,
    )


def new_denoiser(profile: Profile) -> absorbing.Denoiser:
    """The untrained denoiser for the tokens of that autoencoder."""
    numbers = profile.diffusion
    with torch.device("meta"):  # only its sizes are asked
        grid = new_vqae(profile).token_grid(profile.spatial)
    return absorbing.Denoiser(
        profile.vqae.codes,
        grid,
        numbers.layers,
        numbers.width,
        numbers.heads,
        numbers.feed_forward,
        numbers.convolutions or 0,
    )


def new_registration(profile: Profile) -> TwoStepNetwork:
    """The untrained registration network at the sizes of a profile."""
    numbers = profile.registration
    return TwoStepNetwork(
        len(profile.spatial),
        profile.num_labels - 1,
        numbers.channels,
        numbers.scale,
        numbers.squarings,
        numbers.control or 1,
        numbers.coarser or 1,
    )


def train_vqae(run: Run, new_model: Callable[[Profile], nn.Module] = new_vqae) -> Stage:
    """Stage 1: the paired VQ autoencoder; its history holds the loss and the health of the codebook.

    Args:
        new_model: the untrained autoencoder, to train another one in the same way.
    """
    numbers, pairs = run.profile.vqae, run.train
    criterion = vqae.VQAELoss(pairs.num_labels).to(training.best_device())

    def loss(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = model(labels)
        use = metrics.codebook_use(processes.gather(output.tokens), numbers.codes)
        return {
            "loss": criterion(output, labels),
            "commitment": output.commitment,
            "codes used": torch.tensor(use.used),
            "perplexity": torch.tensor(use.perplexity),
        }

    def fit(model: nn.Module, bookmark: Bookmark) -> training.History:
        samples = Samples(len(pairs), numbers.batch, run.seed_of("vqae"))
        volumes = WarpedPairs(pairs.labels, samples, numbers.augmentation)
        return training.fit(
            model,
            volumes if numbers.patches is None else Pieces(volumes, numbers.patches),
            loss,
            steps=numbers.steps,
            learning_rate=numbers.learning_rate,
            seed=samples.seed,
            fabric=run.fabric("vqae"),
            compiled="vqae" in run.profile.compiled,
            bookmark=bookmark,
            description="VQ-AE",
        )

    config = {"numbers": asdict(numbers), "training pairs": fingerprint(pairs.labels)}
    return load_or_train(run, "vqae", config, partial(new_model, run.profile), fit)


def encode_training_pairs(run: Run, autoencoder: Stage) -> torch.Tensor:
    """Stage 2: tokens int16 (copies * N, *grid) of the N training pairs; the first N as they are, then fresh warps."""
    pairs, copies, seed = run.train, run.profile.diffusion.copies, run.seed_of("tokens")

    def make(copy: int) -> torch.Tensor:
        parts = []
        for first in range(0, len(pairs), 64):
            labels = pairs.labels[first : first + 64]
            if copy:
                numbers = range(first + copy * len(pairs), first + copy * len(pairs) + len(labels))
                generators = [generator(seed, "warp", number) for number in numbers]
                labels = augment(labels, run.profile.vqae.augmentation, generators)
            parts.append(vqae.encode_pairs(autoencoder.model, labels))
        return torch.cat(parts)

    config = {"autoencoder": autoencoder.fingerprint, "copies": copies}
    return load_or_make(run, "tokens", config, make, copies)


def train_denoiser(run: Run, tokens: torch.Tensor) -> Stage:
    """Stage 3: the denoiser, on tokens int (N, *grid), with the published re-weighted loss."""
    numbers, mask_token = run.profile.diffusion, run.profile.vqae.codes
    sequences = tokens.flatten(1).long()  # (N, *grid) -> (N, L)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        x, t, *state = batch
        return {"loss": absorbing.reweighted_loss(model, x, absorbing.Masked(*state), t)}

    def fit(model: nn.Module, bookmark: Bookmark) -> training.History:
        samples = Samples(len(sequences), numbers.batch, run.seed_of("diffusion"))

        def batch(step: int) -> tuple[torch.Tensor, ...]:
            drawn = []
            for row, random in zip(
                sequences[samples.chosen(step)], samples.generators(step, "mask"), strict=True
            ):
                t = torch.rand(1, generator=random)
                drawn.append((row[None], t, *absorbing.mask_tokens(row[None], t, mask_token, random)))
            return tuple(torch.cat(parts) for parts in zip(*drawn, strict=True))

        return training.fit(
            model,
            batch,
            loss,
            steps=numbers.steps,
            learning_rate=numbers.learning_rate,
            average=numbers.average,
            seed=samples.seed,
            fabric=run.fabric("denoiser"),
            compiled="denoiser" in run.profile.compiled,
            bookmark=bookmark,
            description="denoiser",
        )

    config = {"numbers": asdict(numbers), "tokens": fingerprint(tokens)}
    return load_or_train(run, "denoiser", config, partial(new_denoiser, run.profile), fit)


def synthesise(
    run: Run, autoencoder: Stage, denoiser: Stage, known: torch.Tensor | None = None
) -> torch.Tensor:
    """Stage 4: tokens int16 (N, *grid) of new pairs. The tokens *are* the set; :func:`decode_pairs` shows it.

    Args:
        known: tokens (M, *grid) of real pairs. Each new pair then is a random one of them, of which the profile's share
            of places is kept and the rest made anew; without them, all is made from nothing.

    Raises:
        ValueError: if ``known`` is given, but the profile does not say how much of it to keep.
    """
    numbers, device = run.profile.synthesis, training.best_device()
    grid, model = autoencoder.model.token_grid(run.train.spatial), denoiser.model
    predict = torch.compile(model) if "synthesis" in run.profile.compiled else model
    stage = "synthesis" if known is None else "synthesis-completed"
    if known is not None and numbers.keep is None:
        raise ValueError(f"the profile {run.profile.name!r} has no share to keep: set synthesis.keep, 0 to 1")

    def make(piece: int) -> torch.Tensor:
        count = min(PAIRS_A_PIECE, numbers.pairs - piece * PAIRS_A_PIECE)
        random = generator(run.seed_of(stage), "piece", piece, device=device)
        if known is None:
            tokens = torch.full((count, model.length), model.mask_token, device=device)
        else:
            tokens = _draw_start(run, known, count, random).tokens
        with run.fabric("synthesis").autocast():
            *_, tokens = absorbing.reveal(
                predict,
                tokens,
                model.mask_token,
                random,
                numbers.steps,
                numbers.temperature,
                numbers.schedule or "even",
            )
        return tokens.unflatten(1, grid).to(torch.int16).cpu()  # (N, L) -> (N, *grid)

    config = {
        "numbers": asdict(numbers),
        "autoencoder": autoencoder.fingerprint,
        "denoiser": denoiser.fingerprint,
        "known": None if known is None else fingerprint(known),
    }
    return load_or_make(run, stage, config, make, -(-numbers.pairs // PAIRS_A_PIECE))


class Start(NamedTuple):
    """What completed pairs begin from."""

    source: torch.Tensor  # int64 (N,): which of the known pairs each one is of
    tokens: torch.Tensor  # int64 (N, L): what is kept of them, MASK where tokens are made anew


def completed_from(run: Run, known: torch.Tensor) -> Start:
    """What the completed pairs of a run begin from, if :func:`synthesise` is given ``known``; on the CPU."""
    starts, number = [], run.profile.synthesis.pairs
    for piece, first in enumerate(range(0, number, PAIRS_A_PIECE)):
        seed = run.seed_of("synthesis-completed")
        random = generator(seed, "piece", piece, device=training.best_device())
        starts.append(_draw_start(run, known, min(PAIRS_A_PIECE, number - first), random))
    return Start(*(torch.cat(parts).cpu() for parts in zip(*starts, strict=True)))


def _draw_start(run: Run, known: torch.Tensor, count: int, random: torch.Generator) -> Start:
    source = torch.randint(len(known), (count,), generator=random, device=random.device)
    tokens = known[source.cpu()].flatten(1).long().to(random.device)
    masked = torch.full((count,), 1 - run.profile.synthesis.keep, device=random.device)
    return Start(source, absorbing.mask_tokens(tokens, masked, run.profile.vqae.codes, random).tokens)


def decode_pairs(run: Run, autoencoder: Stage, tokens: torch.Tensor) -> PairSet:
    """Tokens int (N, *grid) as a PairSet with the labels, spacing and colours of the run's data."""
    names = tuple(f"synthetic_{index:04d}_fixed~synthetic_{index:04d}_moving" for index in range(len(tokens)))
    labels = vqae.decode_labels(autoencoder.model, tokens)
    return replace(run.train, labels=labels, names=names, displacement=None, landmarks=None)


def train_registration(run: Run, pairs: PairSet, name: str, *, warped: bool = False) -> Stage:
    """Stage 5: the registration network, on any pairs.

    Args:
        pairs: real or synthetic ones.
        name: of the result in the run folder, such as "real" or "synthetic".
        warped: whether each batch is freshly warped, as the autoencoder's are or as the profile says.
    """
    numbers = run.profile.registration

    def loss(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        fixed, moving = (registration.label_maps(image, pairs.num_labels) for image in labels.unbind(1))
        terms = registration.registration_loss(
            model(fixed, moving),
            registration.pool(fixed, numbers.scale),
            registration.pool(moving, numbers.scale),
            numbers.smoothness,
            scales=numbers.scales or 1,
        )
        return {"loss": terms.total, "dissimilarity": terms.dissimilarity, "roughness": terms.roughness}

    def fit(model: nn.Module, bookmark: Bookmark) -> training.History:
        samples = Samples(len(pairs), numbers.batch, run.seed_of("registration"))
        augmentation = (numbers.augmentation or run.profile.vqae.augmentation) if warped else None
        return training.fit(
            model,
            WarpedPairs(pairs.labels, samples, augmentation),
            loss,
            steps=numbers.steps,
            learning_rate=numbers.learning_rate,
            seed=samples.seed,
            fabric=run.fabric("registration"),
            compiled="registration" in run.profile.compiled,
            bookmark=bookmark,
            description=f"registration on {name} pairs",
        )

    config = {"numbers": asdict(numbers), "pairs": fingerprint(pairs.labels), "warped": warped}
    return load_or_train(run, f"registration-{name}", config, partial(new_registration, run.profile), fit)


class Made(NamedTuple):
    """What the stages of a run have made; empty from the stage on that was not asked for."""

    autoencoder: Stage
    tokens: torch.Tensor | None
    denoiser: Stage | None
    synthetic: PairSet | None
    networks: dict[str, Stage]  # trained on "real" and on "synthetic" pairs, and on each under fresh warps


def make(run: Run, last: str = "registration") -> Made:
    """Run, or load, the stages of a run in their order, up to the ``last`` of ``STAGES``.

    Raises:
        CheckpointError, Paused: as :func:`load_or_train`.
    """
    number = STAGES.index(last)
    autoencoder = train_vqae(run)
    tokens = encode_training_pairs(run, autoencoder) if number >= 1 else None
    denoiser = train_denoiser(run, tokens) if number >= 2 else None
    synthetic, networks = None, {}
    if number >= 3:
        synthetic = decode_pairs(run, autoencoder, synthesise(run, autoencoder, denoiser))
    if number >= 4:
        for name, pairs in {"real": run.train, "synthetic": synthetic}.items():
            networks[name] = train_registration(run, pairs, name)
            networks[f"{name}, warped"] = train_registration(run, pairs, f"{name}-warped", warped=True)
    return Made(autoencoder, tokens, denoiser, synthetic, networks)


def register_pairs(
    run: Run,
    pairs: PairSet,
    network: Stage | None = None,
    *,
    instance: bool = False,
    full_size: bool = False,
) -> Deformation:
    """Register every pair: by a trained network, then optionally for these very images; without one, the baseline.

    Args:
        instance: improve a network's answer by optimisation.
        full_size: give the baseline one more level, at full resolution.

    Returns:
        Deformations on the pairs' grid, on the CPU, in its voxels.
    """
    numbers, device = run.profile.registration, training.best_device()
    levels = numbers.baseline
    if full_size:
        levels = (*levels, levels[-1]._replace(scale=1))
    batch = max(1, VOXELS_AT_ONCE // prod(pairs.spatial))
    found = []
    for labels in pairs.labels.split(batch):
        fixed, moving = (
            registration.label_maps(image.to(device), pairs.num_labels) for image in labels.unbind(1)
        )
        if network is None:
            deformation = registration.register_multilevel(
                fixed, moving, levels, smoothness=numbers.smoothness, squarings=numbers.squarings
            )
        else:
            afterwards = numbers.instance if instance else ()
            deformation = registration.register(
                network.model,
                fixed,
                moving,
                afterwards,
                smoothness=numbers.smoothness,
                repeats=numbers.repeats or 1,
                merge=bool(numbers.merge),
            )
        found.append(deformation)
    return Deformation(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))
