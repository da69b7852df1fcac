"""A run so small that all five stages take seconds."""

from dataclasses import replace

from pairdiff_core.pipeline import Run
from pairdiff_core.profiles import Augmentation, Level, Patches, UNetSettings, get_profile

UNETS = 2 * (UNetSettings(2, (4, 4, 4, 4, 4, 4)),)


def small_run(folder, seed=0, saving=None, **changes):
    """A phantom run at 48 x 80 with a few steps everywhere; ``changes`` replace parts of its profile."""
    quick = get_profile("quick")
    profile = replace(
        quick,
        spatial=(48, 80),
        max_pairs=12,
        phantom_subjects=4,
        vqae=replace(
            quick.vqae,
            channels=(8, 16),
            strides=(2, 4),
            codes=16,
            fade_in=4,
            steps=12,
            augmentation=Augmentation(affine=0.05, common=0.5, own=0.5, smoothness=8),
        ),
        denoiser=replace(quick.denoiser, layers=1, width=16, heads=2, feed_forward=16, copies=2, steps=10, batch=8),
        synthesis=replace(quick.synthesis, pairs=8, steps=6),
        registration=replace(
            quick.registration,
            unets=UNETS,
            steps=8,
            batch=4,
            learning_rate=2e-2,
            instance=(Level(scale=2, control=1, steps=3, learning_rate=0.1),),
            baseline=(Level(scale=2, control=1, steps=5, learning_rate=0.2),),
        ),
    )
    run = Run("phantom2d", replace(profile, **changes), seed=seed, folder=folder)
    return replace(run, saving=saving) if saving else run


def small_image_run(folder, **changes):
    """The small run with tiny settings of the stages of images, large enough for MS-SSIM."""
    run = small_run(folder, **{"spatial": (64, 80)} | changes)
    profile = run.profile
    diffusion = replace(profile.gaussian_denoiser, channels=(4, 8), timesteps=40, steps=6, batch=2, sampling_steps=5)
    control = replace(profile.controlnet_flair, embedding=(4, 8), steps=6, batch=2, sampling_steps=5)
    plain = replace(profile.translator, channels=(4, 4, 4, 4, 4, 4), steps=6, batch=1)
    profile = replace(
        profile,
        kl_autoencoder=replace(profile.kl_autoencoder, channels=(4, 8), latent_channels=2, latents=70, steps=6),
        gaussian_denoiser=diffusion,
        rectified_flow=diffusion,
        controlnet_flair=control,
        controlnet_fixed=control,
        translator=plain,
        segmenter=plain,
        student=replace(profile.student, steps=6, batch=2),
        encoders=replace(profile.encoders, channels=(4, 4), embedding=4, pairs=40, steps=6, batch=4),
        score_network=replace(profile.score_network, channels=(4, 8), steps=6, batch=1, sampling_steps=3),
    )
    return replace(run, profile=profile)


def small_run_3d(folder, seed=0):
    """The same on phantom lungs at the quick size, with an autoencoder trained on patches."""
    quick = get_profile("quick", 3)
    profile = replace(
        quick,
        max_pairs=4,
        phantom_subjects=4,
        vqae=replace(
            quick.vqae,
            channels=(4, 8, 8),
            strides=(2, 2, 1),
            codes=16,
            fade_in=2,
            steps=6,
            patches=Patches((32, 32, 32), cuts=3),
        ),
        denoiser=replace(
            quick.denoiser, layers=1, width=16, heads=2, feed_forward=16, copies=2, steps=4, convolutions=1
        ),
        synthesis=replace(quick.synthesis, pairs=4, steps=4),
        registration=replace(
            quick.registration,
            unets=UNETS,
            steps=4,
            instance=(Level(scale=2, control=2, steps=3, learning_rate=0.1, bending=0.1),),
            merge=True,
            baseline=(Level(scale=2, control=2, steps=10, learning_rate=0.3),),
        ),
    )
    return Run("phantom3d", profile, seed=seed, folder=folder)
