"""Measuring: complete, consistent with its parts, and repeated when anything has changed."""

import json
import shutil
from dataclasses import replace

import pytest

from pairdiff_core import pipeline, registration, vqae
from pairdiff_core.augmentation import augment
from pairdiff_core.pipeline.measure import errors_on_phantoms
from pairdiff_core.profiles import Level
from pairdiff_core.registration import register
from pairdiff_core.storage import write_json


def rows(measured):
    return {row["method"]: row for row in measured["registration"]}


def test_the_summary_comes_from_the_tables(measured):
    summary, row = measured["summary"], rows(measured)
    gain = [row[name]["dice"] - row["before"]["dice"] for name in ("synthetic", "real")]
    assert summary["gain_synthetic_over_real"] == pytest.approx(gain[0] / gain[1])
    lower = [row["before"]["tre_mm"] - row[name]["tre_mm"] for name in ("synthetic", "real")]
    assert summary["gain_synthetic_over_real_tre"] == pytest.approx(lower[0] / lower[1])
    assert summary["vqae_dice"] == measured["vqae"]["validation"]["dice"]
    assert summary["bits_per_token"] == measured["denoiser"]["validation"]["bits_per_token"]
    assert summary["dice_network_synthetic"] == row["synthetic"]["dice"]
    found = measured["synthetic"]
    lengths = found["displacements"]
    assert summary["motion_ratio"] == pytest.approx(lengths["synthetic"]["mean"] / lengths["real"]["mean"])
    assert summary["audit_closer_percent"] == 100 * found["memorisation"]["registered images"]["closer"]
    assert summary["both_lungs_share"] == found["sixths"]["synthetic"] != found["sixths"]["validation"]
    assert summary["tre_before"] == row["before"]["tre_mm"]
    assert summary["hd95_network_random_warps"] == row["real, warped"]["hd95_mm"]
    assert summary["seconds_network_synthetic_instance"] == row["synthetic + instance"]["seconds_per_pair"]
    assert summary["inverse_consistency_error"] == row["synthetic"]["inverse_consistency_error"]
    assert summary["network_used_as_start"] == row["synthetic + instance"]["used_as_start"] <= 6


def test_networks_of_brains_are_measured_at_landmarks_of_phantoms(trained, measured):
    errors = errors_on_phantoms(trained[0], trained[1].networks)
    networks = ["real", "real, warped", "synthetic", "synthetic, warped"]
    assert errors == {name: pytest.approx(rows(measured)[name]["tre_mm"]) for name in ["before", *networks]}


def test_every_network_stands_without_and_with_instance_optimisation(measured):
    networks = [f"{name}{warped}" for name in ("real", "synthetic") for warped in ("", ", warped")]
    expected = ["before", "baseline", "baseline, full size"]
    assert list(rows(measured)) == expected + [f"{name}{how}" for name in networks for how in ("", " + instance")]
    assert rows(measured)["real"]["dice"] != rows(measured)["real + instance"]["dice"]


def test_the_full_size_level_works_on_the_images_own_grid(measured):
    row = rows(measured)
    assert row["baseline, full size"]["dice"] > row["baseline"]["dice"] > row["before"]["dice"]


def test_the_provenance_says_what_is_needed_to_repeat(measured):
    made_by, stages = measured["provenance"], measured["stages"]
    for key in ("commit", "profile", "seed", "versions", "device", "dataset", "wall_seconds"):
        assert key in made_by
    assert set(made_by["data"]) == {"train", "validation"}
    assert made_by["pairs"] == {"train": 12, "validation": 6}
    networks = {f"registration-{name}{warped}" for name in ("real", "synthetic") for warped in ("", "-warped")}
    assert set(stages) == {"vqae", "tokens", "denoiser", "synthesis"} | networks
    assert made_by["wall_seconds"] > sum(stage["seconds"] for stage in stages.values())
    assert all(stage["threads"] >= 1 and stage["commit"] for stage in stages.values())


def test_quality_compares_different_images_and_equal_numbers(trained, measured):
    """Decoded training images are all among the neighbours of the training images."""
    run, made = trained
    names = {image for name in run.validation.names for image in name.split("~")}
    quality = measured["synthetic"]["quality"]
    assert quality["images"] == len(names) < 2 * len(run.validation)
    assert set(quality["synthetic"]) == set(quality["validation"])
    seen = vqae.decode_labels(made.autoencoder.model, vqae.encode_pairs(made.autoencoder.model, run.train.labels))
    copies = pipeline.describe_synthetic(run, made.autoencoder, replace(run.train, labels=seen))["quality"]
    assert copies["synthetic"]["precision"] == 1.0 >= quality["synthetic"]["precision"]


def test_a_moved_training_image_is_a_copy(trained):
    """After registration it is nearer to its source than unseen images are to any."""
    run, made = trained
    generators = [run.generator(f"moved {number}") for number in range(len(run.train))]
    moved = augment(run.train.labels, replace(run.profile.vqae.augmentation, affine=0.02), generators)
    copies = replace(run.train, labels=vqae.decode_labels(made.autoencoder.model, made.tokens[: len(run.train)]))
    for pairs, least in ((copies, 0.9), (replace(run.train, labels=moved), 0.0)):
        audit = pipeline.audit_after_registration(run, made.autoencoder, pairs)
        assert audit["closer"] >= least and len(audit["distances"]) == len(audit["nearest"]), audit


def test_what_was_measured_can_be_written_and_is_kept(trained, measured, tmp_path):
    run, made = trained
    write_json(tmp_path / "results.json", measured)
    written = json.loads((tmp_path / "results.json").read_text())
    again = pipeline.measure(run, made)
    assert rows(again) == rows(written), "measured once: even the seconds are the same"
    fresh = pipeline.describe_vqae(run, made.autoencoder, run.validation)
    assert fresh["dice_per_structure"] == pytest.approx(again["vqae"]["validation"]["dice_per_structure"], rel=1e-5)


@pytest.fixture
def copied(trained, measured, tmp_path):
    """The trained run and its measurements in another folder, with two validation pairs."""
    shutil.copytree(trained[0].path, tmp_path / "copy")
    run = replace(trained[0], folder=tmp_path / "copy")
    run.__dict__.update(train=trained[0].train, validation=trained[0].validation[:2])
    pipeline.measure(run, trained[1])
    return run


def test_changed_levels_are_measured_again(trained, copied):
    levels = (Level(scale=4, control=1, steps=3, learning_rate=0.3),)
    profile = replace(copied.profile, registration=replace(copied.profile.registration, baseline=levels))
    run = replace(copied, profile=profile)
    run.__dict__.update(train=copied.train, validation=copied.validation)
    found = pipeline.measure(run)
    expected = registration.score(run.validation, register(run.validation, profile))
    assert rows(found)["baseline"]["dice"] == pytest.approx(expected["dice"], rel=1e-5)
    assert rows(found)["baseline"]["dice"] != rows(pipeline.measure(copied, trained[1]))["baseline"]["dice"]


def test_changed_training_pairs_are_measured_again(trained, copied):
    before = pipeline.measure(copied, trained[1])
    copied.__dict__["train"] = copied.train[:7]
    found = pipeline.measure(copied, trained[1])
    expected = pipeline.describe_vqae(copied, trained[1].autoencoder, copied.train)
    assert found["vqae"]["train"]["dice"] == pytest.approx(expected["dice"], rel=1e-5)
    assert found["vqae"]["train"]["dice"] != before["vqae"]["train"]["dice"]
    assert found["synthetic"]["areas"] != before["synthetic"]["areas"]


def test_changed_synthetic_pairs_are_measured_again(trained, copied):
    made = trained[1]
    tokens = made.tokens[:8].flip(1)
    made = made._replace(synthetic=pipeline.decode_pairs(copied, made.autoencoder, tokens))
    before, found = pipeline.measure(copied, trained[1]), pipeline.measure(copied, made)
    expected = pipeline.describe_synthetic(copied, made.autoencoder, made.synthetic)
    for name, value in expected["displacements"].items():
        assert found["synthetic"]["displacements"][name] == pytest.approx(value, rel=1e-4)
    assert found["synthetic"]["displacements"] != before["synthetic"]["displacements"]
