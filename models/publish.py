"""Publish a pretrained model: store the networks of one measured run in half precision.

    python -m models.publish RUN_FOLDER models/oasis2d-laptop
    python -m models.publish RUN_FOLDER models/oasis2d-laptop --images

The folder gets three checkpoints and ``config.json``, ``measured.json`` with the results of these files, and the model
card ``README.md``. With ``--images``, the networks of image diffusion are added to such a folder. If
``PAIRDIFF_MODELS`` names ``models``, these networks are loaded instead of trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from pairdiff_core import pipeline
from pairdiff_core.pipeline import Run, Trained, default_network, describe_vqae, load_model, open_run
from pairdiff_core.profiles import IMAGE_STAGES
from pairdiff_core.registration import evaluate, register, summarise
from pairdiff_core.storage import (
    fingerprint,
    load_checkpoint,
    provenance,
    rounded,
    save_checkpoint,
    write_file,
    write_json,
)
from pairdiff_core.training import best_device

PHANTOMS = {2: ("phantom2d", 6), 3: ("phantom3d", 2)}  # by dimensions: the data set, and the number of pairs
DATA = {
    "oasis2d": "Label slices of 14 subjects in the layout of neurite-oasis 2D, made from the label maps that come with "
    "SynthSeg (Billot et al., 2023; Apache-2.0). Subjects 01 to 11 were trained on, 12 to 14 were not. No OASIS image "
    "was used.",
    "lung250m": "The vessel pairs of 10 people published with Heinrich (2024), derived from Lung250M-4B (Falta et al., "
    "2023), and the motions of 79 people from the latter, computed from CTs: research data; whoever "
    "uses the model should cite both. None of the 17 validation cases was trained on.",
}
TRAINED_ON = {
    "registration-synthetic": "was trained on synthetic pairs only",
    "registration-real-motion": "was trained on real pairs, also moved by other people's breathing",
}
IMAGE_MODELS = tuple(stage for stage in IMAGE_STAGES if stage != "latents")
IMAGES = (
    "The folder also holds the networks of image diffusion, {}, which learned from T1-like and FLAIR-like images of "
    "the same training subjects, drawn from their label maps. `book/results/continuous.json` has their results.\n\n"
)
COLUMNS = {"dice": "Dice", "tre_mm": "target registration error, mm", "folding_percent": "folding, % of the voxels"}
ROWS = {"before": "before", "network": "network", "network_instance": "network and instance optimisation"}


def halve(run_folder: str | Path, folder: str | Path, names: Sequence[str]) -> None:
    """Copy networks of a finished run in half precision; the codes keep their full precision.

    Raises:
        CheckpointError: if a network is missing or damaged, or cannot be written.
    """
    found = {name: load_checkpoint(Path(run_folder) / f"{name}.safetensors") for name in names}
    for name, (tensors, description) in found.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and key != "codebook.vectors":
                tensors[key] = tensor.half()
        save_checkpoint(Path(folder) / f"{name}.safetensors", tensors, rounded(description))


def measure(folder: str | Path, data: str | Path | None = None) -> dict[str, Any]:
    """Measure the networks in a folder; returns the content of ``measured.json``.

    Args:
        data: folder of the real data; None looks where the environment variables say.

    Returns:
        ``network``: the registration network; ``validation``: ``vqae_dice``, ``bits_per_token``, and the available
        ``COLUMNS`` of each of ``ROWS``; ``phantom``: see :func:`measure_on_phantoms`; ``provenance``.
    """
    run = open_run(folder, data)
    names = ("vqae", "denoiser", default_network(folder))
    autoencoder, denoiser, network = (load_model(folder, name) for name in names)
    scores = {"vqae_dice": describe_vqae(run, autoencoder, run.validation)["dice"]}
    scores |= pipeline.describe_denoiser(run, autoencoder, denoiser, run.validation)
    scores |= _registration(run, network, ROWS)
    used = {"train": fingerprint(run.train.labels), "validation": fingerprint(run.validation.labels)}
    made_by = provenance(run.profile.name, run.seed, best_device(), used) | {"dataset": run.dataset}
    return {
        "network": default_network(folder),
        "validation": scores,
        "phantom": measure_on_phantoms(folder),
        "provenance": made_by,
    }


def measure_on_phantoms(folder: str | Path) -> dict[str, float]:
    """Dice on a few phantom pairs, which needs no data: of the autoencoder, and before and after the network."""
    profile = open_run(folder).profile
    dataset, number = PHANTOMS[profile.spatial_dims]
    run = Run(dataset, replace(profile, max_pairs=number, phantom_subjects=3))
    autoencoder, network = (load_model(folder, name) for name in ("vqae", default_network(folder)))
    scores = _registration(run, network, ("before", "network"))
    scores["vqae_dice"] = describe_vqae(run, autoencoder, run.validation)["dice"]
    return {name: scores[name] for name in ("vqae_dice", "dice_before", "dice_network")}


def _registration(run: Run, network: Trained, rows: Sequence[str]) -> dict[str, float]:
    """The ``COLUMNS`` of some ``ROWS`` on the validation pairs, such as ``dice_before``."""
    by_network = partial(register, profile=run.profile, network=network.model)
    methods = {"before": None, "network": partial(by_network, instance=False), "network_instance": by_network}
    cases = {name: list(evaluate(run.validation, methods[name])) for name in rows}
    found = {name: summarise(cases[name], run.validation.label_names) for name in rows}
    return {f"{key}_{name}": row[key] for name, row in found.items() for key in COLUMNS if key in row}


def write_card(folder: str | Path, measured: dict[str, Any]) -> None:
    """Write the model card ``README.md`` of a folder, with the numbers of ``measured``."""
    made_by, reached = measured["provenance"], measured["validation"]
    columns = [key for key in COLUMNS if f"{key}_network" in reached]
    table = [["", *(COLUMNS[key] for key in columns)], ["---"] * (len(columns) + 1)]
    for row, title in ROWS.items():
        cells = [reached.get(f"{key}_{row}") for key in columns]
        table.append([title, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    numbers = reached | {f"phantom_{name}": value for name, value in measured["phantom"].items()}
    texts = {name: f"{value:.3f}" for name, value in numbers.items() if value is not None}
    texts |= {"name": Path(folder).resolve().name, "profile": made_by["profile"], "seed": made_by["seed"]}
    texts |= {
        "trained_on": TRAINED_ON[measured["network"]],
        "data": DATA.get(made_by["dataset"], "Phantoms."),
        "table": "\n".join("| " + " | ".join(row) + " |" for row in table),
        "images": "",
    }
    if names := measured.get("images"):
        texts["images"] = IMAGES.format(", ".join(f"`{name}`" for name in names))
    card = Template(Path(__file__).with_name("model_card.md").read_text()).substitute(texts)
    (Path(folder) / "README.md").write_text(card)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a pretrained model of a finished run, measure it, and write its card."""
    parser = argparse.ArgumentParser(prog="python -m models.publish", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder with the finished stages")
    parser.add_argument("folder", type=Path, help="folder to write, such as models/oasis2d-laptop")
    parser.add_argument("--data", type=Path, help="folder of the real data; default: the environment variables")
    parser.add_argument("--images", action="store_true", help="add the networks of image diffusion to the folder")
    chosen = parser.parse_args(arguments)
    if chosen.images:
        measured = json.loads((chosen.folder / "measured.json").read_text()) | {"images": IMAGE_MODELS}
        halve(chosen.run, chosen.folder, IMAGE_MODELS)
    else:
        halve(chosen.run, chosen.folder, ("vqae", "denoiser", default_network(chosen.run)))
        write_file(chosen.folder / "config.json", (chosen.run / "config.json").read_bytes())
        measured = measure(chosen.folder, chosen.data)
    write_json(chosen.folder / "measured.json", measured)
    write_card(chosen.folder, measured)
    print((chosen.folder / "README.md").read_text())


if __name__ == "__main__":
    main()
