"""Do pairs from a continuous diffusion train a registration as well as real pairs, and pairs from tokens?

    python -m benchmarks.continuous --data DIR --runs DIR --json book/results/continuous.json --seeds 0 1 2

For each seed, tokens and all stages of images are run at `laptop`. Registration networks with the same settings then
learn from equally many pairs: real ones, pairs from tokens, and real fixed images whose moving partners the
diffusion has drawn, with and without a ControlNet. An interrupted command can be repeated.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from pairdiff_core import metrics
from pairdiff_core.data.contrasts import draw_images
from pairdiff_core.pipeline import (
    ImageStageResults,
    Run,
    describe_pairs,
    draw_partners,
    run_image_stages,
    run_stages,
    sample_controlled,
    t1_images,
    train_registration,
    translate,
)
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import evaluate, register, summarise
from pairdiff_core.storage import fingerprint, provenance, write_json
from pairdiff_core.training import best_device

PAIRS = 512
IMAGES = 64  # of unseen people, to translate and to compare with


def translations(run: Run, made: ImageStageResults, number: int) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of the errors of T1 images made from FLAIR-like ones, by method."""
    unseen, coder = t1_images(run, run.validation), made.autoencoder.model
    half = -(-number // 2)
    real, labels = unseen.batches(half, "unseen")(0)[:number], unseen.labels(half, "unseen")(0)[:number]
    seeds = [run.generator(f"FLAIR {index}") for index in range(number)]
    flair = draw_images(labels, "FLAIR", run.profile.num_labels, seeds)
    found = {
        "ControlNet": coder.decode(sample_controlled(run, made, "controlnet_flair", flair, "translation")),
        "U-Net": translate(made.plain["translator"], flair),
        "copy": flair,
        "autoencoder": coder.decode(coder.encode(real)),
    }
    errors = {name: metrics.image_errors(images, real) for name, images in found.items()}
    return {
        name: {kind: [float(values.mean()), float(values.std())] for kind, values in each.items()}
        for name, each in errors.items()
    }


def registrations(run: Run, made: ImageStageResults, number: int) -> list[dict[str, Any]]:
    """A row for each set of training pairs: the pairs themselves, and the network that learned from them."""
    five = run_stages(run, "synthesis")
    known, unseen = made.autoencoder.model.decode(made.latents), t1_images(run, run.validation)
    seen = made.autoencoder.model.decode(made.autoencoder.model.encode(unseen.some(IMAGES, "unseen")))
    fixed = run.train[:number]
    controlled, images = draw_partners(run, made, fixed)
    alone, images_alone = draw_partners(run, made, fixed, scale=0.0)
    compared = metrics.compare_images(
        known, seen, {"ControlNet": images[:IMAGES], "U-Net alone": images_alone[:IMAGES]}
    )
    sets = {"real": fixed, "tokens": five.synthetic[:number], "ControlNet": controlled, "U-Net alone": alone}
    rows = []
    for name, pairs in sets.items():
        network = train_registration(run, pairs, f"{name.lower().replace(' ', '-')}-{number}")
        method = partial(register, profile=run.profile, network=network.model, instance=False)
        score = summarise(list(evaluate(run.validation, method)), run.validation.label_names)
        row = {"training": name, "seed": run.seed, "pairs": len(pairs)} | describe_pairs(run, pairs)
        row |= {f"registration_{key}": score[key] for key in ("dice", "hd95_mm", "folding_percent")}
        rows.append(row | compared.get(name, {}))
        print(run.seed, name, f"Dice {score['dice']:.4f}", flush=True)
    return rows


def measure(run: Run, number: int = PAIRS, images: int = IMAGES) -> dict[str, Any]:
    """Run all stages of one seed and measure translation and registration."""
    made = run_image_stages(run)
    return {"seed": run.seed, "translation": translations(run, made, images)} | {
        "registration": registrations(run, made, number)
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.continuous", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data; default: PAIRDIFF_OASIS2D, PAIRDIFF_DATA")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders, one per seed")
    parser.add_argument("--json", type=Path, default=Path("book/results/continuous.json"))
    parser.add_argument("--dataset", default="oasis2d")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    seeds: list[dict[str, Any]] = []
    for number, seed in enumerate(chosen.seeds, start=1):
        profile = get_profile(chosen.profile, 2)
        run = Run(chosen.dataset, profile, seed=seed, folder=chosen.runs / f"seed{seed}", data=chosen.data)
        seeds.append(measure(run))
        used = {"train": fingerprint(run.train.labels), "validation": fingerprint(run.validation.labels)}
        made_by = provenance(chosen.profile, chosen.seeds[0], best_device(), used)
        made_by |= {"dataset": chosen.dataset, "seeds": chosen.seeds[:number]}
        write_json(chosen.json, {"seeds": seeds, "provenance": made_by})


if __name__ == "__main__":
    main()
