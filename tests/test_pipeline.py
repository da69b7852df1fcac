"""All five stages on a very small run: they fit together, load what is there, and repeat bit by bit."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from small_run import small_run, small_run_3d

from pairdiff_core import absorbing, pipeline, results, runs, training, vqae
from pairdiff_core.checkpoints import CheckpointError


def all_stages(run):
    autoencoder = pipeline.train_vqae(run)
    tokens = pipeline.encode_training_pairs(run, autoencoder)
    denoiser = pipeline.train_denoiser(run, tokens)
    new_tokens = pipeline.synthesise(run, autoencoder, denoiser)
    synthetic = pipeline.decode_pairs(run, autoencoder, new_tokens)
    network = pipeline.train_registration(run, synthetic, "synthetic")
    return autoencoder, tokens, denoiser, new_tokens, synthetic, network


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def stages(run):
    return all_stages(run)


def test_tokens_start_with_the_training_pairs_as_they_are(run, stages):
    autoencoder, tokens, *_ = stages
    number = len(run.train)
    assert tokens.shape == (run.profile.diffusion.copies * number, 6, 10) and tokens.dtype == torch.int16
    assert torch.equal(tokens[:number], vqae.encode_pairs(autoencoder.model, run.train.labels))
    assert not torch.equal(tokens[number:], tokens[:number]), "the other copies are warped"


def test_synthetic_pairs_are_a_pair_set_like_the_real_ones(run, stages):
    *_, new_tokens, synthetic, _ = stages
    numbers = run.profile.synthesis
    assert new_tokens.shape == (numbers.pairs, 6, 10)
    assert int(new_tokens.min()) >= 0 and int(new_tokens.max()) < run.profile.vqae.codes, "no MASK is left"
    assert synthetic.labels.shape == (numbers.pairs, 2, *run.train.spatial)
    assert synthetic.label_names == run.train.label_names and synthetic.spacing == run.train.spacing
    assert synthetic.displacement is None and synthetic.landmarks is None
    assert len(set(synthetic.names)) == numbers.pairs


def test_everything_is_loaded_the_second_time(run, stages):
    again = all_stages(run)
    for first, second in zip(stages, again, strict=True):
        if hasattr(first, "fingerprint"):
            assert (
                second.loaded and first.fingerprint == second.fingerprint and first.history == second.history
            )
    assert torch.equal(stages[1], again[1]) and torch.equal(stages[3], again[3])


def test_the_same_seed_gives_the_same_bits_in_another_folder(stages, tmp_path):
    again = all_stages(small_run(tmp_path))
    assert [stage.fingerprint for stage in stages if hasattr(stage, "fingerprint")] == [
        stage.fingerprint for stage in again if hasattr(stage, "fingerprint")
    ]
    assert torch.equal(stages[3], again[3])


def test_another_seed_gives_another_model(stages, tmp_path):
    assert pipeline.train_vqae(small_run(tmp_path, seed=1)).fingerprint != stages[0].fingerprint


def test_tokens_of_another_autoencoder_are_refused(run, stages):
    stranger = stages[0]._replace(fingerprint="0" * 16)
    with pytest.raises(
        CheckpointError, match=r"tokens\.safetensors was made with other settings \(autoencoder"
    ):
        pipeline.encode_training_pairs(run, stranger)


def test_the_history_holds_the_health_of_the_codebook(stages):
    last = stages[0].history[-1]
    assert 0 < last["codes used"] <= 1 and last["perplexity"] >= 1 and last["commitment"] > 0


@pytest.mark.parametrize("instance", [False, True])
def test_registering_by_network_gives_the_pairs_grid_both_ways(run, stages, instance, monkeypatch):
    network = stages[-1]
    two_pairs = 2 * math.prod(run.test.spatial)  # so that three are registered as two and one
    monkeypatch.setattr(pipeline, "VOXELS_AT_ONCE", two_pairs)
    deformation = pipeline.register_pairs(run, run.test[:3], network, instance=instance)
    assert deformation.displacement.shape == deformation.inverse.shape == (3, 2, *run.test.spatial)


def test_registering_without_a_network_is_the_baseline(run):
    from pairdiff_core import registration

    pairs, numbers = run.test[:1], run.profile.registration
    maps = [registration.label_maps(image, pairs.num_labels) for image in pairs.labels.unbind(1)]
    expected = registration.register_multilevel(
        *maps, numbers.baseline, smoothness=numbers.smoothness, squarings=numbers.squarings
    )
    torch.testing.assert_close(pipeline.register_pairs(run, pairs).displacement, expected.displacement)


def test_the_denoiser_fits_the_tokens(run, stages):
    _, tokens, denoiser, *_ = stages
    sequences = tokens.flatten(1).long().to(training.best_device())
    bits = absorbing.bits_per_token(
        denoiser.model, sequences, denoiser.model.mask_token, run.generator("test", sequences.device)
    )
    assert bits.shape == (len(tokens),) and torch.isfinite(bits).all()


def test_volumes_take_the_same_path(tmp_path):
    """Lungs in 3D: every stage, the network and the baseline, without another line of code."""
    run = small_run_3d(tmp_path)
    _, tokens, _, new_tokens, synthetic, network = all_stages(run)
    assert tokens.shape[1:] == new_tokens.shape[1:] == (16, 13, 16), "a quarter"
    assert (
        synthetic.labels.shape == (4, 2, 64, 52, 64) and synthetic.spacing == run.train.spacing == (4.0,) * 3
    )
    unseen = run.test[:1]
    for found in (pipeline.register_pairs(run, unseen, network), pipeline.register_pairs(run, unseen)):
        assert found.displacement.shape == found.inverse.shape == (1, 3, 64, 52, 64)
    before, after = results.score(unseen), results.score(unseen, found)
    assert after["tre_mm"] < before["tre_mm"] and after["dice"] > before["dice"], "the baseline already helps"


def test_completed_pairs_keep_what_was_known(tmp_path):
    run = small_run(tmp_path)
    run = replace(run, profile=replace(run.profile, synthesis=replace(run.profile.synthesis, keep=0.75)))
    autoencoder, tokens, denoiser, new_tokens, *_ = all_stages(run)
    known = tokens[:5]
    completed = pipeline.synthesise(run, autoencoder, denoiser, known)
    assert completed.shape == new_tokens.shape and not torch.equal(completed, new_tokens)
    source, start = pipeline.completed_from(run, known)
    kept = start != run.profile.vqae.codes
    assert 0.65 < float(kept.float().mean()) < 0.85 and len(source.unique()) > 1
    for rows in (completed, known[source]):
        assert torch.equal(rows.flatten(1).long()[kept], start[kept])
    with pytest.raises(CheckpointError, match="synthesis-completed.*known"):
        pipeline.synthesise(run, autoencoder, denoiser, tokens[1:2])
    with pytest.raises(ValueError, match="set synthesis.keep"):
        pipeline.synthesise(small_run(tmp_path), autoencoder, denoiser, known)


@pytest.mark.parametrize("small", [small_run, small_run_3d])
def test_an_autoencoder_in_bfloat16_learns_as_one_in_32_bit(tmp_path, small, monkeypatch):
    monkeypatch.setattr(runs, "fast_in_bfloat16", lambda device: True)
    run = small(tmp_path / "plain")
    low = replace(run, folder=tmp_path / "low", profile=replace(run.profile, mixed_precision=("vqae",)))
    losses, also = ([entry["loss"] for entry in pipeline.train_vqae(each).history] for each in (run, low))
    assert also == pytest.approx(losses, rel=2e-2) and also != losses


@pytest.mark.parametrize("change", ["mixed_precision", "compiled"])
def test_the_fast_denoiser_agrees_with_the_plain_one(tmp_path, change, monkeypatch):
    """bfloat16 has three digits; a compiled network adds up in another order."""
    monkeypatch.setattr(runs, "fast_in_bfloat16", lambda device: True)
    if change == "compiled" and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    losses, made = {}, {}
    for name, changes in (
        ("plain", {"mixed_precision": ()}),
        (change, {"mixed_precision": (), change: ("denoiser", "synthesis")}),
    ):
        run = small_run(tmp_path / name, **changes)
        autoencoder = pipeline.train_vqae(run)
        denoiser = pipeline.train_denoiser(run, pipeline.encode_training_pairs(run, autoencoder))
        losses[name] = [entry["loss"] for entry in denoiser.history]
        made[name] = pipeline.synthesise(run, autoencoder, denoiser)
    assert losses[change] == pytest.approx(losses["plain"], rel=2e-2 if change == "mixed_precision" else 1e-4)
    assert change == "compiled" or losses[change] != losses["plain"]
    assert (made[change] == made["plain"]).double().mean() > 0.9, (
        "a token at the edge may fall to the other side"
    )
