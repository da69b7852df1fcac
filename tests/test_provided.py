"""The provided models: each loads, does what its card says, and stands in for training where one asks for it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import small_run

from pairdiff_core import pipeline, provided, results
from pairdiff_core.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from pairdiff_core.data import DATASETS, default_dataset
from pairdiff_core.profiles import get_profile
from pairdiff_core.runs import Run

MODELS = Path(__file__).parent.parent / "models"
FOLDERS = sorted(path.parent for path in MODELS.glob("*/measured.json"))


def measured_of(folder):
    return json.loads((folder / "measured.json").read_text())


def test_they_are_small():
    assert FOLDERS
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 20e6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_loads_and_repeats_its_numbers_on_drawn_pairs(folder):
    measured = measured_of(folder)
    profile = get_profile(measured["provenance"]["profile"], DATASETS[measured["provenance"]["dataset"]])
    assert provided.measure_on_phantoms(folder, profile) == pytest.approx(measured["phantom"], abs=0.01)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_repeats_its_autoencoders_dice_on_the_real_pairs(folder):
    measured = measured_of(folder)
    dataset, profile = measured["provenance"]["dataset"], measured["provenance"]["profile"]
    if default_dataset(DATASETS[dataset]) != dataset:
        pytest.skip("needs the real data: set PAIRDIFF_DATA")
    run = Run(dataset, get_profile(profile, DATASETS[dataset]))
    dice = results.describe_vqae(run, provided.load(folder)["vqae"], run.test)["dice"]
    assert dice == pytest.approx(measured["test"]["vqae_dice"], abs=0.005)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_card_says_what_was_measured(folder, tmp_path):
    (tmp_path / folder.name).mkdir()
    provided.write_card(tmp_path / folder.name, measured_of(folder))
    assert (tmp_path / folder.name / "README.md").read_text() == (folder / "README.md").read_text()


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A small finished run, and the folder of its provided model."""
    run = small_run(tmp_path / "run")
    monkeypatch.setattr(provided, "get_profile", lambda name, dims: run.profile)
    autoencoder = pipeline.train_vqae(run)
    pipeline.train_denoiser(run, pipeline.encode_training_pairs(run, autoencoder))
    pipeline.train_registration(run, run.train, "synthetic")
    folder = tmp_path / "models" / "phantom2d-quick"
    provided.export(run.path, folder)
    return run, folder


def test_weights_are_halved_and_do_nearly_the_same(finished):
    run, folder = finished
    tensors, metadata = load_checkpoint(folder / "registration-synthetic.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float16}
    assert metadata == load_checkpoint(run.path / "registration-synthetic.safetensors")[1]
    network = provided.load(folder)["registration-synthetic"]
    trained = pipeline.train_registration(run, run.train, "synthetic")
    found, expected = (pipeline.register_pairs(run, run.test, stage) for stage in (network, trained))
    torch.testing.assert_close(found.displacement, expected.displacement, atol=0.01, rtol=0.01)


def test_a_run_takes_a_provided_stage_instead_of_training(finished, tmp_path, monkeypatch, capsys):
    run, folder = finished
    monkeypatch.setenv("PAIRDIFF_MODELS", str(folder.parent))
    elsewhere = replace(run, folder=tmp_path / "elsewhere")
    stage = pipeline.train_vqae(elsewhere)
    assert stage.loaded and stage.fingerprint == provided.load(folder)["vqae"].fingerprint
    assert "not trained here but taken from" in capsys.readouterr().out
    assert not (elsewhere.path / "vqae.safetensors").exists()
    assert not pipeline.train_registration(elsewhere, run.train, "real").loaded, "that one is not provided"
    assert pipeline.train_vqae(run).fingerprint != stage.fingerprint, "the run's own comes first"


def test_a_folder_of_models_that_is_none_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("PAIRDIFF_MODELS", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="PAIRDIFF_MODELS is .*nowhere"):
        pipeline.train_vqae(small_run(tmp_path / "new"))


def test_a_model_of_other_sizes_is_refused(finished, monkeypatch):
    run, folder = finished
    other = replace(run.profile, vqae=replace(run.profile.vqae, channels=(4, 16)))
    monkeypatch.setattr(provided, "get_profile", lambda name, dims: other)
    with pytest.raises(CheckpointError, match="vqae.safetensors: the tensor"):
        provided.load(folder)


def test_what_comes_after_training_is_as_this_version_has_it(finished):
    run, folder = finished
    path = folder / "registration-synthetic.safetensors"
    tensors, metadata = load_checkpoint(path)
    metadata["config"]["numbers"] |= {"instance": [2, 1, 7, 0.1], "squarings": 3}  # one level, as it was once
    save_checkpoint(path, tensors, metadata)
    profile, stage = provided.load_stage(folder, path.stem, pipeline.new_registration)
    assert profile.registration.instance == run.profile.registration.instance
    assert profile.registration.squarings == stage.model.squarings == 3


def test_a_stage_that_is_missing_is_named_before_anything_is_written(finished, tmp_path):
    run, _ = finished
    (run.path / "denoiser.safetensors").unlink()
    with pytest.raises(CheckpointError, match="denoiser.safetensors does not exist"):
        provided.export(run.path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
