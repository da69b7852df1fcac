"""The five stages of the method: autoencoder, tokens, denoiser, synthetic pairs, registration.

Each one loads its result from the run folder, or makes it and saves it there. A result that was made with other
settings, data or earlier stages is refused.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pairdiff_core import absorbing, registration, vqae
from pairdiff_core.augmentation import PatchesOfPairs, WarpedPairs, augment
from pairdiff_core.data.breathing import BREATHING, Motions, load_motions
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline.models import NEW_MODEL, Trained, as_trained, chosen_model, load_trained, stage_of
from pairdiff_core.pipeline.run import Run
from pairdiff_core.profiles import STAGES, Augmentation, to_json, trained_settings
from pairdiff_core.storage import (
    Progress,
    check_config,
    fingerprint,
    load_checkpoint,
    provenance,
    save_checkpoint,
    write_log,
)
from pairdiff_core.training import Samples, best_device, distributed, fit, generator, new_fabric, precision

PAIRS_IN_A_SHARD = 8  # synthetic pairs that are sampled and saved together
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """A stage that trains a model.

    Attributes:
        name: of its checkpoint, such as "registration-real"; the part before the hyphen is the stage.
        inputs: fingerprints of what it is trained on.
        loss: from (model, batch) to named scalars.
        batches: from the number of a step to its batch.
        start: gives the untrained model other weights to start from; None: random ones.
        opponent: makes a network that is trained together with the model and not kept, such as a discriminator. The
            loss is then from (model, opponent, batch). None for none.
    """

    name: str
    inputs: dict[str, Any]
    loss: Callable[..., dict[str, torch.Tensor]]
    batches: Callable[[int], Any]
    start: Callable[[Any], None] | None = None
    opponent: Callable[[], nn.Module] | None = None


class _WithOpponent(nn.Module):
    """A model and its opponent as one module, whose output is the loss: so several processes can train both."""

    def __init__(self, model: nn.Module, opponent: nn.Module, loss: Callable[..., dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.model, self.opponent, self.loss = model, opponent, loss

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return self.loss(self.model, self.opponent, batch)


# ---------------------------------------------------------------------------------------------- the stages


def train_vqae(run: Run) -> Trained:
    """Stage 1: the paired VQ autoencoder; its history holds the loss and the health of the codebook."""
    if pretrained := load_pretrained(run, "vqae"):
        return pretrained
    settings, pairs = run.profile.vqae, run.train
    samples = Samples(len(pairs), settings.batch, run.seed_of("vqae"))
    motions = motions_for(run, settings.augmentation)
    batches = WarpedPairs(pairs.labels, samples, settings.augmentation, motions)
    if settings.patches is not None:
        batches = PatchesOfPairs(batches, settings.patches)
    loss = partial(vqae.training_loss, codes=settings.codes)
    inputs = {"pairs": fingerprint(pairs.labels)} | _motions_used(motions)
    return load_or_train(run, Training("vqae", inputs, loss, batches))


def motions_for(run: Run, augmentation: Augmentation) -> Motions | None:
    """Other people's motions, if an augmentation moves images by them; only data sets of lungs have motions."""
    return load_motions(run.dataset, run.data, run.seed) if augmentation.motion and run.dataset in BREATHING else None


def _motions_used(motions: Motions | None) -> dict[str, Any]:
    return {} if motions is None else {"motions": fingerprint(motions.displacement)}


def encode_training_pairs(run: Run, autoencoder: Trained) -> torch.Tensor:
    """Stage 2: tokens int16 (copies * N, *grid) of the N training pairs; the first N unchanged, then newly warped."""
    return _encode_copies(run, autoencoder, "tokens", lambda pairs: pairs)


def encode_fixed_images(run: Run, autoencoder: Trained) -> torch.Tensor:
    """Stage 2 for a denoiser that is given fixed images: tokens of these images, each paired with itself."""
    return _encode_copies(run, autoencoder, "tokens-fixed", fixed_with_itself)


def fixed_with_itself(pairs: torch.Tensor) -> torch.Tensor:
    """Pairs (N, 2, *spatial) whose moving image is the fixed one, too: what is known if only that one is given."""
    return pairs[:, [0, 0]]


def _encode_copies(
    run: Run, autoencoder: Trained, name: str, chosen: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    pairs, copies = run.train, run.profile.denoiser.copies
    motions = motions_for(run, run.profile.vqae.augmentation)
    at_once = vqae.pairs_at_once(pairs.spatial)

    def encode_copy(copy: int) -> torch.Tensor:
        numbers = range(copy * len(pairs), (copy + 1) * len(pairs))
        parts = (
            warped_copies(run, numbers[first : first + at_once], motions) for first in range(0, len(numbers), at_once)
        )
        return torch.cat([vqae.encode_pairs(autoencoder.model, chosen(labels)) for labels in parts])

    inputs = {"pairs": fingerprint(pairs.labels), "autoencoder": autoencoder.fingerprint, "copies": copies}
    return load_or_make(run, name, inputs | _motions_used(motions), encode_copy, copies)


def warped_copies(run: Run, numbers: Sequence[int], motions: Motions | None) -> torch.Tensor:
    """Training pairs as the denoiser learns them, uint8 (M, 2, *spatial), the first N of all numbers unchanged.

    Args:
        numbers: of copies: copy c of training pair n of N is number c N + n.
        motions: from :func:`motions_for`.
    """
    labels = run.train.labels[[number % len(run.train) for number in numbers]]
    new = [index for index, number in enumerate(numbers) if number >= len(run.train)]
    generators = [generator(run.seed_of("tokens"), "warp", numbers[index]) for index in new]
    labels[new] = augment(labels[new], run.profile.vqae.augmentation, generators, motions)
    return labels


def train_denoiser(run: Run, tokens: torch.Tensor, given: torch.Tensor | None = None) -> Trained:
    """Stage 3: the denoiser, on tokens int (N, *grid).

    Args:
        given: those of the fixed images, from :func:`encode_fixed_images`; needed if the profile's denoiser is given
            them (``given`` above 0).
    """
    if pretrained := load_pretrained(run, "denoiser"):
        return pretrained
    settings, codes = run.profile.denoiser, run.profile.vqae.codes
    sequences = tokens.flatten(1)  # (N, *grid) -> (N, L)
    fixed = None if given is None else given.flatten(1)
    samples = Samples(len(sequences), settings.batch, run.seed_of("denoiser"))

    def batch(step: int) -> absorbing.Batch:
        chosen, generators = samples.chosen(step), samples.generators(step, "mask")
        shown = None if fixed is None else fixed[chosen]
        return absorbing.training_batch(sequences[chosen], codes, generators, shown, settings.given)

    inputs = {"tokens": fingerprint(tokens)} | ({} if given is None else {"given": fingerprint(given)})
    return load_or_train(run, Training("denoiser", inputs, absorbing.training_loss, batch))


def synthesise(run: Run, autoencoder: Trained, denoiser: Trained) -> torch.Tensor:
    """Stage 4: tokens int16 (N, *grid) of synthetic pairs; :func:`decode_pairs` makes the images from them."""
    inputs = {"autoencoder": autoencoder.fingerprint, "denoiser": denoiser.fingerprint}
    return load_or_make(run, "synthesis", inputs, partial(sample_pairs, run, denoiser), number_of_shards(run))


def number_of_shards(run: Run) -> int:
    """How many shards the synthetic pairs of a run are sampled in."""
    return -(-run.profile.synthesis.pairs // PAIRS_IN_A_SHARD)


def sample_pairs(run: Run, denoiser: Trained, shard: int, given: torch.Tensor | None = None) -> torch.Tensor:
    """One shard of the synthetic pairs of a run as tokens int16 (at most 8, *grid); no data are needed.

    Args:
        given: tokens int (1, *grid) of a fixed image paired with itself, or such tokens for each pair of the shard;
            their partners are drawn. None: new pairs.
    """
    settings, model, device = run.profile.synthesis, denoiser.model, best_device()
    number = min(PAIRS_IN_A_SHARD, settings.pairs - shard * PAIRS_IN_A_SHARD)
    random = generator(run.seed_of("synthesis"), "shard", shard, device=device)
    predict = model if given is None else partial(model, given=given.flatten(1).long().to(device))
    with new_fabric("synthesis" in run.profile.mixed_precision).autocast():
        tokens = absorbing.sample(
            predict, number, model.length, model.mask_token, random,
            settings.steps, settings.temperature, settings.schedule,
        )  # fmt: skip
    return tokens.unflatten(1, model.grid).to(torch.int16).cpu()  # (N, L) -> (N, *grid)


def decode_pairs(run: Run, autoencoder: Trained, tokens: torch.Tensor) -> PairSet:
    """Tokens int (N, *grid) as a PairSet with the label names, spacing and colours of the run's data set.

    The data set itself is not needed.
    """
    known, spacing = run.description, run.description.spacing(run.profile.spatial_dims)
    names = tuple(f"synthetic_{index:04d}_fixed~synthetic_{index:04d}_moving" for index in range(len(tokens)))
    labels = vqae.decode_labels(autoencoder.model, tokens)
    return PairSet(labels, known.label_names, spacing, names, label_colours=known.label_colours)


def images_with_themselves(pairs: PairSet) -> PairSet:
    """Each of the 2N images of N pairs, paired with itself; a training that moves images adds the motion.

    Then both images show the same vessels, which the two images of a synthetic pair do not.
    """
    labels = pairs.labels.flatten(0, 1)[:, None].expand(-1, 2, *pairs.spatial)  # (N, 2, *s) -> (2N, 2, *s)
    names = tuple(f"{image}~{image}" for pair in pairs.names for image in pair.split("~"))
    return replace(pairs, labels=labels, names=names)


def train_registration(
    run: Run, pairs: PairSet, name: str, *, warped: bool = False, motions: Motions | None = None
) -> Trained:
    """Stage 5: the registration network, trained on any pairs.

    Args:
        pairs: real or synthetic ones.
        name: of the result in the run folder, such as "real" or "synthetic".
        warped: whether each batch is newly warped, with the profile's augmentation.
        motions: of other people; each warped pair is also moved along a part of one of them. None for none.
    """
    if pretrained := load_pretrained(run, f"registration-{name}"):
        return pretrained
    settings = run.profile.registration
    samples = Samples(len(pairs), settings.batch, run.seed_of("registration"))
    augmentation = (settings.augmentation or run.profile.vqae.augmentation) if warped else None
    loss = partial(registration.training_loss, num_labels=pairs.num_labels, settings=settings)
    inputs: dict[str, Any] = {"pairs": fingerprint(pairs.labels), "warped": warped}
    if motions is not None:
        augmentation = settings.breathing or augmentation
        inputs |= _motions_used(motions) | {"augmentation": to_json(augmentation)}
    batches = WarpedPairs(pairs.labels, samples, augmentation, motions)
    return load_or_train(run, Training(f"registration-{name}", inputs, loss, batches))


class StageResults(NamedTuple):
    """Results of the stages of a run; None or empty if not requested or not needed."""

    autoencoder: Trained
    tokens: torch.Tensor | None  # not needed, and not made, before a pretrained denoiser
    denoiser: Trained | None
    synthetic: PairSet | None
    networks: dict[str, Trained]  # by training pairs: "real" or "synthetic", each also warped or with motions


def run_stages(run: Run, last: str = "registration") -> StageResults:
    """Run, or load, the stages of a run in their order, up to the ``last`` of ``STAGES``.

    Raises:
        CheckpointError, Paused: as :func:`load_or_train`.
    """
    number = STAGES.index(last)
    autoencoder = train_vqae(run)
    denoiser = load_pretrained(run, "denoiser") if number >= 2 else None
    tokens = encode_training_pairs(run, autoencoder) if number >= 1 and not denoiser else None
    if number >= 2 and not denoiser:
        given = encode_fixed_images(run, autoencoder) if run.profile.denoiser.given else None
        denoiser = train_denoiser(run, tokens, given)
    synthetic, networks = None, {}
    if number >= 3:
        synthetic = decode_pairs(run, autoencoder, synthesise(run, autoencoder, denoiser))
    if number >= 4:
        motions = load_motions(run.dataset, run.data, run.seed) if run.dataset in BREATHING else None
        for name, pairs in {"real": run.train, "synthetic": synthetic}.items():
            networks[name] = train_registration(run, pairs, name)
            if name == "real" or motions is None:
                networks[f"{name}, warped"] = train_registration(run, pairs, f"{name}-warped", warped=True)
            if motions is not None:
                moved = pairs if name == "real" else images_with_themselves(pairs)
                networks[f"{name}, motion"] = train_registration(
                    run, moved, f"{name}-motion", warped=True, motions=motions
                )
    return StageResults(autoencoder, tokens, denoiser, synthetic, networks)


# ------------------------------------------------------------------------------------------- load or make


def load_pretrained(run: Run, name: str) -> Trained | None:
    """The pretrained model (PAIRDIFF_MODELS) that replaces a training, unless the run folder holds its own.

    It may come from other data than the run's, so a line is printed. No data are needed.
    """
    path = chosen_model(run.dataset, run.profile, name)
    if path is None or (run.path / f"{name}.safetensors").exists():
        return None
    _say(f"{name}: not trained here but taken from {path}")
    return load_trained(path, run.profile)


def load_or_train(run: Run, training: Training) -> Trained:
    """The model of a stage: from the run folder, else trained and saved now.

    Raises:
        CheckpointError: if a checkpoint is damaged, was made with other settings or inputs, or cannot be written, or
            another process works in the folder. Existing files are not changed.
        Paused: if the run was asked to pause; the next call continues it.
    """
    name, stage, path = training.name, stage_of(training.name), run.path / f"{training.name}.safetensors"
    if path.exists():
        (run.path / f"{name}.progress").unlink(missing_ok=True)  # left by a process that was killed
        _say(f"{name}: found in {run.path.name}, not trained again")
        return load_trained(path, run.profile, training.inputs)
    settings = getattr(run.profile, stage)
    config = {"settings": trained_settings(settings), "inputs": training.inputs}
    with run.working(), torch.random.fork_rng():
        torch.manual_seed(run.seed_of(name))
        model, allowed = NEW_MODEL[stage](run.profile), stage in run.profile.mixed_precision
        if training.start is not None:
            training.start(model)
        fitted, loss = model, training.loss
        if training.opponent is not None:
            fitted, loss = _WithOpponent(model, training.opponent(), loss), nn.Module.__call__
        progress = Progress(run.path / f"{name}.progress", config | {"processes": distributed.count()}, run.saving)
        fabric = new_fabric(allowed)
        history = fit(
            fitted, loss, training.batches, settings,
            seed=run.seed_of(stage), fabric=fabric, progress=progress, description=name,
        )  # fmt: skip
        description = _description(run, name, config, progress.seconds) | {"history": history}
        if fabric.is_global_zero:
            write_log(run.path, name, history)
            save_checkpoint(path, model.state_dict(), description)
            progress.path.unlink(missing_ok=True)
        fabric.barrier()
    _say(f"{name}: trained in {description['seconds']:.0f} s")
    return as_trained(model, description, loaded=False)


def load_or_make(
    run: Run, name: str, inputs: dict[str, Any], make: Callable[[int], torch.Tensor], shards: int
) -> torch.Tensor:
    """The tensor of the checkpoint ``name`` in the run folder; it is made and saved there if there is none.

    It is made in shards, which several processes share and which are kept after an interruption.

    Args:
        inputs: everything that the tensor depends on besides the settings of the stage.
        make: from the number of a shard, 0 to ``shards - 1``, to that shard, which depends on nothing else; the tensor
            is the concatenation of all shards.

    Raises:
        CheckpointError, Paused: as :func:`load_or_train`.
    """
    path, folder = run.path / f"{name}.safetensors", run.path / f"{name}.shards"
    settings = getattr(run.profile, name, None)
    config = {"settings": trained_settings(settings) if settings else {}, "inputs": inputs}
    found = path.exists()
    if not found:
        with run.working():
            _make_shards(run, name, config, make, [folder / f"{shard:04d}" for shard in range(shards)])
    tensors, description = load_checkpoint(path)
    check_config(path, description["config"], config)
    shutil.rmtree(folder, ignore_errors=True)
    _say(f"{name}: " + (f"found in {run.path.name}" if found else f"made in {description['seconds']:.0f} s"))
    return tensors["tensor"]


def _make_shards(
    run: Run, name: str, config: dict[str, Any], make: Callable[[int], torch.Tensor], files: list[Path]
) -> None:
    """Make this process's share of the shards, one file each; when all exist, the first process concatenates them."""
    for shard in range(0, len(files), distributed.count()):
        run.pause_if_asked(name)
        mine = shard + distributed.rank()
        if mine < len(files) and not files[mine].exists():
            started = time.monotonic()
            tensor = make(mine)
            save_checkpoint(files[mine], {"tensor": tensor}, {"config": config, "seconds": time.monotonic() - started})
            if 10 * (shard + 1) // len(files) > 10 * shard // len(files) and distributed.rank() == 0:
                log.info("%s: part %d of %d", name, shard + 1, len(files))
    run.pause_if_asked(name)  # which is also where each process waits for the others
    if distributed.rank() == 0:
        parts = [load_checkpoint(file) for file in files]
        for file, (_, description) in zip(files, parts, strict=True):
            check_config(file, description["config"], config)
        seconds = sum(description["seconds"] for _, description in parts) / distributed.count()
        tensor = torch.cat([tensors["tensor"] for tensors, _ in parts])
        path, description = run.path / f"{name}.safetensors", _description(run, name, config, seconds)
        save_checkpoint(path, {"tensor": tensor}, description)
        shutil.rmtree(files[0].parent)
    distributed.any_of(False)  # wait for the first process


def _description(run: Run, name: str, config: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The description that a checkpoint stores."""
    made_by = provenance(run.profile.name, run.seed, best_device())
    bfloat16 = stage_of(name) in run.profile.mixed_precision
    made_by |= {"processes": distributed.count(), "precision": precision(bfloat16)}
    return {"config": config, "dataset": run.dataset, "seconds": seconds, "provenance": made_by}


def _say(line: str) -> None:
    if distributed.rank() == 0:
        print(line)
