"""Scores of registration: of each case, and summarised."""

from dataclasses import replace

import pytest
import torch

from pairdiff_core import metrics, registration
from pairdiff_core.pairs import PairSet
from pairdiff_core.registration import Deformation
from pairdiff_core.storage import write_json


def still(pairs):
    """A deformation without displacement."""
    return Deformation(*torch.zeros(2, len(pairs), pairs.spatial_dims, *pairs.spatial))


def test_scores_before_registration_and_of_a_perfect_one(trained):
    pairs = trained[0].validation[:2]
    before = registration.score(pairs)
    assert 0 < before["dice"] < 1 and "folding_percent" not in before and "seconds_per_pair" not in before
    after = registration.score(pairs, replace(still(pairs), displacement=pairs.displacement))
    assert after["dice"] > before["dice"] and after["hd95_mm"] < before["hd95_mm"]
    assert after["tre_mm"] < 0.5 < before["tre_mm"], "the known displacement leads every landmark home"
    same = replace(pairs, labels=pairs.labels[:, :1].repeat(1, 2, 1, 1))
    assert registration.score(same)["dice"] == 1.0 and registration.score(same)["hd95_mm"] == 0.0


def test_a_row_is_what_its_cases_come_to(trained):
    pairs = trained[0].validation[:3]
    cases = list(registration.evaluate(pairs, lambda some: still(some)))
    row = registration.summarise(cases, pairs.label_names)
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
    scored = registration.score(pairs, still(pairs))
    assert all(row[name] == scored[name] for name in ("dice", "tre_mm", "tre_all", "dice_per_structure"))


def test_the_round_trip_is_scored_on_structures_too(trained):
    pair = trained[0].validation[:1]
    aside = still(pair)
    aside.inverse[:, 0] = (pair.fixed > 0).float()  # one voxel off on structures, none elsewhere
    row = registration.score(pair, aside)
    assert row["inverse_consistency_error_on_structures"] == pytest.approx(1.0)
    assert row["inverse_consistency_error"] == pytest.approx((pair.fixed > 0).float().mean().item())
    empty = replace(pair, labels=torch.zeros_like(pair.labels))
    assert registration.score(empty, aside)["inverse_consistency_error_on_structures"] is None


def test_cases_come_as_they_are_done(trained, monkeypatch):
    pairs, registered = trained[0].validation[:3], []
    monkeypatch.setitem(registration.evaluate.__globals__, "AT_ONCE", pairs.labels[0, 0].numel())  # one pair

    def method(some):
        registered.append(some.names)
        return still(some)

    cases = registration.evaluate(pairs, method)
    assert next(cases)["name"] == pairs.names[0]
    assert registered == [pairs.names[:1]]


def one_square(*sides):
    """Pairs in which label 1 fills a square in both images, and label 2 another one in the given images only."""
    labels = torch.zeros(len(sides), 2, 16, 16, dtype=torch.uint8)
    labels[:, :, 2:6, 2:6] = 1
    for index, images in enumerate(sides):
        labels[index, list(images), 10:14, 10:14] = 2
    names = tuple(f"a{index}~b{index}" for index in range(len(sides)))
    return PairSet(labels, ("background", "one", "two"), (1.0, 1.0), names)


def test_a_structure_that_is_missing_counts_for_nothing(tmp_path):
    """If it is missing in both images, it has no Dice; if in one, Dice is 0 and there is no surface distance."""
    pairs = one_square((0, 1), (), (0,))
    row = registration.score(pairs)
    assert [case["dice"] for case in row["cases"]] == [1.0, 1.0, 0.5]
    assert [case["hd95_mm"] for case in row["cases"]] == [0.0, 0.0, 0.0]
    assert row["dice_per_structure"] == {"one": 1.0, "two": 0.5}
    assert "tre_mm" not in row
    nothing = replace(pairs[:1], labels=torch.zeros(1, 2, 16, 16, dtype=torch.uint8))
    row = registration.score(nothing, still(nothing))
    assert row["dice"] is None is row["hd95_mm"] and row["dice_per_structure"] == {"one": None, "two": None}
    write_json(tmp_path / "row.json", row)
    write_json(tmp_path / "nan.json", {"dice": metrics.dice(nothing.fixed, nothing.moving, 3).tolist()})
    for path in tmp_path.glob("*.json"):
        assert "NaN" not in path.read_text() and "null" in path.read_text()
