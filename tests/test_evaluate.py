"""Measuring: complete, consistent with the parts it is made of, and made again when anything has changed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from pairdiff_core import metrics, pipeline, vqae
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import Level
from pairdiff_core.registration import Deformation, register
from pairdiff_core.storage import write_json


def rows(measured):
    return {row["method"]: row for row in measured["registration"]}


def still(pairs):
    """No displacement at all."""
    return Deformation(*torch.zeros(2, len(pairs), pairs.spatial_dims, *pairs.spatial))


# ------------------------------------------------------------------------------------------------- case by case


def test_scores_before_registration_and_of_a_perfect_one(trained):
    pairs = trained[0].validation[:2]
    before = pipeline.score(pairs)
    assert 0 < before["dice"] < 1 and "folding_percent" not in before and "seconds_per_pair" not in before
    after = pipeline.score(pairs, replace(still(pairs), displacement=pairs.displacement))
    assert after["dice"] > before["dice"] and after["hd95_mm"] < before["hd95_mm"]
    assert after["tre_mm"] < 0.5 < before["tre_mm"], "the known displacement leads every landmark home"
    same = replace(pairs, labels=pairs.labels[:, :1].repeat(1, 2, 1, 1))
    assert pipeline.score(same)["dice"] == 1.0 and pipeline.score(same)["hd95_mm"] == 0.0


def test_a_row_is_what_its_cases_come_to(trained):
    pairs = trained[0].validation[:3]
    cases = list(pipeline.evaluate(pairs, lambda some: still(some)))
    row = pipeline.summarise(cases, pairs.label_names)
    assert [case["name"] for case in row["cases"]] == list(pairs.names)
    for name in ("dice", "hd95_mm", "tre_mm", "log_jacobian_sd"):
        assert row[name] == pytest.approx(sum(case[name] for case in cases) / 3)
    assert row["seconds_per_pair"] == pytest.approx(sum(case["seconds"] for case in cases) / 3)
    assert list(row["dice_per_structure"]) == list(pairs.label_names[1:])
    structures = [case["dice_per_structure"][0] for case in cases]
    assert row["dice_per_structure"][pairs.label_names[1]] == pytest.approx(sum(structures) / 3)
    errors = torch.tensor([error for case in cases for error in case["errors_mm"]])
    assert row["tre_all"]["landmarks"] == len(errors) == sum(map(len, pairs.landmarks))
    assert row["tre_all"]["mean"] == pytest.approx(errors.mean().item())
    assert row["tre_percentiles"][50] == pytest.approx(errors.median().item(), abs=0.1)
    assert row["tre_percentiles"][100] == pytest.approx(errors.max().item())
    assert all(case["folding_percent"] == 0 == case["inverse_consistency_error"] for case in row["cases"])
    scored = pipeline.score(pairs, still(pairs))
    assert all(row[name] == scored[name] for name in ("dice", "tre_mm", "tre_all", "dice_per_structure"))


def test_cases_come_as_they_are_done(trained, monkeypatch):
    pairs, registered = trained[0].validation[:3], []
    monkeypatch.setitem(pipeline.evaluate.__globals__, "AT_ONCE", pairs.labels[0, 0].numel())  # one pair

    def method(some):
        registered.append(some.names)
        return still(some)

    cases = pipeline.evaluate(pairs, method)
    assert next(cases)["name"] == pairs.names[0]
    assert registered == [pairs.names[:1]]


def one_square(*sides):
    """Pairs in which label 1 fills a square in both images, and label 2 another one in none of them but the given."""
    labels = torch.zeros(len(sides), 2, 16, 16, dtype=torch.uint8)
    labels[:, :, 2:6, 2:6] = 1
    for index, images in enumerate(sides):
        labels[index, list(images), 10:14, 10:14] = 2
    names = tuple(f"a{index}~b{index}" for index in range(len(sides)))
    return PairSet(labels, ("background", "one", "two"), (1.0, 1.0), names)


def test_a_structure_that_is_missing_counts_for_nothing(tmp_path):
    """Empty on both sides it has no Dice; empty on one side, Dice 0 but no surface distance."""
    pairs = one_square((0, 1), (), (0,))
    row = pipeline.score(pairs)
    assert [case["dice"] for case in row["cases"]] == [1.0, 1.0, 0.5]
    assert [case["hd95_mm"] for case in row["cases"]] == [0.0, 0.0, 0.0]
    assert row["dice_per_structure"] == {"one": 1.0, "two": 0.5}
    assert "tre_mm" not in row
    nothing = replace(pairs[:1], labels=torch.zeros(1, 2, 16, 16, dtype=torch.uint8))
    row = pipeline.score(nothing, still(nothing))
    assert row["dice"] is None is row["hd95_mm"] and row["dice_per_structure"] == {"one": None, "two": None}
    write_json(tmp_path / "row.json", row)
    write_json(tmp_path / "nan.json", {"dice": metrics.dice(nothing.fixed, nothing.moving, 3).tolist()})
    for path in tmp_path.glob("*.json"):
        assert "NaN" not in path.read_text() and "null" in path.read_text()


# --------------------------------------------------------------------------------------------------- the whole run


def test_the_summary_comes_from_the_tables(measured):
    summary, row = measured["summary"], rows(measured)
    gain = [row[name]["dice"] - row["before"]["dice"] for name in ("synthetic", "real")]
    assert summary["gain_synthetic_over_real"] == pytest.approx(gain[0] / gain[1])
    assert summary["vqae_dice"] == measured["vqae"]["validation"]["dice"]
    assert summary["bits_per_token"] == measured["denoiser"]["validation"]["bits_per_token"]
    assert summary["dice_network_synthetic"] == row["synthetic"]["dice"]
    assert summary["tre_before"] == row["before"]["tre_mm"]
    assert summary["hd95_network_random_warps"] == row["real, warped"]["hd95_mm"]
    assert summary["seconds_network_synthetic_instance"] == row["synthetic + instance"]["seconds_per_pair"]
    assert summary["inverse_consistency_error"] == row["synthetic"]["inverse_consistency_error"]


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
    """Training images themselves, after the autoencoder, are all among their neighbours."""
    run, made = trained
    names = {image for name in run.validation.names for image in name.split("~")}
    quality = measured["synthetic"]["quality"]
    assert quality["images"] == len(names) < 2 * len(run.validation)
    assert set(quality["synthetic"]) == set(quality["validation"])
    seen = vqae.decode_labels(made.autoencoder.model, vqae.encode_pairs(made.autoencoder.model, run.train.labels))
    copies = pipeline.describe_synthetic(run, made.autoencoder, replace(run.train, labels=seen))["quality"]
    assert copies["synthetic"]["precision"] == 1.0 >= quality["synthetic"]["precision"]


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
    expected = pipeline.score(run.validation, register(run.validation, profile))
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
