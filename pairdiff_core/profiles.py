"""All settings that make a run small or large, and the names of data sets, splits and stages.

There are three profiles: ``quick`` runs each chapter within a minute on two cores, ``laptop`` gives a real result on a
CPU, and ``paper`` has the published sizes. Comments give the published 3D values; no 2D network has been published.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

DATASETS = {"phantom2d": 2, "oasis2d": 2, "phantom3d": 3, "lung250m": 3}  # name: spatial axes
OWN = "own"  # the data set that `pairdiff prepare` makes; it has any grid and any labels
SPLITS = ("train", "validation", "test")
STAGES = ("vqae", "tokens", "denoiser", "synthesis", "registration")  # in the order in which they run
IMAGE_STAGES = (  # of grey slices, in their order
    *("kl_autoencoder", "latents", "gaussian_denoiser", "rectified_flow"),
    *("controlnet_flair", "controlnet_fixed", "translator", "segmenter"),
    *("student", "encoders", "score_network"),
)
GROUPS = 4  # of group normalisation in the networks of image diffusion


@dataclass(frozen=True)
class Augmentation:
    """Random warps of training pairs; zero switches a part off."""

    affine: float  # standard deviation of the entries of the affine matrix (published: 0.05)
    common: float  # voxels, standard deviation of a smooth velocity common to both images
    own: float  # voxels, the same for a velocity of each image's own
    smoothness: float  # voxels between the nodes of those velocities
    coarser: int = 1  # warps are composed on a grid this many times coarser, which is faster
    motion: float = 0.0  # largest share of another person's motion that one of the images is moved by


class Patches(NamedTuple):
    """How patches of volumes are cut for training."""

    size: tuple[int, ...]  # voxels a side (published: 128)
    cuts: int  # batches of patches from each warped batch


@dataclass(frozen=True)
class VQAESettings:
    """Stage 1, the paired VQ autoencoder."""

    channels: tuple[int, ...]  # published: 48 48 64 64 128 192 256 384
    strides: tuple[int | tuple[int, ...], ...]  # published: 1 2 1 2 1 2 1 2, a reduction by 16
    codes: int  # published: 1024
    fade_in: int  # training batches over which quantisation fades in (published: none)
    steps: int  # published: 336,000 samples
    batch: int
    learning_rate: float  # published: 5e-4
    augmentation: Augmentation
    patches: Patches | None = None  # None: whole images


@dataclass(frozen=True)
class DenoiserSettings:
    """Stage 3, the denoiser of masked tokens."""

    layers: int  # published: 12
    width: int  # published: 512
    heads: int  # published: 16
    feed_forward: int  # published: 1024
    copies: int  # augmented token copies of each training pair
    steps: int  # published: 120,000 samples
    batch: int
    learning_rate: float  # published: 1e-4
    average: float  # decay per step of the moving average of the weights
    convolutions: int = 0  # residual blocks before the transformer's layers (published: none)
    given: float = 0.0  # share of the training pairs whose fixed image is shown (published: 0)


@dataclass(frozen=True)
class SynthesisSettings:
    """Stage 4, synthetic pairs."""

    pairs: int  # published: 256
    steps: int  # sampling steps, one evaluation of the network each (published: 256)
    temperature: float  # published: 0.9
    schedule: str = "uniform"  # which share of the tokens each step reveals, uniform or cosine (published: uniform)


class Level(NamedTuple):
    """One level of an optimisation over velocities."""

    scale: int  # images are averaged over this many voxels a side
    control: int  # velocities are on a grid this many times coarser than the averaged images
    steps: int  # of Adam
    learning_rate: float  # of Adam, in voxels of that grid
    bending: float = 0.0  # weight of the bending energy of the displacement (published: 0)


class CorrelationSettings(NamedTuple):
    """The first step of a registration network that compares features over a distance."""

    scale: int  # it sees images averaged over this many voxels a side
    control: int  # features and velocity are on a grid this many times coarser than the images
    reach: int  # cells of that grid, along each axis, over which features are compared
    features: int = 16
    width: int = 96  # channels of the layers that turn similarities into a velocity
    dilations: tuple[int, ...] = (1, 2, 4, 2, 1)  # of these layers


class UNetSettings(NamedTuple):
    """A U-Net step of the registration network."""

    scale: int  # it sees images averaged over this many voxels a side (published: 2)
    channels: tuple[int, ...]  # of MONAI's BasicUNet (published: 8 16 32 64 64 64)


@dataclass(frozen=True)
class RegistrationSettings:
    """Stage 5, registration: the network, its training, and the optimiser without training."""

    unets: tuple[UNetSettings, ...]  # the steps of the network, the outermost first (published: two equal ones)
    control: int  # its velocities are on a grid this many times coarser than the images (published: 2)
    squarings: int  # published: 12
    smoothness: float  # weight of the squared gradient (published: 0.5)
    steps: int
    batch: int
    learning_rate: float
    instance: tuple[Level, ...]  # instance optimisation, coarse to fine (published: one level of 50 steps)
    baseline: tuple[Level, ...]  # the baseline without training, coarse to fine
    correlation: CorrelationSettings | None = None  # a step before the U-Nets (published: none)
    scales: int = 1  # training compares images at this many scales, each half the previous (published: 1)
    repeats: int = 1  # how often the last step runs in registration (published: 1, as in training)
    merge: bool = False  # instance optimisation starts from one velocity: the sum of the network's, or zero
    optimiser_smoothness: float | None = None  # smoothness in optimisation; None: as in training
    blur: float = 0.8  # blur of the images in optimisation: standard deviation in voxels of the level
    augmentation: Augmentation | None = None  # for networks trained on warped pairs; None: the autoencoder's
    breathing: Augmentation | None = None  # the same with other people's motions; None: augmentation


@dataclass(frozen=True)
class KLAutoencoderSettings:
    """The autoencoder of single grey slices, for diffusion with Gaussian noise."""

    channels: tuple[int, ...]  # of the levels; each but the first halves the grid
    latent_channels: int
    kl_weight: float  # of the Kullback-Leibler divergence, in nats per number of the latent
    latents: int  # training images that are encoded for the diffusion
    steps: int
    batch: int  # pairs, of which both images are used
    learning_rate: float


@dataclass(frozen=True)
class DiffusionSettings:
    """A diffusion on the latents of grey slices: the U-Net, its training, and sampling in few steps."""

    channels: tuple[int, ...]  # of MONAI's DiffusionModelUNet
    timesteps: int  # T, of training and of DDPM
    steps: int
    batch: int
    learning_rate: float
    average: float  # decay per step of the moving average of the weights
    sampling_steps: int  # of DDIM and of rectified flow


@dataclass(frozen=True)
class ControlNetSettings:
    """A ControlNet, which has the size of the diffusion's U-Net, and its training."""

    embedding: tuple[int, ...]  # channels of the layers that the condition passes; each but the first halves its grid
    steps: int
    batch: int
    learning_rate: float
    average: float  # decay per step of the moving average of the weights
    sampling_steps: int  # of DDIM


@dataclass(frozen=True)
class ImageUNetSettings:
    """A plain U-Net from grey slices to grey slices or labels, and its training."""

    channels: tuple[int, ...]  # of MONAI's BasicUNet
    steps: int
    batch: int  # pairs, of which both images are used
    learning_rate: float


@dataclass(frozen=True)
class StudentSettings:
    """A student of the diffusion that draws in one step; it has the size of the diffusion's U-Net."""

    divergence: str  # one of ``distillation.WEIGHTS``
    steps: int
    batch: int
    learning_rate: float
    average: float  # decay per step of the moving average of the weights
    momentum: float = 0.0  # of AdamW; with 0.9, the student runs ahead of its critics


@dataclass(frozen=True)
class EncodersSettings:
    """Two encoders, of T1-like and FLAIR-like slices, that share a space of embeddings."""

    channels: tuple[int, ...]  # of MONAI's Regressor; each level halves the grid
    embedding: int  # numbers of an embedding
    pairs: int  # of a T1 and a FLAIR image of the same slice, drawn once
    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class ScoreNetworkSettings:
    """A denoiser of T1 slices, given their FLAIR images, for all levels of noise, as the prior of a reconstruction."""

    channels: tuple[int, ...]  # of MONAI's UNet; each level but the last halves the grid
    steps: int
    batch: int  # pairs, of which both images are used
    learning_rate: float
    sampling_steps: int  # of a reconstruction


# A network may be used with other values of these than it was trained with: its weights do not depend on them, or the
# value is among its recorded inputs (breathing).
AFTER_TRAINING = (
    *("copies", "instance", "baseline", "repeats", "merge", "optimiser_smoothness", "blur", "breathing"),
    *("latents", "sampling_steps"),
)


@dataclass(frozen=True)
class Profile:
    """All settings of one run."""

    name: str
    spatial: tuple[int, ...]  # voxels of the common grid
    num_labels: int  # C, background included
    max_pairs: int  # at most this many pairs of each split are loaded
    phantom_subjects: int  # training subjects of the phantom; its validation split has a quarter of that
    vqae: VQAESettings
    denoiser: DenoiserSettings
    synthesis: SynthesisSettings
    registration: RegistrationSettings
    mixed_precision: tuple[str, ...] = ()  # stages that are safe in bfloat16
    kl_autoencoder: KLAutoencoderSettings | None = None  # these ten are for slices only
    gaussian_denoiser: DiffusionSettings | None = None
    rectified_flow: DiffusionSettings | None = None
    controlnet_flair: ControlNetSettings | None = None
    controlnet_fixed: ControlNetSettings | None = None
    translator: ImageUNetSettings | None = None
    segmenter: ImageUNetSettings | None = None
    student: StudentSettings | None = None
    encoders: EncodersSettings | None = None
    score_network: ScoreNetworkSettings | None = None

    @property
    def spatial_dims(self) -> int:
        """2 for slices, 3 for volumes."""
        return len(self.spatial)


_QUICK_DIFFUSION = DiffusionSettings(
    channels=(16, 32, 64), timesteps=60, steps=220, batch=4, learning_rate=3e-3, average=0.98, sampling_steps=20
)
_QUICK_CONTROL = ControlNetSettings(
    embedding=(8, 16, 32), steps=100, batch=4, learning_rate=5e-3, average=0.98, sampling_steps=10
)
_QUICK_IMAGE_UNET = ImageUNetSettings(channels=(8, 16, 32, 32, 32, 8), steps=100, batch=1, learning_rate=5e-3)
_QUICK_STUDENT = StudentSettings("Jensen-Shannon", steps=100, batch=4, learning_rate=5e-4, average=0.9)
_QUICK_ENCODERS = EncodersSettings((8, 16, 32, 32), embedding=32, pairs=256, steps=60, batch=32, learning_rate=2e-3)
_QUICK_SCORE_NETWORK = ScoreNetworkSettings(
    channels=(16, 32, 64), steps=300, batch=2, learning_rate=4e-3, sampling_steps=15
)

_QUICK_2D = Profile(
    name="quick",
    spatial=(80, 96),
    num_labels=5,
    max_pairs=400,
    phantom_subjects=16,
    vqae=VQAESettings(
        channels=(24, 48, 96),
        strides=(2, 2, 2),
        codes=512,
        fade_in=300,
        steps=700,
        batch=4,  # at equal cost, small batches at a high rate learn more in a short training
        learning_rate=8e-3,
        augmentation=Augmentation(affine=0.05, common=1.0, own=1.0, smoothness=12, coarser=2),
    ),
    denoiser=DenoiserSettings(
        layers=1, width=96, heads=4, feed_forward=192, copies=4, steps=1200, batch=4, learning_rate=5e-3, average=0.99
    ),
    synthesis=SynthesisSettings(pairs=128, steps=60, temperature=0.9),
    registration=RegistrationSettings(
        unets=2 * (UNetSettings(2, (8, 16, 32, 32, 32, 16)),),
        control=2,
        squarings=5,
        smoothness=0.25,
        steps=120,
        batch=4,
        learning_rate=8e-3,
        instance=(Level(scale=2, control=1, steps=20, learning_rate=0.1),),
        baseline=tuple(Level(scale=scale, control=1, steps=25, learning_rate=0.1) for scale in (8, 4, 2)),
    ),
    kl_autoencoder=KLAutoencoderSettings(
        channels=(8, 16, 32), latent_channels=4, kl_weight=1e-4, latents=448, steps=240, batch=1, learning_rate=5e-3
    ),
    gaussian_denoiser=_QUICK_DIFFUSION,
    rectified_flow=_QUICK_DIFFUSION,
    controlnet_flair=_QUICK_CONTROL,
    controlnet_fixed=_QUICK_CONTROL,
    translator=_QUICK_IMAGE_UNET,
    segmenter=_QUICK_IMAGE_UNET,
    student=_QUICK_STUDENT,
    encoders=_QUICK_ENCODERS,
    score_network=_QUICK_SCORE_NETWORK,
)

_LAPTOP_DIFFUSION = DiffusionSettings(
    channels=(32, 64, 128), timesteps=1000, steps=800, batch=4, learning_rate=2e-3, average=0.99, sampling_steps=50
)
_LAPTOP_CONTROL = ControlNetSettings(
    embedding=(16, 32, 64), steps=500, batch=4, learning_rate=2e-3, average=0.99, sampling_steps=20
)
_LAPTOP_IMAGE_UNET = ImageUNetSettings(channels=(16, 32, 64, 64, 64, 16), steps=400, batch=2, learning_rate=2e-3)
_LAPTOP_STUDENT = StudentSettings("Jensen-Shannon", steps=500, batch=4, learning_rate=3e-4, average=0.99)
_LAPTOP_ENCODERS = EncodersSettings((16, 32, 64, 64), embedding=64, pairs=1024, steps=400, batch=32, learning_rate=2e-3)
_LAPTOP_SCORE_NETWORK = ScoreNetworkSettings(
    channels=(32, 64, 128), steps=400, batch=2, learning_rate=2e-3, sampling_steps=15
)

_BRAIN_LEVELS = tuple(Level(scale=scale, control=1, steps=40, learning_rate=0.1) for scale in (8, 4, 2))

_LAPTOP_2D = Profile(
    name="laptop",
    spatial=(160, 192),
    num_labels=5,
    max_pairs=2000,
    phantom_subjects=32,
    vqae=VQAESettings(
        channels=(16, 32, 32, 64, 64, 128),
        strides=(1, 2, 1, 2, 1, 2),
        codes=512,
        fade_in=0,  # fading in made it worse: the loss ended at 0.81, and at 0.74 without (480 tokens, 1500 steps)
        steps=1500,
        batch=8,
        learning_rate=2e-3,
        augmentation=Augmentation(affine=0.05, common=2.0, own=2.0, smoothness=24),
    ),
    denoiser=DenoiserSettings(
        layers=4,
        width=128,
        heads=4,
        feed_forward=256,
        copies=6,
        steps=8000,  # many small batches: at equal cost, 4 pairs per step learn far more than 16
        batch=4,
        learning_rate=2e-3,
        average=0.999,
    ),
    # About as many as there are real pairs. On 64 pairs of an earlier model, the baseline's mean displacement was 4.99
    # voxels with uniform steps at 0.9, 5.21 with these settings, and 5.70 on real training pairs; areas and bits per
    # token also came closer to those of real pairs. Networks trained on either set had Dice 0.813 on training pairs.
    synthesis=SynthesisSettings(pairs=1024, steps=128, temperature=0.8, schedule="cosine"),
    mixed_precision=("synthesis",),  # twice as fast; bits per token change in the fourth digit
    registration=RegistrationSettings(
        unets=2 * (UNetSettings(2, (8, 16, 32, 64, 64, 64)),),
        control=2,
        squarings=6,
        smoothness=0.25,
        steps=800,
        batch=4,
        learning_rate=2e-3,
        instance=_BRAIN_LEVELS,  # Dice on training pairs 0.836; 30 steps of the last level 0.831, without network 0.833
        baseline=_BRAIN_LEVELS,
    ),
    kl_autoencoder=KLAutoencoderSettings(
        channels=(16, 32, 64), latent_channels=4, kl_weight=1e-4, latents=1024, steps=500, batch=1, learning_rate=4e-3
    ),
    gaussian_denoiser=_LAPTOP_DIFFUSION,
    rectified_flow=_LAPTOP_DIFFUSION,
    controlnet_flair=_LAPTOP_CONTROL,
    controlnet_fixed=_LAPTOP_CONTROL,
    translator=_LAPTOP_IMAGE_UNET,
    segmenter=_LAPTOP_IMAGE_UNET,
    student=_LAPTOP_STUDENT,
    encoders=_LAPTOP_ENCODERS,
    score_network=_LAPTOP_SCORE_NETWORK,
)

# Sizes as in MONAI's tutorials on latent diffusion; no network for these slices has been published.
_PAPER_DIFFUSION = DiffusionSettings(
    channels=(128, 256, 512),
    timesteps=1000,
    steps=100_000,
    batch=16,
    learning_rate=1e-4,
    average=0.999,
    sampling_steps=50,
)
_PAPER_CONTROL = ControlNetSettings(
    embedding=(64, 128, 256), steps=100_000, batch=16, learning_rate=1e-4, average=0.999, sampling_steps=50
)
_PAPER_IMAGE_UNET = ImageUNetSettings(channels=(32, 32, 64, 128, 256, 32), steps=100_000, batch=8, learning_rate=1e-4)
_PAPER_STUDENT = StudentSettings("Jensen-Shannon", steps=20_000, batch=16, learning_rate=5e-5, average=0.999)
_PAPER_ENCODERS = EncodersSettings(
    (32, 64, 128, 256), embedding=128, pairs=16_384, steps=50_000, batch=128, learning_rate=2e-4
)
_PAPER_SCORE_NETWORK = ScoreNetworkSettings(
    channels=(64, 128, 256), steps=100_000, batch=8, learning_rate=1e-4, sampling_steps=50
)

_PAPER_2D = Profile(
    name="paper",
    spatial=(160, 192),
    num_labels=25,
    max_pairs=4000,
    phantom_subjects=64,
    vqae=VQAESettings(
        channels=(48, 48, 64, 64, 128, 192, 256, 384),
        strides=(1, 2, 1, 2, 1, 2, 1, 1),  # a reduction by 8: a slice has far fewer voxels than a volume
        codes=1024,
        fade_in=0,
        steps=42_000,  # 336,000 samples
        batch=8,
        learning_rate=5e-4,
        augmentation=Augmentation(affine=0.05, common=2.0, own=2.0, smoothness=24),
    ),
    denoiser=DenoiserSettings(
        layers=12,
        width=512,
        heads=16,
        feed_forward=1024,
        copies=8,
        steps=7_500,  # 120,000 samples
        batch=16,
        learning_rate=1e-4,
        average=0.999,
    ),
    synthesis=SynthesisSettings(pairs=256, steps=256, temperature=0.9),
    registration=RegistrationSettings(
        unets=2 * (UNetSettings(2, (8, 16, 32, 64, 64, 64)),),
        control=2,
        squarings=7,
        smoothness=0.25,
        steps=20_000,
        batch=4,
        learning_rate=1e-3,
        instance=(Level(scale=2, control=1, steps=50, learning_rate=0.1),),
        baseline=tuple(Level(scale=scale, control=1, steps=60, learning_rate=0.1) for scale in (8, 4, 2)),
    ),
    mixed_precision=("vqae", "denoiser", "synthesis"),  # where it is safe; `make bench` measures it
    kl_autoencoder=KLAutoencoderSettings(
        channels=(64, 128, 128),
        latent_channels=3,
        kl_weight=1e-4,
        latents=16_384,
        steps=50_000,
        batch=4,
        learning_rate=1e-4,
    ),
    gaussian_denoiser=_PAPER_DIFFUSION,
    rectified_flow=_PAPER_DIFFUSION,
    controlnet_flair=_PAPER_CONTROL,
    controlnet_fixed=_PAPER_CONTROL,
    translator=_PAPER_IMAGE_UNET,
    segmenter=_PAPER_IMAGE_UNET,
    student=_PAPER_STUDENT,
    encoders=_PAPER_ENCODERS,
    score_network=_PAPER_SCORE_NETWORK,
)

# The 3D profiles.
# For volumes at full size; chapter 10 describes the trials on training pairs behind the steps and the bending energy.
_LUNG_LEVELS = (Level(8, 2, 20, 0.3, 0.5), Level(4, 2, 20, 0.2, 0.5), Level(2, 4, 20, 0.2, 0.5))
_HALVED_LUNG_LEVELS = tuple(level._replace(scale=level.scale // 2) for level in _LUNG_LEVELS)

_QUICK_BREATHING = Augmentation(affine=0.05, common=1.0, own=0.5, smoothness=12, coarser=4, motion=1.0)
_BREATHING = Augmentation(affine=0.05, common=2.0, own=1.0, smoothness=24, coarser=4, motion=1.6)

_QUICK_3D = Profile(
    name="quick",
    spatial=(64, 52, 64),
    num_labels=2,
    max_pairs=40,
    phantom_subjects=12,
    vqae=VQAESettings(
        channels=(16, 32, 64),
        strides=(2, 2, 1),
        codes=256,
        fade_in=0,
        steps=900,  # after a tenth of them, both images are still decoded as their average
        batch=2,
        learning_rate=4e-3,
        augmentation=_QUICK_BREATHING,
        patches=Patches((32, 24, 32), cuts=32),
    ),
    denoiser=DenoiserSettings(
        layers=0,
        width=32,
        heads=4,
        feed_forward=64,
        copies=4,
        steps=500,
        batch=2,  # on a CPU without bfloat16, PyTorch convolves a single small volume three times as slowly
        learning_rate=1e-2,
        average=0.98,
        convolutions=2,
        given=0.25,
    ),
    synthesis=SynthesisSettings(pairs=12, steps=32, temperature=0.9),
    registration=RegistrationSettings(
        unets=(UNetSettings(2, (8, 8, 16, 16, 16, 8)),),
        control=2,
        correlation=CorrelationSettings(scale=2, control=4, reach=2, features=8, width=32, dilations=(1, 2, 1)),
        squarings=5,
        smoothness=0.05,
        steps=24,
        batch=1,
        learning_rate=1e-2,
        instance=(Level(scale=1, control=4, steps=8, learning_rate=0.2),),
        baseline=(Level(2, 2, 20, 0.3), Level(1, 4, 10, 0.2)),
        scales=3,  # with these and the repeats, a network learns more of the motion from synthetic pairs
        repeats=3,
        breathing=_QUICK_BREATHING,
    ),
    mixed_precision=("denoiser", "synthesis"),
)

_LAPTOP_3D = Profile(
    name="laptop",
    spatial=(128, 104, 128),
    num_labels=2,
    max_pairs=97,
    phantom_subjects=10,
    vqae=VQAESettings(
        channels=(32, 64, 64, 64),
        strides=(2, 2, (1, 1, 2), 1),  # tokens of 8 x 8 x 16 mm, longest along the axis of breathing
        codes=1024,
        fade_in=0,
        steps=4000,
        batch=2,
        learning_rate=4e-3,
        augmentation=_BREATHING,  # without motions, 600 steps leave both images decoded as their average
        patches=Patches((64, 48, 64), cuts=8),
    ),
    denoiser=DenoiserSettings(
        layers=0,  # a transformer on a grid half as fine, between the convolutions, learned less in the same time
        width=64,
        heads=4,
        feed_forward=128,
        copies=32,
        steps=1500,
        batch=2,
        learning_rate=2e-3,
        average=0.99,
        convolutions=4,
        given=0.5,
    ),
    # Bits per token of 16 synthetic lung pairs under the denoiser itself, accurate to about 0.03: 3.20 with 256 uniform
    # steps and 3.39 with 32; on a cosine schedule, 3.27 with 32 and 3.19 with 48.
    synthesis=SynthesisSettings(pairs=96, steps=32, temperature=0.9, schedule="cosine"),
    registration=RegistrationSettings(
        unets=(UNetSettings(2, (32, 32, 64, 128, 128, 32)),),
        control=4,
        correlation=CorrelationSettings(scale=2, control=8, reach=2),
        squarings=5,
        smoothness=0.05,
        steps=1500,
        batch=1,
        learning_rate=4e-3,
        instance=(Level(2, 2, 10, 0.2, 0.5), Level(1, 4, 12, 0.2, 0.5)),
        merge=True,
        optimiser_smoothness=0.0,
        blur=0.0,
        baseline=_HALVED_LUNG_LEVELS,
        scales=4,
        repeats=3,
        augmentation=Augmentation(affine=0.05, common=2.0, own=4.0, smoothness=24, coarser=4),
        breathing=_BREATHING,
    ),
    mixed_precision=("denoiser", "synthesis"),
)

_PAPER_3D = Profile(
    name="paper",
    spatial=(256, 208, 256),
    num_labels=2,
    max_pairs=97,
    phantom_subjects=97,
    vqae=replace(
        _PAPER_2D.vqae,
        strides=(1, 2, 1, 2, 1, 2, 1, 2),
        steps=168_000,  # 336,000 samples
        batch=2,
        augmentation=Augmentation(affine=0.05, common=0.0, own=0.0, smoothness=24),
        patches=Patches((128, 128, 128), cuts=4),
    ),
    denoiser=_PAPER_2D.denoiser,
    synthesis=replace(_PAPER_2D.synthesis),
    registration=replace(
        _PAPER_2D.registration,
        squarings=12,
        smoothness=0.5,
        batch=1,
        instance=(Level(scale=2, control=4, steps=50, learning_rate=0.2),),
        baseline=_LUNG_LEVELS,
    ),
    mixed_precision=_PAPER_2D.mixed_precision,
)

PROFILES = {
    2: {profile.name: profile for profile in (_QUICK_2D, _LAPTOP_2D, _PAPER_2D)},
    3: {profile.name: profile for profile in (_QUICK_3D, _LAPTOP_3D, _PAPER_3D)},
}


def get_profile(name: str | None = None, spatial_dims: int = 2) -> Profile:
    """Find the profile of a name, for slices or volumes; the default is ``PAIRDIFF_PROFILE`` or, if unset, ``quick``.

    Raises:
        ValueError: for an unknown name; the message lists the profiles.
    """
    profiles = PROFILES[spatial_dims]
    source = "the name" if name else "PAIRDIFF_PROFILE"
    name = name or os.environ.get("PAIRDIFF_PROFILE") or "quick"
    if name not in profiles:
        raise ValueError(f"{source} is {name!r}, but the profiles are {', '.join(profiles)}")
    return profiles[name]


def with_levels(profile: Profile, levels: int | None = None, steps: int | None = None) -> Profile:
    """The profile with only the first ``levels`` of its optimisers, and ``steps`` at each; None changes nothing."""
    changed = {}
    for name in ("baseline", "instance"):
        kept = getattr(profile.registration, name)[:levels]
        changed[name] = kept if steps is None else tuple(level._replace(steps=steps) for level in kept)
    return replace(profile, registration=replace(profile.registration, **changed))


def to_json(settings: Any) -> dict[str, Any]:
    """Convert settings for JSON: dataclasses to dictionaries, tuples to lists."""
    return json.loads(json.dumps(asdict(settings)))


def trained_settings(settings: Any) -> dict[str, Any]:
    """:func:`to_json` of the settings of a stage, without those in ``AFTER_TRAINING``."""
    return {name: value for name, value in to_json(settings).items() if name not in AFTER_TRAINING}


def profile_from_json(content: Mapping[str, Any]) -> Profile:
    """Rebuild a profile from the result of :func:`to_json`.

    Raises:
        ValueError: if it is not a profile of this version; the message names the settings that are wrong.
    """
    from pydantic import TypeAdapter, ValidationError  # here, because importing it takes long

    try:
        return TypeAdapter(Profile).validate_python(content)
    except ValidationError as error:
        wrong = (".".join(map(str, each["loc"])) for each in error.errors())
        raise ValueError(f"missing or wrong: {', '.join(wrong)}") from error
