"""The stages of diffusion on images: made once and then loaded, resumed, and refused for other inputs or volumes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_slice
from small_run import small_image_run, small_run_3d

from pairdiff_cli.run import _worked
from pairdiff_core import pipeline
from pairdiff_core.data.contrasts import each_slice_once
from pairdiff_core.errors import CheckpointError, DataError
from pairdiff_core.pipeline import Run
from pairdiff_core.profiles import IMAGE_STAGES
from pairdiff_core.storage import Saving, load_checkpoint
from pairdiff_core.training import Paused


def test_the_stages_fit_together(images_made):
    run, results = images_made
    assert results.latents.shape == (70, 2, 32, 40)
    assert {path.stem for path in run.path.glob("*.safetensors")} == set(IMAGE_STAGES)
    for sampler, stage in (("ddpm", "gaussian_denoiser"), ("ddim", "gaussian_denoiser"), ("rflow", "rectified_flow")):
        latents = pipeline.sample_latents(run, results.models[stage], sampler, 3)
        images = results.models["kl_autoencoder"].model.decode(latents)
        assert images.shape == (3, 1, *run.profile.spatial) and 0 <= images.min() <= images.max() <= 1
        assert torch.equal(latents, pipeline.sample_latents(run, results.models[stage], sampler, 3))


def test_everything_is_loaded_the_second_time(images_made):
    run, results = images_made
    again = pipeline.run_image_stages(run)
    assert all(each.loaded for each in again.models.values())
    assert torch.equal(again.latents, results.latents)
    assert pipeline.load_model(run.path, "gaussian_denoiser").fingerprint == (
        results.models["gaussian_denoiser"].fingerprint
    )


def test_the_standardisation_of_latents_is_stored_with_the_weights(images_made):
    run, results = images_made
    tensors, _ = load_checkpoint(run.path / "kl_autoencoder.safetensors")
    assert not torch.equal(tensors["statistics.running_mean"], torch.zeros(2))
    loaded = pipeline.load_model(run.path, "kl_autoencoder").model
    images = pipeline.t1_images(run, run.validation).some(3, "test")
    assert torch.equal(loaded.encode(images), results.models["kl_autoencoder"].model.encode(images))


def test_a_paused_training_ends_with_the_same_bits(images_made, tmp_path):
    asked = iter([None] * 3 + ["time is over"])
    paused = replace(small_image_run(tmp_path), saving=Saving(should_pause=lambda: next(asked)))
    with pytest.raises(Paused, match="kl_autoencoder: time is over, paused after step 4"):
        pipeline.train_kl_autoencoder(paused)
    again = pipeline.train_kl_autoencoder(small_image_run(tmp_path))
    assert again.fingerprint == images_made[1].models["kl_autoencoder"].fingerprint


def test_other_settings_and_inputs_are_refused(images_made):
    run, results = images_made
    other = replace(run, profile=replace(run.profile, kl_autoencoder=replace(run.profile.kl_autoencoder, steps=7)))
    with pytest.raises(CheckpointError, match=r"kl_autoencoder\.safetensors was made with other settings"):
        pipeline.train_kl_autoencoder(other)
    with pytest.raises(CheckpointError, match=r"rectified_flow\.safetensors was made with other .*\(inputs differ"):
        pipeline.train_latent_denoiser(run, results.latents[:60], "rectified_flow")
    more = replace(run.profile.gaussian_denoiser, sampling_steps=2)
    few = replace(run, profile=replace(run.profile, gaussian_denoiser=more))
    assert pipeline.train_latent_denoiser(few, results.latents, "gaussian_denoiser").loaded, "sampling may change"


def test_a_pretrained_model_takes_the_place_of_a_training(images_made, tmp_path, monkeypatch):
    run, results = images_made
    (tmp_path / "phantom2d-quick").symlink_to(run.path)
    monkeypatch.setenv("PAIRDIFF_MODELS", str(tmp_path))
    found = pipeline.train_kl_autoencoder(small_image_run(tmp_path / "new", seed=1))
    assert found.loaded and found.fingerprint == results.models["kl_autoencoder"].fingerprint


def test_volumes_are_refused_and_leave_no_folder(tmp_path):
    with pytest.raises(DataError, match="slices only; choose the data set phantom2d or oasis2d"):
        pipeline.run_image_stages(small_run_3d(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_command_runs_these_stages(images_made):
    run, _ = images_made
    assert _worked(run, "latents") is None
    assert not (run.path / "vqae.safetensors").exists()


def test_images_are_drawn_afresh_in_each_step_and_depend_on_the_purpose(images_made):
    run, _ = images_made
    images = pipeline.t1_images(run, run.train)
    batches = images.batches(2, "a")
    assert batches(0).shape == (4, 1, *run.profile.spatial)
    assert torch.equal(batches(1), images.batches(2, "a")(1))
    assert not torch.equal(batches(0), batches(1)) and not torch.equal(batches(0), images.batches(2, "b")(0))


def test_measured_t1_images_replace_drawn_ones(oasis_folder, tmp_path):
    small = small_image_run(tmp_path)
    run = Run("oasis2d", replace(small.profile, spatial=(40, 48)), folder=tmp_path, data=oasis_folder)
    assert pipeline.t1_images(run, run.train).measured is None, "label maps alone"
    slices, names = each_slice_once(run.train)
    for value, name in enumerate(names):
        flat = np.full((80, 96), value / len(names), np.float32)
        write_slice(oasis_folder / name / "slice_norm.nii.gz", flat)
    images = pipeline.t1_images(run, run.train)
    found, labels = images.batches(3, "a")(1), images.labels(3, "a")(1)
    assert found.shape == (6, 1, 40, 48)
    numbers = [round(value * len(names)) for value in found[:, 0, 0, 0].tolist()]
    assert torch.equal(labels, slices[numbers]), "images and labels are of the same slices"
    pairs = set(run.train.names)
    assert all(f"{names[a]}~{names[b]}" in pairs for a, b in zip(numbers[::2], numbers[1::2], strict=True))
