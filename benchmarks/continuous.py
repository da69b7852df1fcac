"""Do pairs from a continuous diffusion train a registration as well as real pairs, and pairs from tokens?

    python -m benchmarks.continuous runs/images --data DIR --json book/results/continuous.json

The first argument is a run folder of `laptop`, in which the stages of images are trained or found; with
PAIRDIFF_MODELS=models, the tokens come from the pretrained models. What the models of images can do is measured by
``benchmarks/images.py``. Then registration networks with the same settings learn from equally many pairs: real ones,
pairs from tokens, and real fixed images whose moving partners are drawn: as tokens, by a denoiser that is given the
fixed image, or by the diffusion, with and without a ControlNet. Only these networks are trained for each seed. An
interrupted command can be repeated.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.images import autoencoder_losses, few_steps, reconstructions, retrieval, sampled_images, translations
from pairdiff_core.pairs import PairSet, one_hot
from pairdiff_core.pipeline import (
    ImageStageResults,
    Run,
    decode_pairs,
    decode_partners,
    describe_pairs,
    encode_fixed_images,
    encode_training_pairs,
    fixed_with_itself,
    load_or_make,
    number_of_shards,
    run_image_stages,
    run_stages,
    sample_controlled,
    sample_pairs,
    train_denoiser,
    train_registration,
    train_vqae,
)
from pairdiff_core.pipeline.measure import errors_on_phantoms
from pairdiff_core.pipeline.stages import PAIRS_IN_A_SHARD
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import evaluate, register, summarise
from pairdiff_core.storage import fingerprint, load_checkpoint, provenance, write_json
from pairdiff_core.training import best_device
from pairdiff_core.vqae import encode_pairs

PAIRS = 512
STEPS = 300  # of a registration network, of 800 at laptop: twelve are trained
IMAGES = 64  # of unseen people, to translate and to compare with
GIVEN = 0.5  # share of the training pairs whose fixed image is shown, where tokens of partners are drawn
SHARD = 32  # partners that are drawn and saved together
SCALES = {"ControlNet": 1.0, "U-Net alone": 0.0}  # of the control, by the kind of partners


def drawn_partners(run: Run, made: ImageStageResults, pairs: PairSet, kind: str) -> tuple[PairSet, torch.Tensor]:
    """The pairs with drawn partners of their fixed images, and the partners; the run folder keeps their latents."""
    scale = SCALES[kind]

    def draw(shard: int) -> torch.Tensor:
        conditions = one_hot(pairs.fixed[shard * SHARD : (shard + 1) * SHARD], pairs.num_labels)
        return sample_controlled(run, made.models, "controlnet_fixed", conditions, f"partners {shard}", scale)

    inputs = {"pairs": fingerprint(pairs.labels), "control": made.models["controlnet_fixed"].fingerprint}
    inputs |= {"scale": scale, "sampling_steps": run.profile.controlnet_fixed.sampling_steps}
    name = f"partners-{_file_name(kind)}"
    return decode_partners(made.models, pairs, load_or_make(run, name, inputs, draw, -(-len(pairs) // SHARD)))


def partners_from_tokens(run: Run, pairs: PairSet) -> PairSet:
    """The pairs with partners of their fixed images that a denoiser of tokens draws, which is given these images.

    The denoiser is trained as the profile says, except that it is given the fixed image in half of the steps.
    """
    autoencoder = train_vqae(run)
    denoiser = replace(run.profile.denoiser, given=GIVEN)
    # another name, so that no pretrained denoiser is taken: it was not given fixed images
    profile = replace(run.profile, name="given", denoiser=denoiser)
    apart = replace(run, profile=profile, folder=run.path / profile.name)
    tokens, fixed = encode_training_pairs(apart, autoencoder), encode_fixed_images(apart, autoencoder)
    trained = train_denoiser(apart, tokens, fixed)
    shown = encode_pairs(autoencoder.model, fixed_with_itself(pairs.labels))
    parts = shown.split(PAIRS_IN_A_SHARD)
    inputs = {"denoiser": trained.fingerprint, "given": fingerprint(shown)}

    def draw(shard: int) -> torch.Tensor:
        return sample_pairs(apart, trained, shard, parts[shard])

    drawn = decode_pairs(apart, autoencoder, load_or_make(apart, "synthesis", inputs, draw, number_of_shards(apart)))
    return replace(drawn, labels=torch.stack([pairs.fixed, drawn.moving], 1))  # (N, 2, *spatial)


def _file_name(kind: str) -> str:
    return kind.lower().replace(",", "").replace(" ", "-")


def measure_network(run: Run, pairs: PairSet, kind: str, seed: int) -> dict[str, Any]:
    """Train the registration network of one seed on some pairs, and score it alone on the validation pairs."""
    network = train_registration(replace(run, seed=seed, folder=run.path / f"seed{seed}"), pairs, _file_name(kind))
    method = partial(register, profile=run.profile, network=network.model, instance=False)
    row = {"training": kind, "seed": seed}
    score = summarise(list(evaluate(run.validation, method)), run.validation.label_names)
    row |= {key: score[key] for key in ("dice", "hd95_mm", "folding_percent") if key in score}
    if run.dataset == "oasis2d":  # landmarks are known on phantoms only
        row["tre_mm"] = errors_on_phantoms(run, {kind: network})[kind]
    print(seed, kind, f"Dice {score['dice']:.4f}", flush=True)
    return row | {"seconds": network.seconds}


def measure(run: Run, seeds: list[int], number: int = PAIRS, images: int = IMAGES) -> dict[str, Any]:
    """Run or load all stages, and measure translation, new images, pairs, and the networks that learned from them.

    Returns:
        ``losses``, ``translation``, ``images``, ``few_steps``, ``retrieval`` and ``reconstruction``, see
        ``benchmarks/images.py``; ``pairs``, what :func:`describe_pairs` says of each kind of pairs; ``before``, Dice
        and, for OASIS, TRE on phantoms in mm without registration; ``registration``, a row for each kind and seed;
        ``seconds`` of each stage.
    """
    synthesis = replace(run.profile.synthesis, pairs=number)
    run = replace(run, profile=replace(run.profile, synthesis=synthesis))
    made, tokens = run_image_stages(run), run_stages(run, "synthesis")
    chosen = torch.randperm(len(run.train), generator=run.generator("chosen pairs"))[:number]
    real = run.train[chosen]
    sets, partners = {"real": real, "tokens": tokens.synthetic}, {}
    sets["tokens, given fixed"] = partners_from_tokens(run, real)
    for kind in SCALES:
        sets[kind], partners[kind] = drawn_partners(run, made, real, kind)
    measured = {
        "losses": autoencoder_losses(run, images),
        "translation": translations(run, made, images),
        "images": sampled_images(run, made, sets["tokens"], partners, images),
        "few_steps": few_steps(run, made, tokens, images),
        "retrieval": retrieval(run, images),
        "reconstruction": reconstructions(run, made, images),
        "pairs": {kind: {"number": len(pairs)} | describe_pairs(run, pairs) for kind, pairs in sets.items()},
        "before": _before(run),
        "registration": [measure_network(run, pairs, kind, seed) for seed in seeds for kind, pairs in sets.items()],
    }
    made_in = {path.stem: load_checkpoint(path)[1]["seconds"] for path in sorted(run.path.glob("*.safetensors"))}
    given = sorted((run.path / "given").glob("*.safetensors"))
    made_in |= {f"given {path.stem}": load_checkpoint(path)[1]["seconds"] for path in given}
    return measured | {"seconds": made_in}


def _before(run: Run) -> dict[str, float]:
    before = {"dice": summarise(list(evaluate(run.validation, None)), run.validation.label_names)["dice"]}
    return before | ({"tre_mm": errors_on_phantoms(run, {})["before"]} if run.dataset == "oasis2d" else {})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.continuous", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder for everything, the networks of each seed included")
    parser.add_argument("--data", type=Path, help="folder of the real data; default: PAIRDIFF_OASIS2D, PAIRDIFF_DATA")
    parser.add_argument("--json", type=Path, default=Path("book/results/continuous.json"))
    parser.add_argument("--dataset", default="oasis2d")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the registration networks")
    chosen = parser.parse_args()
    profile = get_profile(chosen.profile, 2)
    profile = replace(profile, registration=replace(profile.registration, steps=min(STEPS, profile.registration.steps)))
    run = Run(chosen.dataset, profile, folder=chosen.run, data=chosen.data)
    measured = measure(run, chosen.seeds)
    used = {"train": fingerprint(run.train.labels), "validation": fingerprint(run.validation.labels)}
    made_by = provenance(chosen.profile, run.seed, best_device(), used)
    made_by |= {"dataset": chosen.dataset, "seeds": chosen.seeds, "registration_steps": profile.registration.steps}
    write_json(chosen.json, measured | {"provenance": made_by})


if __name__ == "__main__":
    main()
