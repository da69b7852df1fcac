"""Every number that makes a run small or large, in one place.

Three profiles: ``quick`` runs each chapter within a minute on two cores, ``laptop`` gives a real result on a CPU,
``paper`` has the published sizes. The published 3D value stands beside each number that differs from it; there is
no published 2D network, so the 2D sizes are this book's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Augmentation:
    """Random warps of training pairs; zero switches a part off."""

    affine: float  # standard deviation of the entries of the affine matrix (published: 0.05)
    common: float  # voxels, standard deviation of a smooth velocity common to both images
    own: float  # voxels, the same for each image alone
    smoothness: float  # voxels between the nodes of those velocities
    coarser: int | None = None  # warps are put together on a grid so many times coarser, which is faster


class Patches(NamedTuple):
    """Pieces of volumes to train on."""

    size: tuple[int, ...]  # voxels a side (published: 128)
    cuts: int  # batches of pieces from each warped batch


@dataclass(frozen=True)
class VQAEProfile:
    """Stage 1, the paired VQ autoencoder."""

    channels: tuple[int, ...]  # published: 48 48 64 64 128 192 256 384
    strides: tuple[int | tuple[int, ...], ...]  # published: 1 2 1 2 1 2 1 2, sixteen times down
    codes: int  # published: 1024
    fade_in: int  # training batches over which quantisation fades in (published: none)
    steps: int  # published: 336,000 samples
    batch: int
    learning_rate: float  # published: 5e-4
    augmentation: Augmentation
    patches: Patches | None = None  # whole images without


@dataclass(frozen=True)
class DiffusionProfile:
    """Stage 3, the denoiser of masked tokens."""

    layers: int  # published: 12
    width: int  # published: 512
    heads: int  # published: 16
    feed_forward: int  # published: 1024
    copies: int  # augmented token copies of each training pair
    steps: int  # published: 120,000 samples
    batch: int
    learning_rate: float  # published: 1e-4
    average: float  # decay of the moving average of the weights, a step
    convolutions: int | None = None  # residual blocks before the transformer's layers (published: none)


@dataclass(frozen=True)
class SynthesisProfile:
    """Stage 4, new pairs."""

    pairs: int  # published: 256
    steps: int  # network passes (published: 256)
    temperature: float  # published: 0.9
    keep: float | None = None  # share of a real pair's places in a completed one (published: makes none)
    schedule: str | None = None  # of the passes, even or cosine (published: even)


class Level(NamedTuple):
    """One level of an optimisation over velocities."""

    scale: int  # images are averaged over this many voxels a side
    control: int  # velocities live on a grid this many times coarser than those
    steps: int  # of Adam
    learning_rate: float  # of Adam, in voxels of that grid
    bending: float = 0.0  # weight of the bending energy of the displacement (published: 0)


@dataclass(frozen=True)
class RegistrationProfile:
    """Stage 5, registration: the network, its training, and the optimisers without training."""

    channels: tuple[int, ...]  # published: 8 16 32 64 64 64
    scale: int  # the network sees images this many times coarser (published: 2)
    squarings: int  # published: 12
    smoothness: float  # weight of the squared gradient (published: 0.5)
    steps: int
    batch: int
    learning_rate: float
    instance: tuple[Level, ...]  # of a network's answer, coarse to fine (published: one level of 50 steps)
    baseline: tuple[Level, ...]  # the no-training baseline, coarse to fine
    control: int | None = None  # velocities of the network on a grid this many times coarser still
    scales: int | None = None  # training compares images at so many scales, each half the last (published: 1)
    repeats: int | None = None  # of the second U-Net when pairs are registered (published: 1, as in training)
    merge: bool | None = None  # instance optimisation is of one velocity, from theirs merged or from nothing
    augmentation: Augmentation | None = None  # where its pairs are warped; else the autoencoder's
    coarser: int | None = None  # the first of its U-Nets sees images this many times coarser, and is wider


@dataclass(frozen=True)
class Profile:
    """All numbers of one run."""

    name: str
    spatial: tuple[int, ...]  # voxels of the common grid
    num_labels: int  # C, background included
    max_pairs: int  # at most so many pairs of each split are loaded
    phantom_subjects: int  # training subjects of the phantom; tests use a quarter as many more
    vqae: VQAEProfile
    diffusion: DiffusionProfile
    synthesis: SynthesisProfile
    registration: RegistrationProfile
    mixed_precision: tuple[str, ...] = ()  # stages that are safe in bfloat16; see Run.precision
    compiled: tuple[str, ...] = ()  # stages that go through torch.compile, named likewise


_QUICK_2D = Profile(
    name="quick",
    spatial=(80, 96),
    num_labels=5,
    max_pairs=400,
    phantom_subjects=16,
    vqae=VQAEProfile(
        channels=(24, 48, 96),
        strides=(2, 2, 2),
        codes=512,
        fade_in=500,
        steps=700,
        batch=8,
        learning_rate=4e-3,
        augmentation=Augmentation(affine=0.05, common=1.0, own=1.0, smoothness=12),
    ),
    diffusion=DiffusionProfile(
        layers=2,
        width=96,
        heads=4,
        feed_forward=192,
        copies=4,
        steps=1500,
        batch=4,
        learning_rate=2e-3,
        average=0.99,
    ),
    synthesis=SynthesisProfile(pairs=128, steps=60, temperature=0.9),
    registration=RegistrationProfile(
        channels=(8, 16, 32, 32, 32, 16),
        scale=2,
        squarings=5,
        smoothness=0.25,
        steps=120,
        batch=8,
        learning_rate=4e-3,
        instance=(Level(scale=2, control=1, steps=20, learning_rate=0.1),),
        baseline=tuple(Level(scale=scale, control=1, steps=25, learning_rate=0.1) for scale in (8, 4, 2)),
    ),
)

_BRAIN_LEVELS = tuple(Level(scale=scale, control=1, steps=40, learning_rate=0.1) for scale in (8, 4, 2))

_LAPTOP_2D = Profile(
    name="laptop",
    spatial=(160, 192),
    num_labels=5,
    max_pairs=2000,
    phantom_subjects=32,
    vqae=VQAEProfile(
        channels=(16, 32, 32, 64, 64, 128),
        strides=(1, 2, 1, 2, 1, 2),
        codes=512,
        fade_in=0,  # here it did harm: with 480 tokens and 1500 steps the loss ended at 0.81, without at 0.74
        steps=1500,
        batch=8,
        learning_rate=2e-3,
        augmentation=Augmentation(affine=0.05, common=2.0, own=2.0, smoothness=24),
    ),
    diffusion=DiffusionProfile(
        layers=4,
        width=128,
        heads=4,
        feed_forward=256,
        copies=6,
        steps=8000,  # many small batches: at equal cost, 4 pairs a step learn far more than 16
        batch=4,
        learning_rate=2e-3,
        average=0.999,
    ),
    # About as many as the real ones. In 64 of an earlier model the baseline displaced voxels by 4.99 on average after
    # even passes at 0.9, by 5.21 after these, in real training pairs by 5.70; areas and bits per token came nearer to
    # those of real pairs, too. Networks trained on either did alike on training pairs: Dice 0.813. See chapter 4.
    synthesis=SynthesisProfile(pairs=1024, steps=128, temperature=0.8, schedule="cosine"),
    mixed_precision=("synthesis",),  # twice as fast; bits per token change in the fourth digit
    registration=RegistrationProfile(
        channels=(8, 16, 32, 64, 64, 64),
        scale=2,
        squarings=6,
        smoothness=0.25,
        steps=800,
        batch=4,
        learning_rate=2e-3,
        instance=_BRAIN_LEVELS,  # training pairs: Dice 0.836; 0.831 by 30 steps of the last, 0.833 without network
        baseline=_BRAIN_LEVELS,
    ),
)

_PAPER_2D = Profile(
    name="paper",
    spatial=(160, 192),
    num_labels=25,
    max_pairs=4000,
    phantom_subjects=64,
    vqae=VQAEProfile(
        channels=(48, 48, 64, 64, 128, 192, 256, 384),
        strides=(1, 2, 1, 2, 1, 2, 1, 1),  # eight times down: a slice has far fewer voxels than a volume
        codes=1024,
        fade_in=0,
        steps=42_000,  # 336,000 samples
        batch=8,
        learning_rate=5e-4,
        augmentation=Augmentation(affine=0.05, common=2.0, own=2.0, smoothness=24),
    ),
    diffusion=DiffusionProfile(
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
    synthesis=SynthesisProfile(pairs=256, steps=256, temperature=0.9),
    registration=RegistrationProfile(
        channels=(8, 16, 32, 64, 64, 64),
        scale=2,
        squarings=7,
        smoothness=0.25,
        steps=20_000,
        batch=4,
        learning_rate=1e-3,
        instance=(Level(scale=2, control=1, steps=50, learning_rate=0.1),),
        baseline=tuple(Level(scale=scale, control=1, steps=60, learning_rate=0.1) for scale in (8, 4, 2)),
    ),
    mixed_precision=("vqae", "denoiser", "synthesis"),  # where it is safe; `make bench` measures it
)

# The three-dimensional ones.
# On volumes at full size; chapter 10 tells of the trials on training pairs behind the steps and the bending energy.
_LUNG_LEVELS = (Level(8, 2, 20, 0.3, 0.5), Level(4, 2, 20, 0.2, 0.5), Level(2, 4, 20, 0.2, 0.5))
_HALVED_LUNG_LEVELS = tuple(level._replace(scale=level.scale // 2) for level in _LUNG_LEVELS)

_QUICK_3D = Profile(
    name="quick",
    spatial=(64, 52, 64),
    num_labels=2,
    max_pairs=40,
    phantom_subjects=12,
    vqae=VQAEProfile(
        channels=(32, 64, 64),
        strides=(2, 2, 1),
        codes=256,
        fade_in=0,
        steps=1500,  # after a fifth of that, both images still come out as their average
        batch=2,
        learning_rate=4e-3,
        augmentation=Augmentation(affine=0.05, common=1.0, own=1.0, smoothness=12, coarser=2),
        patches=Patches((32, 24, 32), cuts=8),
    ),
    diffusion=DiffusionProfile(
        layers=0,
        width=64,
        heads=4,
        feed_forward=128,
        copies=4,
        steps=400,
        batch=2,
        learning_rate=3e-3,
        average=0.95,
        convolutions=3,
    ),
    synthesis=SynthesisProfile(pairs=12, steps=32, temperature=0.9, keep=0.6),
    registration=RegistrationProfile(
        channels=(8, 16, 32, 32, 32, 8),
        scale=2,
        squarings=5,
        smoothness=0.05,
        steps=60,
        batch=2,
        learning_rate=4e-3,
        instance=(Level(scale=1, control=4, steps=20, learning_rate=0.2),),
        baseline=(Level(2, 2, 20, 0.3), Level(1, 2, 20, 0.2), Level(1, 4, 20, 0.2)),
        control=2,
    ),
    mixed_precision=("denoiser", "synthesis"),
)

_LAPTOP_3D = Profile(
    name="laptop",
    spatial=(128, 104, 128),
    num_labels=2,
    max_pairs=97,
    phantom_subjects=10,
    vqae=VQAEProfile(
        channels=(16, 32, 64, 64),
        strides=(2, 2, (1, 1, 2), 1),  # places of 8 x 8 x 16 mm, long where breathing moves things
        codes=1024,
        fade_in=0,
        steps=4000,
        batch=2,
        learning_rate=4e-3,
        augmentation=Augmentation(affine=0.05, common=2.0, own=2.0, smoothness=24, coarser=4),
        patches=Patches((64, 48, 64), cuts=8),
    ),
    diffusion=DiffusionProfile(
        layers=0,
        width=64,
        heads=4,
        feed_forward=128,
        copies=24,
        steps=3000,
        batch=2,
        learning_rate=2e-3,
        average=0.99,
        convolutions=4,
    ),
    # Bits per token of 16 new pairs of lungs under the denoiser itself, each to about 0.03: 3.20 by 256 even passes,
    # 3.39 by 32 of those; 3.27 by 32 and 3.19 by 48 on a cosine schedule.
    synthesis=SynthesisProfile(pairs=128, steps=48, temperature=0.9, keep=0.6, schedule="cosine"),
    registration=RegistrationProfile(
        channels=(8, 16, 32, 64, 64, 16),
        scale=2,
        squarings=5,
        smoothness=0.05,
        steps=1000,
        batch=1,
        learning_rate=4e-3,
        instance=_HALVED_LUNG_LEVELS,
        merge=True,
        baseline=_HALVED_LUNG_LEVELS,
        control=2,
        scales=4,
        repeats=3,
        augmentation=Augmentation(affine=0.05, common=2.0, own=4.0, smoothness=24, coarser=4),
        coarser=2,
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
    diffusion=_PAPER_2D.diffusion,
    synthesis=replace(_PAPER_2D.synthesis, keep=0.6),
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
    """The profile of that name for slices or volumes; without one, what ``PAIRDIFF_PROFILE`` names, else ``quick``.

    Raises:
        ValueError: for a name that there is not; the message lists those there are.
    """
    profiles = PROFILES[spatial_dims]
    source = "the name" if name else "PAIRDIFF_PROFILE"
    name = name or os.environ.get("PAIRDIFF_PROFILE") or "quick"
    if name not in profiles:
        raise ValueError(f"{source} is {name!r}, but the profiles are {', '.join(profiles)}")
    return profiles[name]
