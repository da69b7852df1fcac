"""Control of a diffusion: an untrained ControlNet changes nothing, a trained one steers, and the U-Net stays locked."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pairdiff_core.images import controlnet, latent_diffusion
from pairdiff_core.profiles import ControlNetSettings, get_profile
from pairdiff_core.training import fit

T = 40
DIFFUSION = replace(get_profile("quick").gaussian_denoiser, channels=(4, 8), timesteps=T)
SETTINGS = ControlNetSettings(embedding=(4, 8), steps=150, batch=8, learning_rate=1e-2, average=0.0, sampling_steps=5)


def networks(dims=2):
    """A U-Net whose last layer is not zero, as if trained, and a ControlNet that starts as a copy of its encoder."""
    torch.manual_seed(0)
    unet = latent_diffusion.new_unet(DIFFUSION, 2, dims).requires_grad_(False)
    nn.init.normal_(unet.out[-1].conv.weight, std=0.1)
    control = controlnet.new_controlnet(SETTINGS, DIFFUSION, 2, 1, dims)
    controlnet.copy_encoder(control, unet)
    return unet.eval(), control


@pytest.mark.parametrize("dims", [2, 3])
def test_before_training_the_output_is_that_of_the_unet_bit_for_bit(dims):
    unet, control = networks(dims)
    noisy, times = torch.randn(3, 2, *[4] * dims), torch.tensor([0, 7, 39])
    with torch.no_grad():
        alone = unet(noisy, times)
        assert alone.abs().max() > 0
        assert torch.equal(controlnet.controlled(unet, control, torch.rand(3, 1, *[8] * dims))(noisy, times), alone)
        nn.init.ones_(control.controlnet_mid_block.conv.weight)
        steered = controlnet.controlled(unet, control, torch.rand(3, 1, *[8] * dims))(noisy, times)
        assert not torch.equal(steered, alone)
        without = controlnet.controlled(unet, control, torch.rand(3, 1, *[8] * dims), scale=0.0)(noisy, times)
        assert torch.equal(without, alone)


def test_exactly_the_encoder_is_copied():
    unet, control = networks()
    with torch.no_grad():
        for weights in control.parameters():
            weights.fill_(7.0)
    controlnet.copy_encoder(control, unet)
    theirs, ours = unet.state_dict(), control.state_dict()
    encoder = {name for name in theirs if name.startswith(("conv_in", "time_embed", "down_blocks", "middle_block"))}
    added = {name for name in ours if name.startswith(("controlnet_cond_embedding", "controlnet_down_blocks"))}
    added |= {"controlnet_mid_block.conv.weight", "controlnet_mid_block.conv.bias"}
    assert set(ours) == encoder | added
    assert {name.split(".")[0] for name in set(theirs) - encoder} == {"up_blocks", "out"}
    assert all(torch.equal(ours[name], theirs[name]) for name in encoder)
    assert all((ours[name] == 7).all() for name in added)


def test_a_unet_of_which_a_part_would_not_be_copied_is_refused():
    from monai.networks.nets import DiffusionModelUNet

    _, control = networks()
    other = DiffusionModelUNet(2, 2, 2, (1, 1), (4, 8), (True, False), 4, num_head_channels=4)
    with pytest.raises(ValueError, match=r"only one of them: down_blocks\.0\.attentions\.0\.norm\.weight"):
        controlnet.copy_encoder(control, other)


def test_a_condition_of_another_size_or_number_is_refused():
    unet, control = networks()
    noisy, times = torch.randn(3, 2, 4, 6), torch.tensor([0, 7, 39])
    control(noisy, times, torch.rand(1, 1, 8, 12))  # MONAI repeats the only condition, and says nothing
    for shape in ((1, 1, 8, 12), (3, 1, 4, 6), (3, 1, 16, 24), (3, 1, 12, 8)):
        with pytest.raises(ValueError, match=r"condition has shape .* must be 3 images of 8 x 12"):
            controlnet.controlled(unet, control, torch.rand(shape))(noisy, times)


def test_a_trained_controlnet_steers_and_the_unet_does_not_change():
    """Latents are 1 on one half of the grid and -1 on the other; only the condition says which."""
    unet, control = networks()
    before = {name: weights.clone() for name, weights in unet.state_dict().items()}

    def drawn(step):
        generators = [torch.Generator().manual_seed(8 * step + number) for number in range(8)]
        left = torch.stack([torch.randint(2, (1, 1, 1), generator=each) for each in generators]).float()
        latents = (2 * left - 1) * torch.tensor([1.0, 1.0, -1.0, -1.0]).expand(8, 2, 4, 4)
        batch = latent_diffusion.training_batch(latents, T, generators)
        return *batch, left * torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 1, 8, 8)

    def loss(model, batch, scale=1.0):
        steered = controlnet.controlled(unet, model, batch[3], scale)
        return latent_diffusion.velocity_loss(steered, latent_diffusion.Batch(*batch[:3]), T)

    fit(control, loss, drawn, SETTINGS)
    with torch.no_grad():
        losses = [float(loss(control, drawn(1000), scale)["loss"]) for scale in (1.0, 0.0)]
    assert losses[0] < 0.6 * losses[1], losses
    assert all(torch.equal(weights, before[name]) for name, weights in unet.state_dict().items())
