"""Profiles: found by name or environment, frozen, and consistent in themselves."""

import dataclasses

import pytest
import torch

from pairdiff_core.absorbing import Denoiser
from pairdiff_core.profiles import PROFILES, get_profile
from pairdiff_core.vqae import PairedVQAE

ALL = {
    f"{profile.name}-{dims}d": (dims, profile)
    for dims, named in PROFILES.items()
    for profile in named.values()
}


def test_quick_is_the_default_and_the_environment_chooses(monkeypatch):
    monkeypatch.delenv("PAIRDIFF_PROFILE", raising=False)
    assert get_profile().name == "quick"
    monkeypatch.setenv("PAIRDIFF_PROFILE", "laptop")
    assert get_profile().name == "laptop"
    assert get_profile("paper").name == "paper"


def test_an_unknown_name_lists_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match="'large', but the profiles are quick, laptop, paper"):
        get_profile("large")
    monkeypatch.setenv("PAIRDIFF_PROFILE", "tiny")
    with pytest.raises(ValueError, match="PAIRDIFF_PROFILE is 'tiny'"):
        get_profile()


def test_profiles_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_profile("quick").num_labels = 3


@pytest.mark.parametrize("dims, profile", ALL.values(), ids=ALL)
def test_the_grid_fits_the_networks(dims, profile):
    assert len(profile.spatial) == dims
    assert len(profile.vqae.channels) == len(profile.vqae.strides)
    with torch.device("meta"):
        model = PairedVQAE(
            dims, profile.num_labels, profile.vqae.channels, profile.vqae.strides, profile.vqae.codes
        )
    sizes = [profile.spatial, *([profile.vqae.patches.size] if profile.vqae.patches else [])]
    assert all(model.token_grid(size) for size in sizes)
    assert min(profile.spatial) // profile.registration.scale >= 16, "the U-Net halves its grid four times"
    assert profile.diffusion.width % profile.diffusion.heads == 0


def test_paper_3d_has_the_published_numbers_of_tokens_and_parameters():
    paper = get_profile("paper", 3)
    numbers, network = paper.vqae, paper.diffusion
    with torch.device("meta"):
        model = PairedVQAE(3, 2, numbers.channels, numbers.strides, numbers.codes)
        grid = model.token_grid(paper.spatial)
        denoiser = Denoiser(
            numbers.codes, grid, network.layers, network.width, network.heads, network.feed_forward
        )
    assert grid == (16, 13, 16) and numbers.steps * numbers.batch == 336_000
    assert round(sum(p.numel() for p in model.network.parameters()) / 1e6, 2) == 10.25
    assert round(sum(p.numel() for p in denoiser.parameters()) / 1e6, 1) == 28.0


def test_paper_has_the_published_sizes():
    paper = get_profile("paper")
    assert paper.vqae.channels == (48, 48, 64, 64, 128, 192, 256, 384) and paper.vqae.codes == 1024
    assert paper.vqae.steps * paper.vqae.batch == 336_000
    denoiser = paper.diffusion
    assert (denoiser.layers, denoiser.width, denoiser.heads, denoiser.feed_forward) == (12, 512, 16, 1024)
    assert denoiser.steps * denoiser.batch == 120_000
    assert (paper.synthesis.pairs, paper.synthesis.steps, paper.synthesis.temperature) == (256, 256, 0.9)
    assert paper.registration.channels == (8, 16, 32, 64, 64, 64)
