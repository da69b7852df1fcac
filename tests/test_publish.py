"""The pretrained models do what their cards say, and another one can be published."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import publish
from pairdiff_core import pipeline
from pairdiff_core.data import DATASETS, default_dataset
from pairdiff_core.errors import CheckpointError
from pairdiff_core.metrics import multiscale_ssim
from pairdiff_core.pipeline import Run
from pairdiff_core.pipeline.models import load_trained
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import register
from pairdiff_core.storage import load_checkpoint, rounded

MODELS = Path(__file__).parents[1] / "models"
FOLDERS = sorted(path.parent for path in MODELS.glob("*/measured.json"))
each_model = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def measured_of(folder):
    return json.loads((folder / "measured.json").read_text())


def test_they_are_small():
    assert FOLDERS
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 48e6


@each_model
def test_each_repeats_its_numbers_on_phantoms(folder):
    assert publish.measure_on_phantoms(folder) == pytest.approx(measured_of(folder)["phantom"], abs=0.01)


@each_model
def test_each_repeats_its_autoencoders_dice_on_the_real_pairs(folder):
    run = pipeline.open_run(folder)
    if default_dataset(DATASETS[run.dataset]) != run.dataset:
        pytest.skip("needs the real data: set PAIRDIFF_DATA")
    dice = pipeline.describe_vqae(run, pipeline.load_model(folder, "vqae"), run.validation)["dice"]
    assert dice == pytest.approx(measured_of(folder)["validation"]["vqae_dice"], abs=0.005)


@each_model
def test_the_card_says_what_was_measured(folder, tmp_path):
    (tmp_path / folder.name).mkdir()
    publish.write_card(tmp_path / folder.name, measured_of(folder))
    assert (tmp_path / folder.name / "README.md").read_text() == (folder / "README.md").read_text()


def test_a_published_model_does_nearly_what_its_run_does(trained, measured, tmp_path, capsys):
    run, made = trained
    folder = tmp_path / "phantom2d-quick"
    publish.main([str(run.path), str(folder)])
    name = "registration-synthetic.safetensors"
    (tensors, description), (full, original) = (load_checkpoint(place / name) for place in (folder, run.path))
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float16}
    assert description == rounded(original) and tensors.keys() == full.keys()
    networks = (pipeline.load_model(folder, "registration-synthetic"), made.networks["synthetic"])
    halved, whole = (register(run.validation, run.profile, each.model, instance=False) for each in networks)
    torch.testing.assert_close(halved.both, whole.both, atol=0.01, rtol=0.01)
    reached = measured_of(folder)["validation"]
    for name in ("vqae_dice", "dice_before", "dice_network", "tre_mm_network_instance"):
        number = measured["summary"][name.replace("_mm", "").replace("network", "network_synthetic")]
        assert reached[name] == pytest.approx(number, rel=0.01)
    card = (folder / "README.md").read_text()
    assert card.startswith("# phantom2d-quick\n") and f"{reached['dice_network']:.3f}" in card
    assert card in capsys.readouterr().out


def test_a_network_that_is_missing_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="vqae.safetensors does not exist"):
        publish.halve(tmp_path / "run", tmp_path / "new", ["vqae"])
    assert not (tmp_path / "new").exists()


def test_networks_of_images_are_added_to_a_published_model(images_made, tmp_path, monkeypatch):
    run, made = images_made
    folder = tmp_path / f"{run.dataset}-{run.profile.name}"
    folder.mkdir()
    shutil.copy(FOLDERS[0] / "measured.json", folder)
    publish.main([str(run.path), str(folder), "--images"])
    assert "`controlnet_fixed`" in (folder / "README.md").read_text()
    monkeypatch.setenv("PAIRDIFF_MODELS", str(tmp_path))
    loaded = pipeline.run_image_stages(replace(run, folder=tmp_path / "run"))
    assert all(model.loaded for model in loaded.models.values())
    images = pipeline.t1_images(run, run.validation).some(2, "seen")
    whole, halved = (each.models["kl_autoencoder"].model.encode(images) for each in (made, loaded))
    torch.testing.assert_close(halved, whole, atol=0.02, rtol=0.02)


def test_published_networks_of_images_work():
    folder, profile = MODELS / "oasis2d-laptop", get_profile("laptop", 2)
    assert measured_of(folder)["images"] == list(publish.IMAGE_MODELS)
    found = {name: load_trained(folder / f"{name}.safetensors", profile).model for name in publish.IMAGE_MODELS}
    for name, model in found.items():
        assert all(weights.isfinite().all() for weights in model.parameters()), name
    run = Run("phantom2d", replace(profile, max_pairs=2, phantom_subjects=3))
    images, coder = pipeline.t1_images(run, run.validation).some(2, "seen"), found["kl_autoencoder"]
    assert multiscale_ssim(coder.decode(coder.encode(images)), images).min() > 0.8
