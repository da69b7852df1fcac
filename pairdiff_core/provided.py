"""Provided models: the networks of one measured run in half precision, small enough to be part of the project.

``models/<dataset>-<profile>`` holds three checkpoints, ``measured.json`` with what these very files reach, and the
model card ``README.md``, written from it. With ``PAIRDIFF_MODELS`` naming the folder ``models``, every stage that is
there is taken from it instead of being trained (:func:`pairdiff_core.runs.load_or_train`).

``python -m pairdiff_core.provided --help`` says how to make such a folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pairdiff_core import pipeline, results, vqae
from pairdiff_core.checkpoints import CheckpointError, load_checkpoint, load_into, provenance, save_checkpoint
from pairdiff_core.data import DATASETS
from pairdiff_core.fields import warp_labels
from pairdiff_core.metrics import mean_dice
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Augmentation, Profile, RegistrationProfile, get_profile
from pairdiff_core.resume import AFTERWARDS
from pairdiff_core.runs import Run, Stage, fingerprint
from pairdiff_core.training import best_device

STAGES: dict[str, Callable[[Profile], nn.Module]] = {
    "vqae": pipeline.new_vqae,
    "denoiser": pipeline.new_denoiser,
    "registration-synthetic": pipeline.new_registration,
}
MODELS = Path(__file__).parent.parent / "models"  # in a checkout; an installed package has none
PHANTOMS = {2: "phantom2d", 3: "phantom3d"}
PHANTOM_PAIRS = {2: 6, 3: 2}  # drawn pairs that a model is tried on, where no data are needed


def export(run_folder: str | Path, folder: str | Path) -> None:
    """Write the networks of a finished run in half precision; the codebook keeps its full precision.

    Args:
        run_folder: holds the checkpoints of the stages ``STAGES``.
        folder: to write to, such as ``models/oasis2d-laptop``.

    Raises:
        CheckpointError: if a stage is missing or damaged, or cannot be written.
    """
    stages = {name: load_checkpoint(Path(run_folder) / f"{name}.safetensors") for name in STAGES}
    for name, (tensors, metadata) in stages.items():
        halved = {
            key: tensor.half() if tensor.is_floating_point() and not key.startswith("codebook.") else tensor
            for key, tensor in tensors.items()
        }
        save_checkpoint(Path(folder) / f"{name}.safetensors", halved, metadata)


def load(folder: str | Path) -> dict[str, Stage]:
    """The networks of a provided model, by the names of ``STAGES``, ready to use; no data are needed.

    Raises:
        CheckpointError: if a file is missing or damaged, or was made with another profile than this version has.
    """
    return {name: load_stage(folder, name, new_model)[1] for name, new_model in STAGES.items()}


def load_stage(
    folder: str | Path, name: str, new_model: Callable[[Profile], nn.Module]
) -> tuple[Profile, Stage]:
    """One network of a run folder or provided model, ready to use, and its profile; no data are needed.

    The profile's registration settings are those that a registration network was trained with: scale and squarings
    leave no trace in its weights, but other ones would give other fields. What does not matter to training, as the
    steps of optimisers, is as this version has it.

    Raises:
        CheckpointError: as :func:`load`.
    """
    path = Path(folder) / f"{name}.safetensors"
    metadata = load_checkpoint(path)[1]
    try:
        profile = get_profile(metadata["provenance"]["profile"], DATASETS[metadata["dataset"]])
        if name.startswith("registration-"):
            profile = replace(
                profile, registration=_registration_of(metadata["config"]["numbers"], profile.registration)
            )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not tell how it was made ({error}). Train it again.") from error
    model = new_model(profile)
    load_into(model, path)
    model.to(best_device()).eval()
    weights = fingerprint(*model.state_dict().values())
    return profile, Stage(model, metadata["history"], metadata["seconds"], loaded=True, fingerprint=weights)


def _registration_of(numbers: dict[str, Any], today: RegistrationProfile) -> RegistrationProfile:
    """The settings as a checkpoint describes them, but for those that come after training, which are today's."""
    known = {key: value for key, value in numbers.items() if key not in AFTERWARDS}
    warps = numbers.get("augmentation")  # tuples and dataclasses have become lists and dictionaries
    known |= {"channels": tuple(numbers["channels"]), "augmentation": warps and Augmentation(**warps)}
    return replace(today, **known)


def folders() -> list[Path]:
    """The provided models here: those in the folder that PAIRDIFF_MODELS names, then in ``models`` of the project."""
    places = [Path(place) for place in (os.environ.get("PAIRDIFF_MODELS"), MODELS) if place]
    return [
        file.parent for place in places for file in sorted(place.glob("*/registration-synthetic.safetensors"))
    ]


def find(run: str | Path) -> Path:
    """The folder that ``run`` means: that folder itself, else the provided model of that name, as "oasis2d-laptop".

    Raises:
        CheckpointError: if there is neither; the message lists the provided models.
    """
    if Path(run).is_dir():
        return Path(run)
    models = folders()
    found = next((folder for folder in models if folder.name == str(run)), None)
    if found is None:
        names = ", ".join(sorted({folder.name for folder in models})) or "(none)"
        raise CheckpointError(
            f"{run} is no folder and no provided model. Give a run folder, or one of: {names}."
        )
    return found


def measure(run: Run, folder: str | Path) -> dict[str, Any]:
    """What the files in a folder reach on the test pairs of the run that they come from, and on drawn pairs.

    Returns:
        ``test``: ``vqae_dice``, ``bits_per_token``, and for ``before``, ``network`` and ``network_instance`` the Dice,
        the target registration error (mm, where landmarks are known) and the folding (percent of the voxels);
        ``phantom``: see :func:`measure_on_phantoms`; ``provenance`` of this measuring.
    """
    stages, pairs = load(folder), run.test
    scores: dict[str, Any] = {"vqae_dice": results.describe_vqae(run, stages["vqae"], pairs)["dice"]}
    scores |= results.describe_denoiser(run, stages["vqae"], stages["denoiser"], pairs)
    network = stages["registration-synthetic"]
    found = {
        "before": None,
        "network": pipeline.register_pairs(run, pairs, network),
        "network_instance": pipeline.register_pairs(run, pairs, network, instance=True),
    }
    for name, deformation in found.items():
        row = results.score(pairs, deformation)
        scores |= {f"{key}_{name}": row[key] for key in ("dice", "tre_mm", "folding_percent") if key in row}
    data = {"train pairs": fingerprint(run.train.labels), "test pairs": fingerprint(pairs.labels)}
    made_by = provenance(run.profile.name, run.seed, best_device(), data) | {"dataset": run.dataset}
    return {"test": scores, "phantom": measure_on_phantoms(folder, run.profile), "provenance": made_by}


def measure_on_phantoms(folder: str | Path, profile: Profile) -> dict[str, float]:
    """Dice on a few drawn pairs, which anybody can repeat: of the autoencoder, and before and after the network."""
    dims = len(profile.spatial)
    drawn = Run(PHANTOMS[dims], replace(profile, max_pairs=PHANTOM_PAIRS[dims], phantom_subjects=3))
    stages, pairs = load(folder), drawn.test
    decoded = vqae.decode_labels(stages["vqae"].model, vqae.encode_pairs(stages["vqae"].model, pairs.labels))
    found = pipeline.register_pairs(drawn, pairs, stages["registration-synthetic"])
    return {
        "vqae_dice": _dice(decoded.flatten(0, 1), pairs.labels.flatten(0, 1), pairs),
        "dice_before": _dice(pairs.moving, pairs.fixed, pairs),
        "dice_network": _dice(warp_labels(pairs.moving, found.displacement), pairs.fixed, pairs),
    }


def _dice(found: torch.Tensor, expected: torch.Tensor, pairs: PairSet) -> float:
    return float(mean_dice(found, expected, pairs.num_labels).mean())


DATA = {
    "oasis2d": "Label slices of 14 subjects in the layout of neurite-oasis 2D, made from the label maps that come with "
    "SynthSeg (Billot et al., 2023; Apache-2.0). Subjects 01 to 11 were trained on, 12 to 14 were not. No OASIS image "
    "was used.",
    "lung250m": "The vessel pairs of 10 people published with Heinrich (2024), derived from Lung250M-4B (Falta et al., "
    "2023): research data; whoever uses the model should cite both. The 17 validation cases were not trained on.",
}
COLUMNS = {
    "dice": "Dice",
    "tre_mm": "target registration error, mm",
    "folding_percent": "folding, % of the voxels",
}
ROWS = {
    "before": "before",
    "network": "network",
    "network_instance": "network and instance optimisation",
}


def write_card(folder: str | Path, measured: dict[str, Any]) -> None:
    """Write the model card ``README.md`` of a folder; all its numbers are those of ``measured``."""
    made_by, test, phantom = measured["provenance"], measured["test"], measured["phantom"]
    columns = {key: title for key, title in COLUMNS.items() if f"{key}_network" in test}
    table = [["", *columns.values()], ["---"] * (len(columns) + 1)]
    for row, title in ROWS.items():
        cells = [test.get(f"{key}_{row}") for key in columns]
        table.append([title, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    lines = [
        f"# {Path(folder).name}",
        f"The three networks of one run of PairDiff at the profile `{made_by['profile']}`, in half precision: the "
        "paired VQ autoencoder, the denoiser, and the registration network that was trained on synthetic pairs only.",
        f"**Data and their terms.** {DATA[made_by['dataset']]}",
        "**Licence of the weights.** Apache-2.0, as the code, as far as the terms of the data allow.",
        "**For.** Starting the chapters without training (`PAIRDIFF_MODELS`), and comparing with.",
        "**Not for.** Patients: nothing here was tested for any medical use. Other grids, other labels or other organs "
        "than those trained on. And synthetic pairs are not data of new people: read the memorisation audit in the "
        "results first.",
        "## Measured",
        "With these very files, on the pairs of people who were not trained on:",
        "\n".join("| " + " | ".join(cells) + " |" for cells in table),
        "Instance optimisation alone, without any network, is the baseline of the book. Its results tell what a "
        "network adds to it, which may be nothing.",
        f"The autoencoder restores these pairs with a Dice of {test['vqae_dice']:.3f}, and the denoiser needs "
        f"{test['bits_per_token']:.3f} bits for one of their tokens.",
        "On drawn pairs, which need no data (`pairdiff_core.provided.measure_on_phantoms`), the autoencoder has a Dice "
        f"of {phantom['vqae_dice']:.3f}, and the registration network takes the Dice between the images from "
        f"{phantom['dice_before']:.3f} to {phantom['dice_network']:.3f}.",
        "## Provenance",
        f"Seed {made_by['seed']}. The header of each file says with which commit, settings and data it was trained; "
        "`measured.json` where and with what the numbers above were measured.",
    ]
    (Path(folder) / "README.md").write_text("\n\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a provided model of a finished run, measure it, and write its card."""
    parser = argparse.ArgumentParser(prog="python -m pairdiff_core.provided", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder with the finished stages")
    parser.add_argument("folder", type=Path, help="folder to write, such as models/oasis2d-laptop")
    parser.add_argument(
        "--data", type=Path, help="folder of the real data; default: the environment variables"
    )
    chosen = parser.parse_args(arguments)
    export(chosen.run, chosen.folder)
    metadata = load_checkpoint(chosen.folder / "vqae.safetensors")[1]
    dataset, made_by = metadata["dataset"], metadata["provenance"]
    run = Run(
        dataset, get_profile(made_by["profile"], DATASETS[dataset]), made_by["seed"], chosen.run, chosen.data
    )
    measured = measure(run, chosen.folder)
    results.write_results(chosen.folder / "measured.json", measured)
    write_card(chosen.folder, measured)
    print((chosen.folder / "README.md").read_text())


if __name__ == "__main__":
    main()
