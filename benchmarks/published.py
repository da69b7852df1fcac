"""The published procedure at its full size, written from its description, for comparison with ours.

Source: Heinrich, "Unleashing Registration: Diffusion Models for Paired Synthetic 3D Data Generation", 2024. It is
short and plain, which makes it the version to read first; it was not optimised for speed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.nets import AutoEncoder, BasicUNet
from torch import nn

SPATIAL = (256, 208, 256)  # voxels of a pair
HALF = (128, 104, 128)  # registration works at half resolution
TOKENS = (16, 13, 16)
CODES = 1024


class VectorQuantiser(nn.Module):
    """A codebook that learns by its gradient, from a uniform start (van den Oord et al. 2017, eq. 3)."""

    def __init__(self, codes: int = CODES, channels: int = 384) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes))

    def look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """Codes (N, C, *grid) of tokens (N, *grid)."""
        return F.embedding(tokens, self.vectors).movedim(-1, 1)

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes with straight-through gradient (N, C, *grid), their indices (N, *grid), and the codebook's loss."""
        flat = latent.movedim(1, -1).flatten(0, -2)  # (N, C, *grid) -> (positions, C)
        nearest = torch.cdist(flat.detach(), self.vectors.detach()).argmin(1)
        tokens = nearest.reshape(latent.shape[0], *latent.shape[2:])
        chosen = self.look_up(tokens)
        loss = F.mse_loss(chosen, latent.detach()) + 0.25 * F.mse_loss(latent, chosen.detach())
        return latent + (chosen - latent).detach(), tokens, loss


class Autoencoder(nn.Module):
    """Two channels, fixed and moving, to tokens sixteen times coarser, and back to two softmaxes over two labels."""

    def __init__(self) -> None:
        super().__init__()
        channels, strides = (48, 48, 64, 64, 128, 192, 256, 384), (1, 2, 1, 2, 1, 2, 1, 2)
        self.network = AutoEncoder(3, 2, 4, channels, strides)
        self.codebook = VectorQuantiser()
        self.image = DiceCELoss(to_onehot_y=True, softmax=True, weight=torch.tensor([1.0, 2.5]), batch=True)

    def loss(self, labels: torch.Tensor) -> torch.Tensor:
        """The training loss of pairs of binary label maps (N, 2, *spatial)."""
        latent, _, codebook = self.codebook(self.network.encode(labels.float()))
        logits = self.network.decode(latent).unflatten(1, (2, 2)).flatten(0, 1)  # (N, 4, *s) -> (2N, 2, *s)
        return self.image(logits, labels.flatten(0, 1)[:, None]) + 0.1 * codebook

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Label maps uint8 (N, 2, *spatial) of tokens (N, *grid): the whole volume at once."""
        with torch.no_grad():
            logits = self.network.decode(self.codebook.look_up(tokens))
        return logits.unflatten(1, (2, 2)).argmax(2).to(torch.uint8)


class Denoiser(nn.Module):
    """Twelve transformer layers with learned positions and no time input, 28.0 M parameters."""

    def __init__(self, length: int = 3328, codes: int = CODES, layers: int = 12, width: int = 512) -> None:
        super().__init__()
        self.token = nn.Embedding(codes + 1, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 16, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, codes, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (N, L, K) of tokens (N, L), where K stands for a masked one."""
        return self.head(self.blocks(self.token(tokens) + self.position))


@torch.no_grad()
def sample(
    predict, length: int, mask: int, steps: int = 256, temperature: float = 0.9, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Tokens (1, L): each step predicts all positions, and reveals one in ``left`` of those that are still masked."""
    tokens = torch.full((1, length), mask, device=device)
    for left in range(steps, 0, -1):
        drawn = torch.distributions.Categorical(logits=predict(tokens).float() / temperature).sample()
        now = (tokens == mask) & (torch.rand(tokens.shape, device=device) < 1 / left)
        tokens[now] = drawn[now]
    return tokens


def warp(image: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """``image`` (N, C, *s) at x + u(x), for u (N, 3, *s) in grid_sample's units and order."""
    identity = F.affine_grid(torch.eye(3, 4, device=image.device).expand(len(image), 3, 4), image.shape[:1] + (1,)
                             + image.shape[2:], align_corners=False)  # fmt: skip
    return F.grid_sample(image, identity + displacement.movedim(1, -1), padding_mode="border", align_corners=False)


def exponentiate(velocity: torch.Tensor, squarings: int = 12) -> torch.Tensor:
    """Scaling and squaring on the full grid."""
    displacement = velocity / 2**squarings
    for _ in range(squarings):
        displacement = displacement + warp(displacement, displacement)
    return displacement


class Registration(nn.Module):
    """Two U-Nets, one after the other; the outputs of each for (A, B) and (B, A) are subtracted and smoothed."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(BasicUNet(3, 2, 3, (8, 16, 32, 64, 64, 64)) for _ in range(2))

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Displacements of fixed to moving and back, (N, 3, *s) each, for maps (N, 1, *s)."""
        there = back = None
        for step in self.steps:
            seen = moving if there is None else warp(moving, there)
            a, b = (F.avg_pool3d(image, 2) for image in (fixed, seen))
            velocity = 0.1 * (step(torch.cat([a, b], 1)) - step(torch.cat([b, a], 1)))
            for _ in range(2):
                velocity = F.avg_pool3d(velocity, 3, stride=1, padding=1)  # with zeros at the border
            velocity = F.interpolate(velocity, size=fixed.shape[2:], mode="trilinear", align_corners=False)
            forth, reverse = exponentiate(velocity), exponentiate(-velocity)
            there = forth if there is None else forth + warp(there, forth)
            back = reverse if back is None else back + warp(reverse, back)
        return there, back


def registration_loss(network: Registration, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    """L1 in both directions, plus 0.5 times the squared gradient in voxels."""
    there, back = network(fixed, moving)
    image = F.l1_loss(warp(moving, there), fixed) + F.l1_loss(warp(fixed, back), moving)
    sizes = torch.tensor(fixed.shape[:1:-1], device=fixed.device).reshape(3, 1, 1, 1)  # x first
    voxels = there * sizes / 2
    return image + 0.5 * sum(voxels.diff(dim=axis).square().mean() for axis in (2, 3, 4))


def optimise_instance(
    network: Registration, fixed: torch.Tensor, moving: torch.Tensor, steps: int = 50
) -> torch.Tensor:
    """Train the networks further on one pair, and return the displacement (1, 3, *s) that they then predict."""
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(steps):
        adam.zero_grad()
        registration_loss(network, fixed, moving).backward()
        adam.step()
    with torch.no_grad():
        return network(fixed, moving)[0]
