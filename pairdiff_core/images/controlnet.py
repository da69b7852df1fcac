"""A trained diffusion that is steered by an image: MONAI's ControlNet and a frozen U-Net.

A copy of the U-Net's encoder sees the noisy latent and the condition. What it finds is added to the features that the
U-Net's decoder receives, through convolutions that start at zero (Zhang, Rao and Agrawala, "Adding Conditional Control
to Text-to-Image Diffusion Models", ICCV 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from pairdiff_core.profiles import GROUPS, ControlNetSettings, DiffusionSettings, ImageUNetSettings

if TYPE_CHECKING:
    from monai.networks.nets import BasicUNet, ControlNet, DiffusionModelUNet

ADDED = "controlnet_"  # how the names of weights begin that a ControlNet has and its U-Net lacks
DECODER = ("up_blocks.", "out.")  # and of those that only the U-Net has


def new_controlnet(
    settings: ControlNetSettings, unet: DiffusionSettings, latent_channels: int, conditions: int, spatial_dims: int
) -> ControlNet:
    """MONAI's ``ControlNet`` for a U-Net of :func:`latent_diffusion.new_unet`, with weights of its own.

    Args:
        unet: the settings of that U-Net.
        conditions: channels of the condition.
    """
    from monai.networks.nets import ControlNet  # here, because importing it takes seconds

    levels = len(unet.channels)
    return ControlNet(
        spatial_dims, latent_channels, (1,) * levels, unet.channels, (False,) * levels, GROUPS,
        num_head_channels=unet.channels[-1],
        conditioning_embedding_in_channels=conditions,
        conditioning_embedding_num_channels=settings.embedding,
    )  # fmt: skip


def copy_encoder(controlnet: ControlNet, unet: DiffusionModelUNet) -> None:
    """Give a ControlNet the weights of the U-Net's encoder; zero convolutions and embedding of the condition stay.

    Raises:
        ValueError: if other weights than those differ in name, so that a part of the encoder would not be copied.
    """
    found = controlnet.load_state_dict(unet.state_dict(), strict=False)
    wrong = [name for name in found.missing_keys if not name.startswith(ADDED)]
    wrong += [name for name in found.unexpected_keys if not name.startswith(DECODER)]
    if wrong:
        raise ValueError(f"the ControlNet does not fit the U-Net; weights of only one of them: {', '.join(wrong)}")


def controlled(
    unet: DiffusionModelUNet, controlnet: nn.Module, condition: torch.Tensor, scale: float = 1.0
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The U-Net under the control of a condition: it takes noisy latents and timesteps, as the U-Net alone.

    Args:
        controlnet: MONAI's ``ControlNet``, or a wrapper of one.
        condition: float (N, C, *spatial), one for each of N latents (N, L, *grid). Each layer of its embedding but the
            first halves it, so spatial must be the grid times a power of two.
        scale: of what the ControlNet adds; 0 leaves the U-Net alone.

    Raises:
        ValueError: when called with latents to which the condition does not fit. MONAI's inferer would resize it, and
            its network would repeat a single one.
    """

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        halvings = len(controlnet.controlnet_cond_embedding.blocks) // 2
        expected = (len(noisy), *(size * 2**halvings for size in noisy.shape[2:]))
        if (len(condition), *condition.shape[2:]) != expected:
            raise ValueError(
                f"the condition has shape {tuple(condition.shape)}; for these latents it must be {expected[0]} images "
                f"of {' x '.join(map(str, expected[1:]))}"
            )
        down, middle = controlnet(noisy, timesteps, condition, scale)
        return unet(noisy, timesteps, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    return predict


def new_image_unet(settings: ImageUNetSettings, out_channels: int, spatial_dims: int) -> BasicUNet:
    """MONAI's ``BasicUNet`` from grey images (N, 1, *spatial) to images (N, out_channels, *spatial), without noise."""
    from monai.networks.nets import BasicUNet  # here, because importing it takes seconds

    return BasicUNet(spatial_dims, 1, out_channels, settings.channels)
