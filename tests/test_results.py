"""Measured results: complete, consistent with the parts they are made of, and safe to write."""

import json

import pytest
import torch
from small_run import small_run

from pairdiff_core import pipeline, results
from pairdiff_core.registration import Deformation

SUMMARY = {
    *(
        "vqae_dice",
        "codes_used",
        "bits_per_token",
        "dice_before",
        "dice_baseline",
        "dice_real",
        "dice_synthetic",
    ),
    *("folding_percent", "inverse_error_px"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def measured(run):
    return results.measure(run)


def test_the_summary_has_every_number_and_they_come_from_the_tables(measured):
    summary = measured["summary"]
    assert set(summary) >= SUMMARY
    rows = {row["method"]: row for row in measured["registration"]}
    assert summary["dice_before"] == rows["before"]["dice"]
    assert summary["dice_synthetic"] == rows["synthetic"]["dice"]
    gain = (summary["dice_synthetic"] - summary["dice_before"]) / (
        summary["dice_real"] - summary["dice_before"]
    )
    assert summary["gain_synthetic_over_real"] == pytest.approx(gain)
    assert summary["vqae_dice"] == measured["vqae"]["test"]["dice"]
    assert summary["tre_before"] == rows["before"]["tre_mm"]
    assert summary["tre_network_augmented_instance"] == rows["real, warped + instance"]["tre_mm"]


def test_every_network_stands_without_and_with_instance_optimisation(measured):
    methods = [row["method"] for row in measured["registration"]]
    assert methods[:3] == ["before", "baseline", "baseline, full size"]
    for name in ("real", "synthetic"):
        assert f"{name}, warped" in methods and f"{name}, warped + instance" in methods
        assert name in methods and f"{name} + instance" in methods


def test_the_provenance_says_what_is_needed_to_repeat(measured):
    made_by = measured["provenance"]
    for key in ("commit", "profile", "seed", "versions", "device", "data", "dataset", "wall_seconds"):
        assert key in made_by
    assert set(made_by["data"]) == {"train pairs", "test pairs"}
    networks = {
        f"registration-{name}{warped}" for name in ("real", "synthetic") for warped in ("", "-warped")
    }
    stages = measured["stages"]
    assert set(stages) == {"vqae", "tokens", "denoiser", "synthesis"} | networks
    assert made_by["wall_seconds"] > sum(stage["seconds"] for stage in stages.values())
    assert all(stage["threads"] >= 1 and stage["commit"] for stage in stages.values())


def test_the_full_size_level_works_on_the_images_own_grid(run, measured):
    rows = {row["method"]: row for row in measured["registration"]}
    assert rows["baseline, full size"]["dice"] > rows["baseline"]["dice"] > rows["before"]["dice"]


def test_quality_is_measured_on_different_images_and_equal_numbers(run, measured):
    chosen = results._each_image_once(run.test)
    names = "~".join(run.test.names).split("~")
    assert sorted(names[index] for index in chosen) == sorted(set(names))
    images = run.test.labels.flatten(0, 1)[:, None]
    train = run.train.labels.flatten(0, 1)[:, None]
    same = results._quality(run, {"train": train, "test": images, "synthetic": images})
    assert same["images"] == len(chosen) == measured["synthetic"]["quality"]["images"]
    assert 0 < same["test"]["recall"] <= 1


def test_scores_before_registration_and_of_a_perfect_one(run):
    pairs = run.test[:2]
    before = results.score(pairs)
    assert 0 < before["dice"] < 1 and "folding_percent" not in before
    truth = Deformation(pairs.displacement, torch.zeros_like(pairs.displacement))
    after = results.score(pairs, truth)
    assert after["dice"] > before["dice"]
    assert after["tre_mm"] < 0.5 < before["tre_mm"], "the known displacement leads every landmark home"


def test_every_case_has_its_landmark_errors(run):
    pairs = run.test[:2]
    still = Deformation(*(torch.zeros_like(pairs.displacement) for _ in range(2)))
    found = results.score(pairs, still)
    assert [case["name"] for case in found["cases"]] == list(pairs.names)
    assert found["tre_mm"] == pytest.approx(sum(case["tre"]["mean"] for case in found["cases"]) / 2)
    assert found["tre_all"]["landmarks"] == sum(len(points) for points in pairs.landmarks)
    assert all(case["folding_percent"] == 0 == case["inverse_error_px"] for case in found["cases"])


def test_scores_of_identical_images(run):
    pairs = run.test[:1]
    same = type(pairs)(pairs.fixed[:, None].repeat(1, 2, 1, 1), pairs.label_names, pairs.spacing, pairs.names)
    assert results.score(same)["dice"] == 1.0


def test_label_maps_survive_packing(run):
    packed = results.pack_labels(run.test.labels[:2])
    assert torch.equal(results.unpack_labels(json.loads(json.dumps(packed))), run.test.labels[:2])


def test_the_file_is_whole_or_untouched(tmp_path, measured):
    file = tmp_path / "deep" / "results.json"
    results.write_results(file, measured)
    assert json.loads(file.read_text())["summary"]["dice_real"] == pytest.approx(
        measured["summary"]["dice_real"], rel=1e-5
    )
    before = file.read_bytes()
    with pytest.raises(TypeError):
        results.write_results(file, {"a tensor": torch.zeros(1)})
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == ["results.json"]


def test_what_pipeline_stages_made_is_what_was_measured(run, measured):
    """The second pass loads: the figures belong to the models in the run folder."""
    assert pipeline.train_vqae(run).loaded
    assert results.describe_vqae(run, pipeline.train_vqae(run), run.test) == measured["vqae"]["test"]
