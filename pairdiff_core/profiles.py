"""Every setting that makes a run small or large, in one place, and the names of data sets, splits and stages.

Three profiles: ``quick`` runs each chapter within a minute on two cores, ``laptop`` gives a real result on a CPU,
``paper`` has the published sizes. The published 3D value stands beside each setting that differs from it; there is
no published 2D network, so the 2D sizes are this book's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

DATASETS = {"phantom2d": 2, "oasis2d": 2, "phantom3d": 3, "lung250m": 3}  # name: spatial axes
SPLITS = ("train", "validation", "test")
STAGES = ("vqae", "tokens", "denoiser", "synthesis", "registration")  # in the order in which they run


@dataclass(frozen=True)
class Augmentation:
    """Random warps of training pairs; zero switches a part off."""

    affine: float  # standard deviation of the entries of the affine matrix (published: 0.05)
    common: float  # voxels, standard deviation of a smooth velocity common to both images
    own: float  # voxels, the same for each image alone
    smoothness: float  # voxels between the nodes of those velocities
    coarser: int = 1  # warps are composed on a grid this many times coarser, which is faster
    motion: float = 0.0  # the largest share of another person's motion that one of the images goes along


class Patches(NamedTuple):
    """Patches of volumes to train on."""

    size: tuple[int, ...]  # voxels a side (published: 128)
    cuts: int  # batches of patches from each warped batch


@dataclass(frozen=True)
class VQAESettings:
    """Stage 1, the paired VQ autoencoder."""

    channels: tuple[int, ...]  # published: 48 48 64 64 128 192 256 384
    strides: tuple[int | tuple[int, ...], ...]  # published: 1 2 1 2 1 2 1 2, sixteen times down
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
    average: float  # decay of the moving average of the weights, a step
    convolutions: int = 0  # residual blocks before the transformer's layers (published: none)


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
    control: int  # velocities live on a grid this many times coarser than those
    steps: int  # of Adam
    learning_rate: float  # of Adam, in voxels of that grid
    bending: float = 0.0  # weight of the bending energy of the displacement (published: 0)


class CorrelationSettings(NamedTuple):
    """The first step of a registration network that compares features over a distance."""

    scale: int  # it sees images averaged over this many voxels a side
    control: int  # features and velocity live on a grid this many times coarser than the images
    reach: int  # cells of that grid, along each axis, over which features are compared
    features: int = 16
    width: int = 96  # channels of the layers that turn similarities into a velocity
    dilations: tuple[int, ...] = (1, 2, 4, 2, 1)  # of these layers


class UNetSettings(NamedTuple):
    """A step of the registration network that is a U-Net."""

    scale: int  # its U-Net sees images averaged over this many voxels a side (published: 2)
    channels: tuple[int, ...]  # of MONAI's BasicUNet (published: 8 16 32 64 64 64)


@dataclass(frozen=True)
class RegistrationSettings:
    """Stage 5, registration: the network, its training, and the optimiser without training."""

    unets: tuple[UNetSettings, ...]  # the steps of the network, the outermost first (published: two alike)
    control: int  # its velocities live on a grid this many times coarser than the images (published: 2)
    squarings: int  # published: 12
    smoothness: float  # weight of the squared gradient (published: 0.5)
    steps: int
    batch: int
    learning_rate: float
    instance: tuple[Level, ...]  # of the network's answer, coarse to fine (published: one level of 50 steps)
    baseline: tuple[Level, ...]  # the no-training baseline, coarse to fine
    correlation: CorrelationSettings | None = None  # a step before the U-Nets (published: none)
    scales: int = 1  # training compares images at this many scales, each half the last (published: 1)
    repeats: int = 1  # of the last step when pairs are registered (published: 1, as in training)
    merge: bool = False  # instance optimisation is of one velocity: the network's, added up, or zero
    optimiser_smoothness: float | None = None  # as smoothness, of the optimiser; None: as in training
    blur: float = 0.8  # of the images that the optimiser compares: standard deviation in voxels of the level
    augmentation: Augmentation | None = None  # where its pairs are warped; None: the autoencoder's
    breathing: Augmentation | None = None  # where its pairs go along other people's motions, too; None: augmentation


# What the trained weights do not depend on, or what stands among the inputs of the networks that do (breathing): it may
# differ from what a network was trained with.
AFTER_TRAINING = (*("copies", "instance", "baseline", "repeats", "merge", "optimiser_smoothness", "blur", "breathing"),)


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

    @property
    def spatial_dims(self) -> int:
        """2 for slices, 3 for volumes."""
        return len(self.spatial)


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
        fade_in=0,  # here it did harm: with 480 tokens and 1500 steps the loss ended at 0.81, without at 0.74
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
        steps=8000,  # many small batches: at equal cost, 4 pairs a step learn far more than 16
        batch=4,
        learning_rate=2e-3,
        average=0.999,
    ),
    # About as many as the real pairs. In 64 pairs of an earlier model the baseline displaced voxels by 4.99 on average
    # after uniform steps at 0.9, by 5.21 after these, in real training pairs by 5.70; areas and bits per token came
    # nearer to those of real pairs, too. Networks trained on either reached the same Dice on training pairs, 0.813.
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
    vqae=VQAESettings(
        channels=(48, 48, 64, 64, 128, 192, 256, 384),
        strides=(1, 2, 1, 2, 1, 2, 1, 1),  # eight times down: a slice has far fewer voxels than a volume
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
)

# The three-dimensional ones.
# On volumes at full size; chapter 10 describes the trials on training pairs behind the steps and the bending energy.
_LUNG_LEVELS = (Level(8, 2, 20, 0.3, 0.5), Level(4, 2, 20, 0.2, 0.5), Level(2, 4, 20, 0.2, 0.5))
_HALVED_LUNG_LEVELS = tuple(level._replace(scale=level.scale // 2) for level in _LUNG_LEVELS)

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
        steps=900,  # after a tenth of that, both images still come out as their average
        batch=2,
        learning_rate=4e-3,
        # own warps of 1.0 make the two images differ less, and their average is left later
        augmentation=Augmentation(affine=0.05, common=1.0, own=1.5, smoothness=12, coarser=4),
        patches=Patches((32, 24, 32), cuts=32),
    ),
    denoiser=DenoiserSettings(
        layers=0,
        width=32,
        heads=4,
        feed_forward=64,
        copies=4,
        steps=700,  # of one pair each: in equal time these learn more than 500 of two
        batch=1,
        learning_rate=1e-2,
        average=0.98,
        convolutions=2,
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
        scales=3,  # with these and the repeats, synthetic pairs teach more of the motion
        repeats=3,
        breathing=Augmentation(affine=0.05, common=1.0, own=0.5, smoothness=12, coarser=4, motion=1.0),
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
        channels=(16, 32, 64, 64),
        strides=(2, 2, (1, 1, 2), 1),  # tokens of 8 x 8 x 16 mm, long where breathing moves things
        codes=1024,
        fade_in=0,
        steps=4000,
        batch=2,
        learning_rate=4e-3,
        augmentation=Augmentation(affine=0.05, common=2.0, own=2.0, smoothness=24, coarser=4),
        patches=Patches((64, 48, 64), cuts=8),
    ),
    denoiser=DenoiserSettings(
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
    # Bits per token of 16 synthetic pairs of lungs under the denoiser itself, each to about 0.03: 3.20 by 256 uniform
    # steps, 3.39 by 32 of those; 3.27 by 32 and 3.19 by 48 on a cosine schedule.
    synthesis=SynthesisSettings(pairs=128, steps=48, temperature=0.9, schedule="cosine"),
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
        breathing=Augmentation(affine=0.05, common=2.0, own=1.0, smoothness=24, coarser=4, motion=1.6),
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
    """The profile of that name for slices or volumes; without one, what ``PAIRDIFF_PROFILE`` names, else ``quick``.

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
    """Settings as JSON holds them: dataclasses as dictionaries, tuples as lists."""
    return json.loads(json.dumps(asdict(settings)))


def trained_settings(settings: Any) -> dict[str, Any]:
    """:func:`to_json` of the settings of a stage without those that trained weights do not depend on."""
    return {name: value for name, value in to_json(settings).items() if name not in AFTER_TRAINING}


def profile_from_json(content: Mapping[str, Any]) -> Profile:
    """The profile that :func:`to_json` described.

    Raises:
        ValueError: if it is not the description of a profile of this version; the message names what is wrong.
    """
    from pydantic import TypeAdapter, ValidationError  # here: its import takes longer than all else in this file

    try:
        return TypeAdapter(Profile).validate_python(content)
    except ValidationError as error:
        wrong = (".".join(map(str, each["loc"])) for each in error.errors())
        raise ValueError(f"missing or wrong: {', '.join(wrong)}") from error
