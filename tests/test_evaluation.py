"""The test pairs measured one by one: the same numbers as the stages and the results have."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from small_run import small_run, small_run_3d

from pairdiff_core import evaluation, pipeline, results
from pairdiff_core.pairs import DataError
from pairdiff_core.volume_registration import load_trained


@pytest.fixture(scope="module")
def lungs(tmp_path_factory):
    run = small_run_3d(tmp_path_factory.mktemp("run"))
    run = replace(run, profile=replace(run.profile, max_pairs=2))
    return run, pipeline.train_registration(run, run.train, "synthetic")


@pytest.mark.parametrize("method", evaluation.METHODS)
def test_numbers_are_those_of_the_results(lungs, method):
    run, stage = lungs
    trained = None
    if method != "baseline":  # the folder tells the profile's name only
        trained = replace(load_trained(run.path), profile=run.profile)
    cases = list(evaluation.evaluate(run, method, trained))
    found = pipeline.register_pairs(
        run, run.test, None if method == "baseline" else stage, instance=method == "network+instance"
    )
    expected, before, summary = (
        results.score(run.test, found),
        results.score(run.test),
        evaluation.summarise(cases),
    )
    assert [case["name"] for case in cases] == list(run.test.names)
    assert summary["tre_mean"] == pytest.approx(expected["tre_mm"], abs=1e-3)
    assert summary["tre_before"] == pytest.approx(before["tre_mm"])
    assert summary["tre_mean"] != pytest.approx(summary["tre_before"], abs=1e-3)
    for key in ("p25", "p50", "p75", "p95", "worst30"):
        assert summary[f"tre_{key}"] == pytest.approx(expected["tre_all"][key], abs=1e-3)
    assert summary["dice_mean"] == pytest.approx(expected["dice"], abs=1e-3)
    assert summary["dice_before"] == pytest.approx(before["dice"])
    assert summary["folding_percent"] == pytest.approx(expected["folding_percent"], abs=1e-3)
    assert summary["inverse_error_voxel"] == pytest.approx(expected["inverse_error_px"], abs=1e-3)
    assert summary["seconds_per_pair"] == pytest.approx(sum(case["seconds"] for case in cases) / len(cases))


def test_pairs_without_landmarks_have_dice_only(tmp_path):
    run = small_run(tmp_path)
    run = replace(run, profile=replace(run.profile, max_pairs=2))
    run.__dict__["test"] = replace(run.test, landmarks=None)
    summary = evaluation.summarise(list(evaluation.evaluate(run, "baseline")))
    assert set(summary) == {
        "dice_mean", "dice_before", "folding_percent", "inverse_error_voxel", "seconds_per_pair"
    }  # fmt: skip


def test_a_pair_of_nothing_is_no_number_in_json(tmp_path):
    run = small_run(tmp_path)
    run = replace(run, profile=replace(run.profile, max_pairs=1))
    run.__dict__["test"] = replace(run.test, labels=torch.zeros_like(run.test.labels), landmarks=None)
    cases = list(evaluation.evaluate(run, "baseline"))
    assert cases[0]["dice"] is None and evaluation.summarise(cases)["dice_mean"] is None
    json.dumps(cases, allow_nan=False)


def test_cases_come_as_they_are_done(lungs, monkeypatch):
    run, _ = lungs
    done = []
    original = evaluation.register_without_training
    monkeypatch.setattr(evaluation, "register_without_training", lambda *a: done.append(a) or original(*a))
    next(evaluation.evaluate(run, "baseline"))
    assert len(done) == 1 < len(run.test)


def test_where_it_comes_from(lungs):
    run, stage = lungs
    told = evaluation.describe(run, "network", load_trained(run.path))
    assert told["network"] == stage.fingerprint and told["run"] == str(run.path)
    assert (told["dataset"], told["profile"], told["split"]) == ("phantom3d", "quick", "test")
    assert "network" not in evaluation.describe(run, "baseline", None)


def test_a_network_of_other_images_is_refused(lungs, tmp_path):
    trained = load_trained(lungs[0].path)
    with pytest.raises(DataError, match="knows images with 3 axes, phantom2d at the profile quick has 2"):
        evaluation.check_network(small_run(tmp_path), trained)
    evaluation.check_network(lungs[0], trained)
