"""Slices from a part of their Fourier transform: what was measured stays, and the prior fills in the rest."""

import math

import pytest
import torch
from small_run import small_image_run
from torch import nn

from pairdiff_core import pipeline
from pairdiff_core.images import reconstruction
from pairdiff_core.profiles import ScoreNetworkSettings

SETTINGS = ScoreNetworkSettings(channels=(4, 8), steps=2, batch=1, learning_rate=1e-3, sampling_steps=4)


def squares(number=2):
    images = torch.zeros(number, 1, 32, 40)
    for index in range(number):
        images[index, 0, 6 + 3 * index : 20 + index, 8:30] = 0.7
    return images


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_all_lines_give_the_image_back():
    images = squares()
    measured = reconstruction.measure_lines(images, every=1)
    assert measured.lines.all()
    torch.testing.assert_close(reconstruction.zero_filled(measured), images)
    torch.testing.assert_close(reconstruction.replace_measured(torch.rand(images.shape), measured), images)


def test_a_third_of_the_lines_is_measured_and_replaces_only_these():
    images = squares()
    measured = reconstruction.measure_lines(images)
    assert measured.lines[:4].all() and measured.lines[-4:].all() and 0.3 < measured.lines.float().mean() < 0.45
    other = torch.rand(images.shape, generator=seeded())
    mixed = torch.fft.fft2(reconstruction.replace_measured(other, measured), norm="ortho")
    missing = ~measured.lines.expand(32, 40)
    torch.testing.assert_close(mixed[..., ~missing], measured.values[..., ~missing], atol=1e-5, rtol=0)
    kept = torch.fft.fft2(other, norm="ortho")[..., missing]
    torch.testing.assert_close(mixed[..., missing], kept, atol=1e-5, rtol=0)


def test_least_variation_is_nearer_than_zeros_and_agrees_with_the_measurement():
    images = squares()
    measured = reconstruction.measure_lines(images)
    found = reconstruction.least_variation(measured)
    torch.testing.assert_close(reconstruction.replace_measured(found, measured), found, atol=1e-5, rtol=0)
    assert (found - images).square().mean() < 0.5 * (reconstruction.zero_filled(measured) - images).square().mean()


def test_a_perfect_denoiser_reconstructs_exactly():
    images = squares()

    class Knows(nn.Module):
        def forward(self, noisy, sigma, flair):
            return flair

    measured = reconstruction.measure_lines(images)
    found = reconstruction.reconstruct(Knows(), measured, images, 3, seeded())
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)


def test_a_reconstruction_agrees_with_the_measurement_and_repeats():
    images = squares()
    measured = reconstruction.measure_lines(images)
    torch.manual_seed(0)
    network = reconstruction.ScoreNetwork(SETTINGS, 2).eval()
    first, again, other = (
        reconstruction.reconstruct(network, measured, torch.zeros_like(images), 4, seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(reconstruction.replace_measured(first, measured), first, atol=1e-4, rtol=0)


def test_without_noise_the_network_changes_nothing():
    network = reconstruction.ScoreNetwork(SETTINGS, 2).eval()
    images, sigma = squares(), torch.full((2, 1, 1, 1), 1e-4)
    with torch.no_grad():
        torch.testing.assert_close(network(images, sigma, images), images, atol=1e-3, rtol=0)


def test_the_score_of_a_normal_distribution_follows_from_its_best_denoiser():
    m, s, sigma = 1.0, 0.5, 0.3
    x = torch.linspace(-1, 3, 9, requires_grad=True)
    density = torch.distributions.Normal(m, math.hypot(s, sigma)).log_prob(x).sum()
    best = m + s**2 / (s**2 + sigma**2) * (x - m)
    torch.testing.assert_close(torch.autograd.grad(density, x)[0], ((best - x) / sigma**2).detach())


def test_the_loss_counts_levels_alike_and_is_zero_for_the_truth():
    images = squares()

    class Off(nn.Module):  # off by a share of what a scaled network would see
        def forward(self, noisy, sigma, flair):
            return images + self.share * sigma * reconstruction.SPREAD / (sigma**2 + reconstruction.SPREAD**2).sqrt()

    found = []
    for share, level in ((0.0, 0.1), (0.5, 0.05), (0.5, 2.0)):
        model = Off()
        model.share = share
        batch = reconstruction.Batch(images, torch.randn(images.shape), torch.full((2, 1, 1, 1), level), images)
        found.append(float(reconstruction.denoising_loss(model, batch)["loss"]))
    assert found[0] == 0
    assert found[1] == pytest.approx(0.25) and found[2] == pytest.approx(0.25)


def test_the_network_beside_zeros_is_another_one(images_made, tmp_path):
    run, made = small_image_run(tmp_path / "run"), images_made[1]
    alone = pipeline.train_score_network(run, beside_flair=False)
    assert alone.fingerprint != made.models["score_network"].fingerprint
    assert (run.path / "score_network-alone.safetensors").is_file()
