"""The five stages of the method as functions: autoencoder, tokens, denoiser, new pairs, registration.

Each one loads its result from the run folder, or makes it and keeps it there; a result that was made with other
settings, data or earlier stages is refused, never mixed in.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import torch
from torch import nn

from pairdiff_core import absorbing, metrics, registration, training, vqae
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Augmentation, Profile
from pairdiff_core.registration import Deformation, TwoStepNetwork
from pairdiff_core.runs import Run, Stage, fingerprint, load_or_make, load_or_train

AS_THEY_ARE = Augmentation(affine=0.0, common=0.0, own=0.0, smoothness=1.0)


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
        numbers.groups or 1,
        bool(numbers.apart),
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
        numbers.together,
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
    )


def train_vqae(run: Run) -> Stage:
    """Stage 1: the paired VQ autoencoder; its history holds the loss and the health of the codebook."""
    numbers, pairs = run.profile.vqae, run.train
    criterion = vqae.VQAELoss(pairs.num_labels).to(training.best_device())

    def loss(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = model(labels)
        use = metrics.codebook_use(output.tokens, numbers.codes)
        return {
            "loss": criterion(output, labels),
            "commitment": output.commitment,
            "codes used": torch.tensor(use.used),
            "perplexity": torch.tensor(use.perplexity),
        }

    def fit(model: nn.Module) -> training.History:
        generator = run.generator("vqae")
        batches = training.warped_batches(pairs.labels, numbers.batch, numbers.augmentation, generator)
        if numbers.patches is not None:
            batches = training.patches(batches, *numbers.patches, generator)
        return training.fit(
            model,
            batches,
            loss,
            steps=numbers.steps,
            learning_rate=numbers.learning_rate,
            fabric=run.fabric("vqae"),
            description="VQ-AE",
        )

    config = {"numbers": asdict(numbers), "training pairs": fingerprint(pairs.labels)}
    return load_or_train(run, "vqae", config, partial(new_vqae, run.profile), fit)


def encode_training_pairs(run: Run, autoencoder: Stage) -> torch.Tensor:
    """Stage 2: tokens int16 (copies * N, *grid) of the N training pairs; the first N as they are, then fresh warps."""
    pairs, generator = run.train, run.generator("tokens")
    copies = run.profile.diffusion.copies

    def make() -> torch.Tensor:
        tokens = [vqae.encode_pairs(autoencoder.model, pairs.labels)]
        for _ in range(copies - 1):
            for part in pairs.labels.split(64):
                warped = training.augment(part, run.profile.vqae.augmentation, generator)
                tokens.append(vqae.encode_pairs(autoencoder.model, warped))
        return torch.cat(tokens)

    return load_or_make(run, "tokens", {"autoencoder": autoencoder.fingerprint, "copies": copies}, make)


def train_denoiser(run: Run, tokens: torch.Tensor) -> Stage:
    """Stage 3: the denoiser, on tokens int (N, *grid), with the published re-weighted loss."""
    numbers, codes = run.profile.diffusion, run.profile.vqae.codes
    sequences = tokens.flatten(1).long()  # (N, *grid) -> (N, L)
    masks = run.generator("masks", training.best_device())

    def loss(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": absorbing.reweighted_loss(model, batch, codes, masks)}

    def fit(model: nn.Module) -> training.History:
        order = training.shuffled(len(sequences), numbers.batch, run.generator("diffusion"))
        batches = (sequences[chosen] for chosen in order)
        return training.fit(
            model,
            batches,
            loss,
            steps=numbers.steps,
            learning_rate=numbers.learning_rate,
            average=numbers.average,
            fabric=run.fabric("denoiser"),
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
    stage = "synthesis" if known is None else "synthesis-completed"
    if known is not None and numbers.keep is None:
        raise ValueError(f"the profile {run.profile.name!r} has no share to keep: set synthesis.keep, 0 to 1")

    def first(count: int, generator: torch.Generator) -> torch.Tensor:
        if known is None:
            return torch.full((count, model.length), model.mask_token, device=device)
        chosen = torch.randint(len(known), (count,), generator=generator, device=device).cpu()
        tokens = known[chosen].flatten(1).long().to(device)
        together = run.profile.vqae.groups or 1
        return absorbing.mask_places(tokens, numbers.keep, together, model.mask_token, generator)

    def make() -> torch.Tensor:
        generator, drawn = run.generator(stage, device), []
        with run.fabric("synthesis").autocast():
            for start in range(0, numbers.pairs, 32):
                tokens = first(min(32, numbers.pairs - start), generator)
                *_, tokens = absorbing.reveal(
                    model, tokens, model.mask_token, generator, numbers.steps, numbers.temperature
                )
                drawn.append(tokens)
        return torch.cat(drawn).unflatten(1, grid).to(torch.int16).cpu()  # (N, L) -> (N, *grid)

    config = {
        "numbers": asdict(numbers),
        "autoencoder": autoencoder.fingerprint,
        "denoiser": denoiser.fingerprint,
        "known": None if known is None else fingerprint(known),
    }
    return load_or_make(run, stage, config, make)


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
        warped: whether each batch is freshly warped, as the autoencoder's are.
    """
    numbers = run.profile.registration

    def loss(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        fixed, moving = (registration.label_maps(image, pairs.num_labels) for image in labels.unbind(1))
        terms = registration.registration_loss(
            model(fixed, moving),
            registration.pool(fixed, numbers.scale),
            registration.pool(moving, numbers.scale),
            numbers.smoothness,
        )
        return {"loss": terms.total, "dissimilarity": terms.dissimilarity, "roughness": terms.roughness}

    def fit(model: nn.Module) -> training.History:
        augmentation = run.profile.vqae.augmentation if warped else AS_THEY_ARE
        batches = training.warped_batches(
            pairs.labels, numbers.batch, augmentation, run.generator("registration")
        )
        return training.fit(
            model,
            batches,
            loss,
            steps=numbers.steps,
            learning_rate=numbers.learning_rate,
            fabric=run.fabric("registration"),
            description=f"registration on {name} pairs",
        )

    config = {"numbers": asdict(numbers), "pairs": fingerprint(pairs.labels), "warped": warped}
    return load_or_train(run, f"registration-{name}", config, partial(new_registration, run.profile), fit)


def register_pairs(
    run: Run,
    pairs: PairSet,
    network: Stage | None = None,
    *,
    instance: bool = False,
    full_size: bool = False,
    batch: int = 6,
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
            level = numbers.instance if instance else None
            deformation = registration.register(
                network.model, fixed, moving, level, smoothness=numbers.smoothness
            )
        found.append(deformation)
    return Deformation(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))
