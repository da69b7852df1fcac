"""Profiles: found by name or environment, frozen, consistent, and unchanged after conversion to JSON and back."""

import dataclasses
import json

import pytest
import torch

from pairdiff_core.images.latent_diffusion import new_scheduler
from pairdiff_core.pipeline import new_denoiser, new_kl_autoencoder, new_registration, new_vqae
from pairdiff_core.profiles import PROFILES, get_profile, profile_from_json, to_json, trained_settings, with_levels

ALL = {f"{profile.name}-{dims}d": profile for dims, named in PROFILES.items() for profile in named.values()}


def test_quick_is_the_default_and_the_environment_chooses(monkeypatch):
    monkeypatch.delenv("PAIRDIFF_PROFILE", raising=False)
    assert get_profile().name == "quick"
    monkeypatch.setenv("PAIRDIFF_PROFILE", "laptop")
    assert get_profile().name == "laptop" and get_profile(spatial_dims=3).spatial_dims == 3
    assert get_profile("paper").name == "paper"


def test_an_unknown_name_lists_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match="the name is 'large', but the profiles are quick, laptop, paper"):
        get_profile("large")
    monkeypatch.setenv("PAIRDIFF_PROFILE", "tiny")
    with pytest.raises(ValueError, match="PAIRDIFF_PROFILE is 'tiny'"):
        get_profile()


@pytest.mark.parametrize("profile", ALL.values(), ids=ALL)
def test_the_grid_fits_the_networks(profile):
    with torch.device("meta"):
        model, denoiser, network = (new(profile) for new in (new_vqae, new_denoiser, new_registration))
    sizes = [profile.spatial, *([profile.vqae.patches.size] if profile.vqae.patches else [])]
    assert all(model.token_grid(size) for size in sizes)
    assert denoiser.grid == model.token_grid(profile.spatial)
    assert min(profile.spatial) >= network.smallest


@pytest.mark.parametrize("profile", PROFILES[2].values(), ids=PROFILES[2])
def test_the_latents_of_slices_fit_the_unets_and_conditions_and_ddim_its_steps(profile):
    with torch.device("meta"):
        grid = new_kl_autoencoder(profile).latent_grid(profile.spatial)
    halvings = len(profile.kl_autoencoder.channels) - 1
    for stage in ("controlnet_flair", "controlnet_fixed"):
        assert len(getattr(profile, stage).embedding) == halvings + 1, "it makes conditions as small as latents"
    for stage in ("gaussian_denoiser", "rectified_flow"):
        settings = getattr(profile, stage)
        assert not any(size % 2 ** (len(settings.channels) - 1) for size in grid)
        assert new_scheduler("ddim", settings.timesteps, settings.sampling_steps).alphas_cumprod[-1] < 1e-4


def test_paper_3d_has_the_published_numbers_of_tokens_parameters_and_samples():
    paper = get_profile("paper", 3)
    with torch.device("meta"):
        model, denoiser = new_vqae(paper), new_denoiser(paper)
    assert model.token_grid(paper.spatial) == (16, 13, 16) and denoiser.length == 3328
    assert model.network.in_channels == 2 and model.network.out_channels == 4
    assert round(sum(each.numel() for each in model.network.parameters()) / 1e6, 2) == 10.25
    assert round(sum(each.numel() for each in denoiser.parameters()) / 1e6, 1) == 28.0
    assert paper.vqae.steps * paper.vqae.batch == 336_000
    assert paper.denoiser.steps * paper.denoiser.batch == 120_000
    assert get_profile("paper").vqae.steps * get_profile("paper").vqae.batch == 336_000


@pytest.mark.parametrize("profile", ALL.values(), ids=ALL)
def test_a_profile_survives_json(profile):
    content = json.loads(json.dumps(to_json(profile)))
    assert profile_from_json(content) == profile
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile_from_json(content).num_labels = 3
    content["vqae"]["codes"] = "many"
    del content["synthesis"]
    with pytest.raises(ValueError, match=r"^missing or wrong: vqae\.codes, synthesis$"):
        profile_from_json(content)


def test_what_trained_weights_do_not_depend_on_is_left_out_of_their_settings():
    settings = get_profile("laptop").registration
    changed = dataclasses.replace(settings, instance=(), baseline=(), repeats=7, merge=True)
    assert trained_settings(changed) == trained_settings(settings)
    assert trained_settings(dataclasses.replace(settings, squarings=2)) != trained_settings(settings)


def test_fewer_levels_and_steps():
    profile = get_profile("laptop", 3)
    short = with_levels(profile, levels=2, steps=3).registration
    for kept, all_ in (
        (short.baseline, profile.registration.baseline),
        (short.instance, profile.registration.instance),
    ):
        assert kept == tuple(level._replace(steps=3) for level in all_[:2])
    assert with_levels(profile) == profile
    assert with_levels(profile, levels=0).registration.baseline == ()
