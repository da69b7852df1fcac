"""What the models of grey slices can do: translation, new images, few steps, two modalities, reconstruction.

They are measured by ``python -m benchmarks.continuous``, on images of people that no model has seen.
"""

from __future__ import annotations

import torch

from pairdiff_core import absorbing, metrics
from pairdiff_core.data.contrasts import draw_images
from pairdiff_core.images import distillation, latent_diffusion, modalities, reconstruction
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline import (
    ImageStageResults,
    Run,
    StageResults,
    both_contrasts,
    new_encoders,
    sample_controlled,
    sample_latents,
    t1_images,
    train_encoders,
    train_kl_autoencoder,
    train_score_network,
    translate,
)
from pairdiff_core.pipeline.image_stages import STAGE_OF
from pairdiff_core.training import best_device
from pairdiff_core.vqae import decode_labels

FEW_STEPS = (1, 2, 4, 20)  # of the samplers
FEW_PAIRS = 32  # images with a partner, of those with which the encoders are trained

Table = dict[str, dict[str, float]]


def translations(run: Run, made: ImageStageResults, number: int) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of the errors of T1 images made from FLAIR-like ones, by method."""
    unseen, coder = t1_images(run, run.validation), made.models["kl_autoencoder"].model
    half = -(-number // 2)
    real, labels = unseen.batches(half, "unseen")(0)[:number], unseen.labels(half, "unseen")(0)[:number]
    seeds = [run.generator(f"FLAIR {index}") for index in range(number)]
    flair = draw_images(labels, "FLAIR", run.profile.num_labels, seeds)
    found = {
        "ControlNet": coder.decode(sample_controlled(run, made.models, "controlnet_flair", flair, "translation")),
        "U-Net": translate(made.models["translator"], flair),
        "copy": flair,
        "autoencoder": coder.decode(coder.encode(real)),
    }
    return {name: _mean_and_deviation(images, real) for name, images in found.items()}


def sampled_images(
    run: Run, made: ImageStageResults, tokens: PairSet, partners: dict[str, torch.Tensor], number: int
) -> dict[str, dict[str, float]]:
    """What :func:`metrics.compare_images` says of new images of each kind, all after the autoencoder.

    Images "from tokens" are drawn from synthetic label maps. Two rows are references: training people again, and unseen
    people.
    """
    coder = made.models["kl_autoencoder"].model
    seen, again = (
        coder.decode(coder.encode(t1_images(run, pairs).some(number, purpose)))
        for pairs, purpose in ((run.validation, "unseen"), (run.train, "again"))
    )
    sets = {"training people, drawn again": again, "unseen people": seen}
    sets["tokens"] = _from_labels(run, made, tokens.fixed[:number])
    for name, sampler in {"DDIM": "ddim", "rectified flow": "rflow"}.items():
        sets[name] = coder.decode(sample_latents(run, made.models[STAGE_OF[sampler]], sampler, number))
    sets |= {f"partners, {kind}": images[:number] for kind, images in partners.items()}
    return metrics.compare_images(coder.decode(made.latents), seen, sets)


def _from_labels(run: Run, made: ImageStageResults, labels: torch.Tensor) -> torch.Tensor:
    """T1-like images of synthetic label maps uint8 (N, *spatial), after the autoencoder."""
    coder = made.models["kl_autoencoder"].model
    seeds = [run.generator(f"token image {index}") for index in range(len(labels))]
    return coder.decode(coder.encode(draw_images(labels, "T1", run.profile.num_labels, seeds)))


def autoencoder_losses(run: Run, number: int) -> Table:
    """What each part of the autoencoder's loss does, on images of unseen people, by loss.

    Returns:
        the errors of :func:`metrics.image_errors`; ``edges``, the mean absolute difference of neighbouring voxels, as a
        share of that of the images themselves; ``latent_sd``, the standard deviation of the latents' means before they
        are standardised; ``seconds`` of training.
    """
    real = t1_images(run, run.validation).some(number, "unseen")
    kinds = {"L1": {"kl": False}, "L1 + KL": {}, "L1 + KL + adversarial": {"adversarial": True}}
    found = {}
    for name, losses in kinds.items():
        trained = train_kl_autoencoder(run, **losses)
        coder = trained.model
        seen = coder.decode(coder.encode(real))
        errors = metrics.image_errors(seen, real)
        with torch.no_grad():
            means = torch.cat([coder.network.encode(part.to(best_device()))[0].cpu() for part in real.split(16)])
        found[name] = {kind: float(values.mean()) for kind, values in errors.items()}
        found[name] |= {"edges": edges(seen) / edges(real), "latent_sd": float(means.std()), "seconds": trained.seconds}
    return found


def edges(images: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring voxels of images (N, 1, H, W)."""
    return float(images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()) / 2


def few_steps(run: Run, made: ImageStageResults, tokens: StageResults, number: int) -> dict[str, dict[int, dict]]:
    """:func:`metrics.compare_images` of new images by method and number of sampling steps, and of unseen people.

    Args:
        tokens: with the autoencoder and the denoiser of tokens, from whose label maps images are drawn.
    """
    coder, timesteps = made.models["kl_autoencoder"].model, run.profile.gaussian_denoiser.timesteps
    shape, sets = (number, *made.latents.shape[1:]), {}
    seen = coder.decode(coder.encode(t1_images(run, run.validation).some(number, "unseen")))

    def seeded(purpose: str) -> torch.Generator:
        return run.generator(f"few steps {purpose}", best_device())

    for name, sampler in {"DDIM": "ddim", "rectified flow": "rflow"}.items():
        for steps in FEW_STEPS:
            scheduler = latent_diffusion.new_scheduler(sampler, timesteps, steps)
            model = made.models[STAGE_OF[sampler]].model
            sets[name, steps] = coder.decode(latent_diffusion.sample(model, shape, scheduler, seeded(name)))
    with torch.no_grad():
        start = torch.randn(shape, generator=seeded("student"), device=best_device())
        sets["student", 1] = coder.decode(distillation.one_step(made.models["student"].model, start, timesteps).cpu())
    denoiser, heat = tokens.denoiser.model, run.profile.synthesis.temperature
    for steps in FEW_STEPS:
        drawn = absorbing.sample(
            denoiser, -(-number // 2), denoiser.length, denoiser.mask_token, seeded("tokens"), steps, heat
        )
        labels = decode_labels(tokens.autoencoder.model, drawn.unflatten(1, denoiser.grid)).flatten(0, 1)[:number]
        sets["tokens", steps] = _from_labels(run, made, labels)
    compared = metrics.compare_images(coder.decode(made.latents), seen, sets | {("unseen people", 0): seen})
    found: dict[str, dict[int, dict]] = {}
    for (name, steps), row in compared.items():
        found.setdefault(name, {})[steps] = row
    return found


def retrieval(run: Run, number: int) -> Table:
    """How often the right partner is found among images of unseen people, by the training of the encoders.

    Returns:
        ``found``, the share; ``chance``, what guessing would find.
    """
    t1, flair = both_contrasts(run, run.validation, number, "unseen modalities")
    torch.manual_seed(run.seed_of("encoders"))
    encoders = {
        "untrained": new_encoders(run.profile),
        "all pairs": train_encoders(run).model,
        "few pairs": train_encoders(run, FEW_PAIRS).model,
        "few, with invariant": train_encoders(run, FEW_PAIRS, invariant=True).model,
    }
    with torch.no_grad():
        return {
            name: {"found": modalities.share_found(*model.cpu().eval()(t1, flair)), "chance": 1 / number}
            for name, model in encoders.items()
        }


def reconstructions(run: Run, made: ImageStageResults, number: int) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of the errors of slices of which every fourth line was measured, by method."""
    truth, flair = both_contrasts(run, run.validation, number, "measured")
    measured, steps = reconstruction.measure_lines(truth), run.profile.score_network.sampling_steps
    beside = made.models["score_network"].model.cpu()
    alone = train_score_network(run, beside_flair=False).model.cpu()

    def complete(model: torch.nn.Module, flair: torch.Tensor, steps: int = steps) -> torch.Tensor:
        return reconstruction.reconstruct(model, measured, flair, steps, run.generator("reconstruction"))

    images = {
        "zeros": reconstruction.zero_filled(measured),
        "total variation": reconstruction.least_variation(measured),
        "no FLAIR": complete(alone, torch.zeros_like(flair)),
        "FLAIR": complete(beside, flair),
        "FLAIR, one step": complete(beside, flair, 1),
        "FLAIR of another slice": complete(beside, flair.roll(2, 0)),  # 2n and 2n + 1 are a pair
    }
    return {name: _mean_and_deviation(each.clamp(0, 1), truth) for name, each in images.items()}


def _mean_and_deviation(images: torch.Tensor, truth: torch.Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of each of the errors of :func:`metrics.image_errors`."""
    errors = metrics.image_errors(images, truth)
    return {kind: [float(values.mean()), float(values.std())] for kind, values in errors.items()}
