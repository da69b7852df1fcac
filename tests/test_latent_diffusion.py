"""Diffusion on latents: the equations of DDPM and rectified flow, the schedulers, and the autoencoder's contracts."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from pairdiff_core.images import latent_diffusion
from pairdiff_core.profiles import get_profile
from pairdiff_core.training import fit

T = 50


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def betas():
    return torch.linspace(0.1 / T, 20 / T, T)


def batch_of(latents, seed=0):
    return latent_diffusion.training_batch(latents, T, [seeded(seed + index) for index in range(len(latents))])


@pytest.fixture
def settings():
    return replace(get_profile("quick").kl_autoencoder, channels=(4, 8), latent_channels=2)


@pytest.fixture
def autoencoder(settings):
    torch.manual_seed(0)
    return latent_diffusion.KLAutoencoder(settings, 2)


class Perfect(nn.Module):
    """The best possible network for data from a Gaussian with independent numbers: linear in its input."""

    def __init__(self, mean, deviation, kind):
        super().__init__()
        self.mean, self.variance, self.kind = mean, deviation**2, kind

    def forward(self, noisy, times):
        if self.kind == "rflow":
            a = (1 - times / T)[:, None, None, None]
            b = 1 - a
        else:
            share = (1 - betas()).cumprod(0)[times][:, None, None, None]
            a, b = share.sqrt(), (1 - share).sqrt()
        gain = self.variance * a / (a**2 * self.variance + b**2)
        latent = self.mean + gain * (noisy - a * self.mean)
        noise = (noisy - a * latent) / b
        return latent - noise if self.kind == "rflow" else a * noise - b * latent


# ------------------------------------------------------------------------------------------------ equations


def test_noise_is_added_step_by_step():
    """Many steps of q(x_t | x_t-1), by hand, give the distribution that the loss draws from directly."""
    x = torch.full((40_000, 1, 1, 1), 2.0)
    generator = seeded()
    for beta in betas()[:10]:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(x.shape, generator=generator)
    scheduler = latent_diffusion.new_scheduler("ddpm", T)
    direct = scheduler.add_noise(torch.full_like(x, 2.0), torch.randn(x.shape, generator=generator), torch.tensor([9]))
    assert float(x.mean()) == pytest.approx(float(direct.mean()), abs=0.03)
    assert float(x.std()) == pytest.approx(float(direct.std()), abs=0.03)


@pytest.mark.parametrize("timesteps", [100, 1000])
def test_only_noise_is_left_at_the_end(timesteps):
    scheduler = latent_diffusion.new_scheduler("ddpm", timesteps)
    assert scheduler.alphas_cumprod[-1] < 1e-4
    if timesteps == 1000:
        expected = torch.linspace(1e-4, 0.02, 1000)
        torch.testing.assert_close(scheduler.betas, expected, msg="the published schedule")


def test_the_losses_of_perfect_networks_are_the_least_possible():
    latents = 1 + 0.5 * torch.randn(4000, 1, 1, 1, generator=seeded(1))
    batch = batch_of(latents, 10)
    for kind, loss in (("ddpm", latent_diffusion.velocity_loss), ("rflow", latent_diffusion.flow_loss)):
        perfect = Perfect(torch.tensor(1.0), torch.tensor(0.5), kind)
        best = loss(perfect, batch, T)["loss"]
        for factor in (0.9, 1.1):
            assert loss(lambda x, t, p=perfect, f=factor: f * p(x, t), batch, T)["loss"] > best


# ------------------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", None), ("ddim", 50), ("ddim", 25), ("rflow", 25)])
def test_samplers_find_the_distribution_of_the_data(sampler, steps):
    """With the perfect network, samples have the data's mean and spread, which differ from those of the noise."""
    perfect = Perfect(torch.tensor(3.0), torch.tensor(0.3), "rflow" if sampler == "rflow" else "ddpm")
    scheduler = latent_diffusion.new_scheduler(sampler, T, steps)
    found = latent_diffusion.sample(perfect, (4000, 1, 1, 1), scheduler, seeded(3))
    assert float(found.mean()) == pytest.approx(3.0, abs=0.05), "not clipped to 1"
    assert float(found.std()) == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize("steps", [1, 5, 25, 50])
def test_ddim_takes_steps_as_long_as_its_timesteps_are_apart(steps):
    times = latent_diffusion.new_scheduler("ddim", T, steps).timesteps
    assert len(times) == steps and times[0] == T - 1
    assert (times[:-1] - times[1:] == T // steps).all()
    assert times[-1] - T // steps < 0, "the last step ends without noise"


def test_a_sample_depends_on_its_generator_and_only_ddpm_adds_noise():
    perfect = Perfect(torch.tensor(0.0), torch.tensor(1.0), "ddpm")
    for sampler, draws_more in (("ddpm", True), ("ddim", False)):
        scheduler = latent_diffusion.new_scheduler(sampler, T)
        one, same = (latent_diffusion.sample(perfect, (2, 1, 4, 4), scheduler, seeded(5)) for _ in range(2))
        assert torch.equal(one, same)
        start = torch.randn((2, 1, 4, 4), generator=seeded(5))
        *_, other = latent_diffusion.denoise(perfect, start, scheduler, seeded(6))
        assert torch.equal(one, other) != draws_more


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="samplers are ddpm, ddim, rflow, not 'euler'"):
        latent_diffusion.new_scheduler("euler", T)
    for sampler, steps in (("ddpm", 25), ("ddim", 0), ("ddim", 20), ("rflow", 51)):
        with pytest.raises(ValueError, match=f"{sampler} cannot take {steps} steps of 50"):
            latent_diffusion.new_scheduler(sampler, T, steps)
    with pytest.raises(ValueError, match="20 timesteps are too few"):
        latent_diffusion.new_scheduler("ddpm", 20)


def test_each_latent_has_its_own_noise_and_timestep():
    latents = torch.zeros(3, 2, 4, 4)
    batch = batch_of(latents)
    assert batch.noise.shape == latents.shape and 0 <= int(batch.timesteps.min()) <= int(batch.timesteps.max()) < T
    torch.testing.assert_close(batch_of(latents[1:], 1).noise, batch.noise[1:])


# --------------------------------------------------------------------------------------------- the autoencoder


def test_sizes_that_monai_would_shrink_are_refused(autoencoder):
    images = torch.rand(1, 1, 15, 16)
    assert autoencoder.network.reconstruct(images).shape != images.shape, "MONAI says nothing"
    for part in (autoencoder, autoencoder.encode):
        with pytest.raises(ValueError, match=r"must be multiples of 2, got \(15, 16\)"):
            part(images)
    assert autoencoder.latent_grid((16, 24)) == (8, 12)


def test_the_kl_divergence_is_that_of_the_latents_gaussians(autoencoder):
    images = torch.rand(3, 1, 16, 16, generator=seeded())
    terms = latent_diffusion.autoencoder_loss(autoencoder.eval(), images, 0.25)
    mean, deviation = autoencoder.network.encode(images)
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, deviation), standard).mean()
    torch.testing.assert_close(terms["kl"], expected)
    torch.testing.assert_close(terms["loss"], terms["l1"] + 0.25 * terms["kl"])


def test_latents_are_standardised_and_decoded_as_they_were(autoencoder, settings):
    images = torch.rand(64, 1, 16, 16, generator=seeded())
    short = replace(settings, steps=400, learning_rate=2e-3)
    loss = partial(latent_diffusion.autoencoder_loss, kl_weight=1e-4)
    history = fit(autoencoder, loss, lambda step: images[torch.arange(8) + 8 * (step % 8)], short)
    assert history[-1]["l1"] < history[0]["l1"]
    latents = autoencoder.encode(images)
    assert latents.shape == (64, 2, 8, 8)
    assert latents.mean((0, 2, 3)).abs().max() < 0.3 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.3
    with torch.no_grad():
        expected = autoencoder.network.reconstruct(images).clamp(0, 1)
    torch.testing.assert_close(autoencoder.decode(latents), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_networks_work_in_2d_and_3d(settings, dims):
    model = latent_diffusion.KLAutoencoder(settings, dims)
    images = torch.rand(2, 1, *[8] * dims)
    assert model(images).images.shape == images.shape
    sizes = replace(get_profile("quick").gaussian_denoiser, channels=(4, 8))
    unet = latent_diffusion.new_unet(sizes, settings.latent_channels, dims)
    latents = model.eval().encode(images)
    assert unet(latents, torch.tensor([0, 3])).shape == latents.shape == (2, 2, *[4] * dims)


def test_an_untrained_unet_predicts_zero():
    """MONAI's last convolution starts at zero, so the first loss is the mean square of the target."""
    torch.manual_seed(0)
    unet = latent_diffusion.new_unet(replace(get_profile("quick").gaussian_denoiser, channels=(4, 8)), 2, 2)
    batch = batch_of(torch.randn(8, 2, 4, 4, generator=seeded(1)))
    expected = float((batch.latents - batch.noise).square().mean())
    assert latent_diffusion.flow_loss(unet, batch, T)["loss"].item() == pytest.approx(expected, rel=1e-5)
