"""The models of a run: untrained ones for its profile, and trained ones from a run folder or the pretrained models."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pairdiff_core.absorbing import Denoiser
from pairdiff_core.errors import CheckpointError, DataError
from pairdiff_core.images.controlnet import new_controlnet, new_image_unet
from pairdiff_core.images.latent_diffusion import KLAutoencoder, new_unet
from pairdiff_core.images.modalities import Encoders
from pairdiff_core.images.reconstruction import ScoreNetwork
from pairdiff_core.pipeline.run import Run, open_run
from pairdiff_core.profiles import Profile, trained_settings
from pairdiff_core.registration import RegistrationNetwork
from pairdiff_core.storage import check_config, fingerprint, load_checkpoint
from pairdiff_core.training import History, best_device
from pairdiff_core.vqae import PairedVQAE

MODELS = Path(__file__).parents[2] / "models"  # in a checkout; an installed package has none


def new_vqae(profile: Profile) -> PairedVQAE:
    """The untrained autoencoder of a profile."""
    return PairedVQAE(profile.vqae, profile.spatial_dims, profile.num_labels)


def new_denoiser(profile: Profile) -> Denoiser:
    """The untrained denoiser of a profile, for the tokens of its autoencoder."""
    with torch.device("meta"):  # only its sizes are needed
        grid = new_vqae(profile).token_grid(profile.spatial)
    return Denoiser(profile.denoiser, profile.vqae.codes, grid)


def new_registration(profile: Profile) -> RegistrationNetwork:
    """The untrained registration network of a profile."""
    return RegistrationNetwork(profile.registration, profile.spatial_dims, profile.num_labels - 1)


def new_kl_autoencoder(profile: Profile) -> KLAutoencoder:
    """The untrained autoencoder of grey slices of a profile.

    Raises:
        DataError: for a profile of volumes.
    """
    if profile.kl_autoencoder is None:
        raise DataError("diffusion on images has settings for slices only; choose the data set phantom2d or oasis2d")
    return KLAutoencoder(profile.kl_autoencoder, profile.spatial_dims)


def new_latent_unet(profile: Profile, stage: str) -> nn.Module:
    """The untrained U-Net of one of the stages "gaussian_denoiser", "rectified_flow" and "student" of a profile."""
    settings = profile.gaussian_denoiser if stage == "student" else getattr(profile, stage)
    return new_unet(settings, profile.kl_autoencoder.latent_channels, profile.spatial_dims)


def new_control(profile: Profile, stage: str) -> nn.Module:
    """The untrained ControlNet of one of the stages "controlnet_flair" and "controlnet_fixed" of a profile."""
    conditions = {"controlnet_flair": 1, "controlnet_fixed": profile.num_labels}[stage]
    channels = profile.kl_autoencoder.latent_channels
    return new_controlnet(
        getattr(profile, stage), profile.gaussian_denoiser, channels, conditions, profile.spatial_dims
    )


def new_plain_unet(profile: Profile, stage: str) -> nn.Module:
    """The untrained U-Net of one of the stages "translator" and "segmenter" of a profile."""
    outputs = {"translator": 1, "segmenter": profile.num_labels}[stage]
    return new_image_unet(getattr(profile, stage), outputs, profile.spatial_dims)


def new_encoders(profile: Profile) -> Encoders:
    """The untrained encoders of both contrasts of a profile."""
    return Encoders(profile.encoders, profile.spatial)


def new_score_network(profile: Profile) -> ScoreNetwork:
    """The untrained score network of a profile."""
    return ScoreNetwork(profile.score_network, profile.spatial_dims)


NEW_MODEL: dict[str, Callable[[Profile], nn.Module]] = {
    "vqae": new_vqae,
    "denoiser": new_denoiser,
    "registration": new_registration,
    "kl_autoencoder": new_kl_autoencoder,
    "gaussian_denoiser": partial(new_latent_unet, stage="gaussian_denoiser"),
    "rectified_flow": partial(new_latent_unet, stage="rectified_flow"),
    "controlnet_flair": partial(new_control, stage="controlnet_flair"),
    "controlnet_fixed": partial(new_control, stage="controlnet_fixed"),
    "translator": partial(new_plain_unet, stage="translator"),
    "segmenter": partial(new_plain_unet, stage="segmenter"),
    "student": partial(new_latent_unet, stage="student"),
    "encoders": new_encoders,
    "score_network": new_score_network,
}


class Trained(NamedTuple):
    """A trained model and how it was made."""

    model: nn.Module  # on the device that computes, in evaluation mode
    history: History
    seconds: float  # of training
    loaded: bool  # loaded, not trained in this call
    fingerprint: str  # of the weights


def stage_of(name: str) -> str:
    """The stage of a result: "registration" for "registration-real"."""
    return name.split("-")[0]


def as_trained(model: nn.Module, description: dict[str, Any], *, loaded: bool) -> Trained:
    """A model with its description as a :class:`Trained`."""
    model.to(best_device()).eval()
    weights = fingerprint(*model.state_dict().values())
    return Trained(model, description["history"], description["seconds"], loaded, weights)


def load_trained(path: Path, profile: Profile, inputs: dict[str, object] | None = None) -> Trained:
    """A trained model from its checkpoint; no data are needed.

    Args:
        path: such as ``vqae.safetensors``; its name determines the stage.
        profile: the model must have been trained with its settings of that stage.
        inputs: what it must have been trained on; None for anything.

    Raises:
        CheckpointError: if the file is missing or damaged, or was made with other settings or inputs.
    """
    stage = stage_of(path.stem)
    model, (tensors, description) = NEW_MODEL[stage](profile), load_checkpoint(path)
    was = description["config"]
    check_config(path, was, {"settings": trained_settings(getattr(profile, stage)), "inputs": inputs or was["inputs"]})
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} was trained on images with other axes or labels ({error}). Choose another run."
        ) from error
    return as_trained(model, description, loaded=True)


def load_model(folder: str | Path, name: str) -> Trained:
    """The model ``name``, such as "vqae" or "registration-real", of a run folder or pretrained model.

    If the run took it from a pretrained model (PAIRDIFF_MODELS), it is loaded from there again.

    Raises:
        CheckpointError: as :func:`load_trained`; if there is no such network, the message lists the available ones.
    """
    path, stage, run = Path(folder) / f"{name}.safetensors", stage_of(name), open_run(folder)
    pretrained = None if path.is_file() else chosen_model(run.dataset, run.profile, name)
    if pretrained is not None:  # the run has taken it from there, too
        return load_trained(pretrained, run.profile)
    if not path.is_file():
        found = sorted(file.stem.removeprefix(f"{stage}-") for file in path.parent.glob(f"{stage}*.safetensors"))
        raise CheckpointError(
            f"{folder} holds no {name}; of this stage it holds: {', '.join(found) or 'none'}. Choose one with "
            "--network, or train it."
        )
    return load_trained(path, run.profile)


def default_network(folder: str | Path) -> str:
    """The registration network of a run folder or pretrained model that is used if none is named.

    It is the one trained on real pairs with other people's motions, which is best, else the one of synthetic pairs.
    """
    name = "registration-real-motion"
    return name if (Path(folder) / f"{name}.safetensors").is_file() else "registration-synthetic"


def find_autoencoder(run: Run, fingerprint: str) -> Trained:
    """The autoencoder with these weights, from the run folder, else from the pretrained models that fit the run.

    Raises:
        CheckpointError: if there is none.
    """
    own = run.path / "vqae.safetensors"
    folders = [folder for folder in pretrained_models() if folder.name == f"{run.dataset}-{run.profile.name}"]
    for path in [own] if own.exists() else [folder / own.name for folder in folders]:
        found = load_trained(path, run.profile)
        if found.fingerprint == fingerprint:
            return found
    raise CheckpointError(
        f"{run.path / 'synthesis.safetensors'} was made with a different autoencoder from {own} or the pretrained one. "
        "Set PAIRDIFF_MODELS as it was then, copy both files from one run, or make it again."
    )


def pretrained_models() -> list[Path]:
    """The folders of pretrained models: in the folder that PAIRDIFF_MODELS names, then in the project's ``models``."""
    places = [Path(place) for place in (os.environ.get("PAIRDIFF_MODELS"), MODELS) if place]
    return [file.parent for place in places for file in sorted(place.glob("*/config.json"))]


def find_model(run: str | Path) -> Path:
    """The folder that ``run`` means: that folder itself, else the pretrained model of that name ("oasis2d-laptop").

    Raises:
        CheckpointError: if there is neither; the message lists the pretrained models, or says how to get them.
    """
    if Path(run).is_dir():
        return Path(run)
    models = {folder.name: folder for folder in reversed(pretrained_models())}
    if str(run) not in models:
        use = f"Give a folder or one of: {', '.join(sorted(models))}."
        if not models:  # an installed package comes without them
            use = "No pretrained models are here: download the project's folder models and set PAIRDIFF_MODELS to it."
        raise CheckpointError(f"{run} is neither a folder nor a pretrained model. {use}")
    return models[str(run)]


def chosen_model(dataset: str, profile: Profile, name: str) -> Path | None:
    """The checkpoint among the pretrained models of PAIRDIFF_MODELS that replaces a training, if there is one.

    Raises:
        CheckpointError: if PAIRDIFF_MODELS is not a folder.
    """
    folder = os.environ.get("PAIRDIFF_MODELS")
    if folder and not Path(folder).is_dir():
        raise CheckpointError(
            f"PAIRDIFF_MODELS is {folder!r}, which is not a folder. Set it to the project's folder models, or unset it."
        )
    path = Path(folder or os.devnull) / f"{dataset}-{profile.name}" / f"{name}.safetensors"
    return path if path.exists() else None
