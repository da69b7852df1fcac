"""Runs and their five stages: they fit together, are made once and then loaded, and are never mixed or lost."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from largest import LargestTensor
from small_run import small_run, small_run_3d

from pairdiff_core import pipeline, registration, vqae
from pairdiff_core.data.breathing import load_motions
from pairdiff_core.errors import CheckpointError, DataError
from pairdiff_core.pipeline import Run, load_or_make, open_run
from pairdiff_core.profiles import Level, get_profile
from pairdiff_core.registration import register
from pairdiff_core.storage import Saving, load_checkpoint
from pairdiff_core.training import Paused, devices


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run's folder, and a function that gives its run with a changed profile."""
    shutil.copytree(trained[0].path, tmp_path / "copy")

    def run(**changes):
        profile = trained[0].profile
        parts = {name: replace(getattr(profile, name), **values) for name, values in changes.items()}
        return replace(trained[0], folder=tmp_path / "copy", profile=replace(profile, **parts))

    return run


def fingerprints(made):
    return [made.autoencoder.fingerprint, made.denoiser.fingerprint, *(x.fingerprint for x in made.networks.values())]


# ----------------------------------------------------------------------------------------------------- a run


def test_the_default_folder_says_what_is_in_it(monkeypatch):
    monkeypatch.delenv("PAIRDIFF_RUNS", raising=False)
    assert Run("phantom2d", get_profile("quick"), seed=3).path == Path("runs/phantom2d-quick-seed3")
    monkeypatch.setenv("PAIRDIFF_RUNS", "/elsewhere")
    assert Run("phantom2d", get_profile("quick")).path == Path("/elsewhere/phantom2d-quick-seed0")
    assert Run("phantom2d", get_profile("quick"), folder="mine").path == Path("mine")


def test_training_and_validation_pairs_show_different_subjects(trained):
    run, _ = trained

    def subjects(pairs):
        return {subject for name in pairs.names for subject in name.split("~")}

    assert not subjects(run.train) & subjects(run.validation)
    assert run.train.spatial == run.validation.spatial == run.profile.spatial


def test_missing_data_leave_no_run_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for dataset, match in (("oasis2d", "empty"), ("brains", "'brains'")):
        run = replace(small_run(tmp_path / "run"), dataset=dataset, data=tmp_path / "empty")
        with pytest.raises(DataError, match=match):
            pipeline.run_stages(run)
        with pytest.raises(DataError, match=match):
            pipeline.measure(run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dataset", ["phantom2d", "phantom3d"])
def test_the_largest_seed_works_and_others_are_refused(tmp_path, dataset):
    small = {"phantom2d": small_run, "phantom3d": small_run_3d}[dataset](tmp_path)
    small = replace(small, profile=replace(small.profile, max_pairs=1, phantom_subjects=2))
    assert len(replace(small, seed=2**31 - 1).train) == 1
    for seed in (-1, 2**31, 2**43, 2**70):
        with pytest.raises(DataError, match="from 0 to 2147483647"):
            replace(small, seed=seed)


def test_a_folder_knows_its_run(trained, tmp_path):
    run, _ = trained
    found = open_run(run.path)
    assert (found.dataset, found.seed, found.path) == (run.dataset, run.seed, run.path)
    assert found.profile == run.profile != get_profile("quick"), "with its changed settings"
    lungs = small_run_3d(tmp_path, seed=7)
    with lungs.working():
        pass
    assert open_run(tmp_path).profile == lungs.profile and open_run(tmp_path).seed == 7
    config = (tmp_path / "config.json").read_text()
    for old, new, wrong in (
        ('"steps"', '"number"', "vqae.steps, .*registration.steps"),
        ('"settings"', '"sizes"', "'settings'"),
    ):
        (tmp_path / "config.json").write_text(config.replace(old, new))
        with pytest.raises(
            CheckpointError, match=rf"config\.json does not fit this version \(.*{wrong}\)\. Train again"
        ):
            open_run(tmp_path)


# ------------------------------------------------------------------------------------------------- the stages


def test_tokens_start_with_the_training_pairs_as_they_are(trained):
    run, made = trained
    number = len(run.train)
    assert made.tokens.shape == (run.profile.denoiser.copies * number, 6, 10) and made.tokens.dtype == torch.int16
    assert torch.equal(made.tokens[:number], vqae.encode_pairs(made.autoencoder.model, run.train.labels))
    assert not torch.equal(made.tokens[number:], made.tokens[:number]), "the other copies are warped"


def test_tokens_of_more_pairs_take_no_more_memory(trained, tmp_path, monkeypatch):
    run, made = trained
    monkeypatch.setattr(vqae, "VOXELS_AT_ONCE", 2 * run.train.labels[0].numel())  # two pairs
    largest = []
    for number in (3, 12):
        some = replace(run, folder=tmp_path / str(number))
        some.__dict__["train"] = run.train[:number]
        with LargestTensor() as maps, LargestTensor(torch.uint8) as warped:
            tokens = pipeline.encode_training_pairs(some, made.autoencoder)
        with LargestTensor() as logits:
            pipeline.decode_pairs(some, made.autoencoder, tokens)
        largest.append((maps.numel, warped.numel, logits.numel))
    assert len(tokens) == 24 and largest[0] == largest[1]
    assert torch.equal(tokens, made.tokens), "what is encoded together makes no difference"


def test_synthetic_pairs_are_a_pair_set_like_the_real_ones(trained):
    run, made = trained
    number, synthetic = run.profile.synthesis.pairs, made.synthetic
    tokens = load_checkpoint(run.path / "synthesis.safetensors")[0]["tensor"]
    assert tokens.shape == (number, 6, 10)
    assert int(tokens.min()) >= 0 and int(tokens.max()) < run.profile.vqae.codes, "no MASK is left"
    assert synthetic.labels.shape == (number, 2, *run.train.spatial)
    assert synthetic.label_names == run.train.label_names and synthetic.spacing == run.train.spacing
    assert synthetic.displacement is None and synthetic.landmarks is None
    assert len(set(synthetic.names)) == number


def test_everything_is_loaded_the_second_time(trained, capsys):
    run, made = trained
    again = pipeline.run_stages(run)
    assert "trained in" not in capsys.readouterr().out
    for first, second in zip((made.autoencoder, made.denoiser), (again.autoencoder, again.denoiser), strict=True):
        assert not first.loaded and second.loaded and not second.model.training
        assert first.history == second.history and first.seconds == second.seconds
    assert fingerprints(made) == fingerprints(again)
    assert torch.equal(made.tokens, again.tokens) and torch.equal(made.synthetic.labels, again.synthetic.labels)


def test_the_bits_depend_on_the_seed_and_not_on_what_ran_before(trained, tmp_path):
    torch.rand(17)
    _, made = trained
    again = pipeline.run_stages(small_run(tmp_path / "again"), "synthesis")
    assert fingerprints(again) == fingerprints(made)[:2]
    assert torch.equal(again.synthetic.labels, made.synthetic.labels)
    other = pipeline.train_vqae(small_run(tmp_path / "other", seed=1))
    assert other.fingerprint != made.autoencoder.fingerprint


def test_a_run_says_how_it_went_and_what_made_it(trained):
    run, made = trained
    log = (run.path / "logs" / "vqae" / "metrics.csv").read_text()
    assert str(made.autoencoder.history[-1]["loss"]) in log and "codes used" in log
    made_by = load_checkpoint(run.path / "vqae.safetensors")[1]["provenance"]
    assert made_by["profile"] == "quick" and made_by["processes"] == 1 and made_by["precision"] == "32-true"


def test_volumes_take_the_same_path(tmp_path):
    """Every stage, the network and the baseline work on 3D lungs with the same code."""
    run = small_run_3d(tmp_path)
    run = replace(run, profile=replace(run.profile, max_pairs=2))
    made = pipeline.run_stages(run, "synthesis")
    network = pipeline.train_registration(run, made.synthetic, "synthetic")
    assert made.tokens.shape[1:] == (16, 13, 16), "a quarter"
    assert (
        made.synthetic.labels.shape == (4, 2, 64, 52, 64) and made.synthetic.spacing == run.train.spacing == (4.0,) * 3
    )
    alone = pipeline.images_with_themselves(made.synthetic)
    assert torch.equal(alone.labels, made.synthetic.labels.flatten(0, 1)[:, None].repeat(1, 2, 1, 1, 1))
    assert alone.names[3] == "synthetic_0001_moving~synthetic_0001_moving"
    pairs = run.validation[:1]
    by_network, baseline = register(pairs, run.profile, network.model), register(pairs, run.profile)
    assert by_network.displacement.shape == by_network.inverse.shape == (1, 3, 64, 52, 64)
    before, after = registration.score(pairs), registration.score(pairs, baseline)
    assert after["tre_mm"] < before["tre_mm"] and after["dice"] > before["dice"], "the baseline already helps"


def test_a_network_learns_from_other_peoples_motions(tmp_path):
    """The same pairs and steps with other motions, or another share of them, give another network."""
    run = small_run_3d(tmp_path)
    motions = load_motions("phantom3d")
    network = pipeline.train_registration(run, run.train, "real-motion", warped=True, motions=motions)
    assert pipeline.train_registration(run, run.train, "real-motion", warped=True, motions=motions).loaded
    fewer = replace(motions, displacement=motions.displacement / 2)
    with pytest.raises(CheckpointError, match="inputs differ"):
        pipeline.train_registration(run, run.train, "real-motion", warped=True, motions=fewer)
    still = replace(run, folder=tmp_path / "still")
    without = pipeline.train_registration(still, run.train, "real-motion", warped=True)
    assert network.fingerprint != without.fingerprint


# ------------------------------------------------------------------------------------------- made once, or refused


def test_other_settings_are_refused_and_the_file_stays(copied):
    run = copied(vqae={"steps": 13})
    before = (run.path / "vqae.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"vqae\.safetensors was made with other settings \(settings differ"):
        pipeline.train_vqae(run)
    slices = copied()
    other = replace(slices, profile=replace(slices.profile, num_labels=25))
    other.__dict__["train"] = slices.train
    with pytest.raises(CheckpointError, match=r"vqae\.safetensors was trained on images with other axes or labels"):
        pipeline.train_vqae(other)
    assert (run.path / "vqae.safetensors").read_bytes() == before


def test_settings_that_trained_weights_do_not_depend_on_may_change(trained, copied):
    levels = (Level(4, 1, 2, 0.1), Level(2, 2, 2, 0.2))
    run = copied(registration={"instance": levels, "baseline": levels, "repeats": 2, "merge": True})
    network = pipeline.train_registration(run, run.train, "real")
    assert network.loaded and network.fingerprint == trained[1].networks["real"].fingerprint
    tokens, number = trained[1].tokens, len(run.train)
    assert pipeline.train_denoiser(copied(denoiser={"copies": 7}), tokens).loaded
    with pytest.raises(CheckpointError, match="inputs differ"):
        pipeline.train_denoiser(run, tokens[:number])


def test_inputs_of_another_run_are_refused(trained, copied):
    _, made = trained
    stranger = made.autoencoder._replace(fingerprint="0" * 16)
    with pytest.raises(CheckpointError, match=r"tokens\.safetensors was made with other settings \(inputs"):
        pipeline.encode_training_pairs(copied(), stranger)
    with pytest.raises(CheckpointError, match=r"synthesis\.safetensors was made with other settings \(inputs"):
        pipeline.synthesise(copied(), made.autoencoder, made.denoiser._replace(fingerprint="0" * 16))
    with pytest.raises(CheckpointError, match=r"registration-real\.safetensors was made with other settings \(inputs"):
        pipeline.train_registration(copied(), made.synthetic, "real")


def test_a_damaged_checkpoint_is_named_and_stays(copied):
    file = copied().path / "vqae.safetensors"
    broken = bytearray(file.read_bytes())
    broken[-3] ^= 0xFF
    file.write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"vqae\.safetensors is damaged"):
        pipeline.train_vqae(copied())
    assert file.read_bytes() == bytes(broken)


def test_a_failed_training_leaves_no_result(tmp_path):
    run = small_run(tmp_path, vqae=replace(small_run(tmp_path).profile.vqae, learning_rate=1e30))
    with pytest.raises(FloatingPointError, match="vqae: .*lower the learning rate"):
        pipeline.train_vqae(run)
    assert not list(tmp_path.glob("vqae*"))


def test_a_paused_training_goes_on_with_its_log(trained, tmp_path):
    asked = iter([None] * 7 + ["time is over"])
    with pytest.raises(Paused, match="vqae: time is over, paused after step 8"):
        pipeline.train_vqae(small_run(tmp_path, saving=Saving(should_pause=lambda: next(asked))))
    assert not (tmp_path / "vqae.safetensors").exists()
    assert pipeline.train_vqae(small_run(tmp_path)).fingerprint == trained[1].autoencoder.fingerprint
    logs = [path / "logs" / "vqae" / "metrics.csv" for path in (tmp_path, trained[0].path)]
    assert logs[0].read_text() == logs[1].read_text()


def test_shards_are_made_once(tmp_path):
    made = []
    asked = iter(["time is over"])

    def pause():
        return next(asked) if made == [0, 1, 2, 2] else None

    run = small_run(tmp_path, saving=Saving(should_pause=pause))

    def make(shard):
        made.append(shard)
        if made == [0, 1, 2]:
            raise KeyboardInterrupt
        return torch.full((1,), shard)

    with pytest.raises(KeyboardInterrupt):
        load_or_make(run, "numbers", {"n": 5}, make, shards=4)
    with pytest.raises(CheckpointError, match=r"0000 was made with other settings \(inputs differ"):
        load_or_make(run, "numbers", {"n": 6}, lambda shard: torch.ones(1), shards=4)
    shutil.rmtree(tmp_path / "numbers.shards")
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        load_or_make(run, "numbers", {"n": 5}, make, shards=4)
    with pytest.raises(Paused, match="numbers: time is over, paused"):
        load_or_make(run, "numbers", {"n": 5}, make, shards=4)
    asked = iter([None] * 9)
    for _ in range(2):
        assert torch.equal(load_or_make(run, "numbers", {"n": 5}, make, shards=4), torch.arange(4))
    assert made == [0, 1, 2, 2, 3]
    assert not (tmp_path / "numbers.shards").exists()
    with pytest.raises(CheckpointError, match="inputs differ"):
        load_or_make(run, "numbers", {"n": 6}, make, shards=4)


# ---------------------------------------------------------------------------------------------- pretrained models


@pytest.fixture
def models(trained, tmp_path, monkeypatch):
    """A folder of pretrained models that holds the trained run's."""
    shutil.copytree(trained[0].path, tmp_path / "models" / "phantom2d-quick")
    monkeypatch.setenv("PAIRDIFF_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_a_pretrained_model_takes_the_place_of_a_training(trained, models, tmp_path, capsys):
    run = small_run(tmp_path / "run", seed=1)
    found = pipeline.train_vqae(run)
    assert found.loaded and found.fingerprint == trained[1].autoencoder.fingerprint
    assert f"vqae: not trained here but taken from {models / 'phantom2d-quick'}" in capsys.readouterr().out
    assert not run.path.exists()


def test_a_pretrained_model_of_other_settings_is_refused(models, tmp_path):
    """Its weights would fit, because they do not depend on the squarings."""
    settings = small_run(tmp_path).profile.registration
    run = small_run(tmp_path / "run", registration=replace(settings, squarings=2))
    with pytest.raises(CheckpointError, match=r"registration-synthetic\.safetensors was made .*\(settings differ"):
        pipeline.train_registration(run, run.train, "synthetic")
    (models / "phantom2d-quick" / "registration-synthetic.safetensors").unlink()
    assert not pipeline.train_registration(run, run.train[:4], "synthetic").loaded, "none there: trained"


def test_models_are_found_by_name_and_folder(trained, models, tmp_path, monkeypatch):
    run, made = trained
    assert models / "phantom2d-quick" in pipeline.pretrained_models()
    assert pipeline.find_model("phantom2d-quick") == models / "phantom2d-quick"
    assert pipeline.find_model(run.path) == run.path
    found = pipeline.load_model(models / "phantom2d-quick", "registration-synthetic-warped")
    assert found.fingerprint == made.networks["synthetic, warped"].fingerprint
    with pytest.raises(CheckpointError, match="holds no registration-other; .*: real, real-warped, synthetic"):
        pipeline.load_model(models / "phantom2d-quick", "registration-other")
    with pytest.raises(CheckpointError, match="nothing is neither a folder nor a pretrained model.*phantom2d-quick"):
        pipeline.find_model("nothing")
    monkeypatch.setenv("PAIRDIFF_MODELS", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="PAIRDIFF_MODELS is .*nowhere', which is not a folder"):
        pipeline.train_vqae(small_run(tmp_path / "run"))


def test_the_models_of_this_project_load():
    for folder in pipeline.pretrained_models():
        for name in ("vqae", "denoiser", pipeline.default_network(folder)):
            assert pipeline.load_model(folder, name).loaded


# ------------------------------------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("small", [small_run, small_run_3d])
def test_an_autoencoder_in_bfloat16_learns_as_one_in_32_bit(tmp_path, small, monkeypatch):
    monkeypatch.setattr(devices, "fast_in_bfloat16", lambda device: True)
    run = small(tmp_path / "plain")
    low = replace(run, folder=tmp_path / "low", profile=replace(run.profile, mixed_precision=("vqae",)))
    run.__dict__["train"] = low.__dict__["train"] = run.train[:2]
    losses, also = ([entry["loss"] for entry in pipeline.train_vqae(each).history] for each in (run, low))
    assert also == pytest.approx(losses, rel=2e-2) and also != losses
    assert load_checkpoint(tmp_path / "low" / "vqae.safetensors")[1]["provenance"]["precision"] == "bf16-mixed"
    monkeypatch.setattr(devices, "fast_in_bfloat16", lambda device: False)
    assert pipeline.train_vqae(low).loaded, "good where bfloat16 is slow, too"


def test_a_denoiser_in_bfloat16_agrees_with_the_plain_one(trained, tmp_path, monkeypatch):
    """bfloat16 has three digits, so a few sampled tokens may differ."""
    monkeypatch.setattr(devices, "fast_in_bfloat16", lambda device: True)
    plain, made = trained
    run = replace(plain, folder=tmp_path, profile=replace(plain.profile, mixed_precision=("denoiser", "synthesis")))
    denoiser = pipeline.train_denoiser(run, made.tokens)
    losses, also = ([entry["loss"] for entry in each.history] for each in (made.denoiser, denoiser))
    assert also == pytest.approx(losses, rel=2e-2) and also != losses
    expected = load_checkpoint(plain.path / "synthesis.safetensors")[0]["tensor"]
    assert (pipeline.synthesise(run, made.autoencoder, denoiser) == expected).double().mean() > 0.9
