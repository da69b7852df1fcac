"""Phantom lungs: how similar they are to real ones, and that displacement and landmarks are true."""

from __future__ import annotations

import pytest
import torch

from pairdiff_core import fields, metrics
from pairdiff_core.data.lung_frame import FRAME
from pairdiff_core.data.phantom_lungs import lung_pairs
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet

HALF, QUARTER = (128, 104, 128), (64, 52, 64)


@pytest.fixture(scope="module")
def full() -> PairSet:
    return lung_pairs(1, seed=3)


@pytest.fixture(scope="module")
def pairs() -> PairSet:
    return lung_pairs(8, spatial=QUARTER, seed=3)


def vessel_share(pairs: PairSet) -> torch.Tensor:
    return (pairs.labels > 0).flatten(2).float().mean(2)


def test_as_much_vessel_as_in_real_lungs(full: PairSet, pairs: PairSet) -> None:
    """In real lungs, 1.4 to 3.2 % of the voxels are vessel; 4 to 13 % at a quarter of the resolution."""
    assert full.labels.unique().tolist() == [0, 1] and full.spatial == FRAME
    assert (vessel_share(full) > 0.015).all() and (vessel_share(full) < 0.03).all()
    assert (vessel_share(pairs) > 0.05).all() and (vessel_share(pairs) < 0.09).all()


def test_two_lungs_with_nothing_between_and_little_cut_off(pairs: PairSet) -> None:
    for image in pairs.labels.flatten(0, 1):
        across = image.flatten(1).sum(1).float()
        assert across[32] == 0  # the midline
        right, left = across[:32].sum(), across[32:].sum()
        assert 0.7 < right / left < 1.5
        border = torch.cat([image.movedim(axis, 0)[[0, -1]].flatten() for axis in range(3)])
        assert border.float().mean() < 0.01  # the frame crops large real lungs, too


def test_vessels_taper(full: PairSet) -> None:
    """Few voxels are deep inside a vessel, that is, surrounded by vessel at half size."""
    vessel = full.pooled(2).fixed.float()
    thick = 1 - torch.nn.functional.max_pool3d(1 - vessel, 3, stride=1, padding=1)
    assert 0 < thick.sum() < 0.2 * vessel.sum()


def test_every_grid_shows_the_same_lungs(full: PairSet, pairs: PairSet) -> None:
    for spatial, factor in ((HALF, 2), (QUARTER, 4)):
        drawn, pooled = lung_pairs(1, spatial=spatial, seed=3), full.pooled(factor)
        assert torch.equal(drawn.labels, pooled.labels)
        assert drawn.spacing == pooled.spacing and drawn.names == pooled.names
        torch.testing.assert_close(drawn.landmarks, pooled.landmarks)
        assert (drawn.displacement - pooled.displacement).abs().max() < 0.1
    assert torch.equal(drawn.labels, pairs.labels[:1])


def test_the_displacement_is_that_of_a_breath(full: PairSet, pairs: PairSet) -> None:
    """At most 25 voxels; over the vessels 5 to 9 on average (correspondences of real training pairs: 6 to 8)."""
    assert 17 < full.displacement.norm(dim=1).max() <= 25
    length = 4 * pairs.displacement.norm(dim=1)  # voxels of the frame
    assert length.amax((1, 2, 3)).max() <= 25
    means = torch.stack([field[image > 0].mean() for field, image in zip(length, pairs.fixed, strict=True)])
    assert (means > 4.5).all() and (means < 9).all() and 6 < means.mean() < 8
    assert (pairs.displacement[:, 2, :, :, 5] > 1).all()  # the base rises
    assert fields.jacobian_determinant(pairs.displacement).mean() < 0.95  # the lung gets smaller


def test_the_displacement_is_smooth_and_does_not_fold(full: PairSet, pairs: PairSet) -> None:
    half = full.displacement[:, :, 1::2, 1::2, 1::2] / 2
    for displacement in (half, pairs.displacement):
        assert metrics.folding_percent(displacement).max() == 0
        assert fields.jacobian_determinant(displacement).min() > 0.4
    assert max(full.displacement.diff(dim=axis).abs().max() for axis in (2, 3, 4)) < 0.5


def test_warping_moving_gives_fixed(full: PairSet, pairs: PairSet) -> None:
    for some, lowest in ((full, 0.87), (pairs, 0.78)):
        warped = fields.warp_labels(some.moving, some.displacement)
        assert metrics.mean_dice(warped, some.fixed, 2).min() > lowest
        assert metrics.mean_dice(some.moving, some.fixed, 2).max() < 0.65


@pytest.mark.parametrize("at", ["full", "pairs"])
def test_landmarks_agree_with_the_displacement(at: str, request: pytest.FixtureRequest) -> None:
    some: PairSet = request.getfixturevalue(at)
    for displacement, points, images in zip(some.displacement, some.landmarks, some.labels, strict=True):
        assert 30 <= len(points) <= 200
        predicted = points[:, 0] + fields.sample_at(displacement, points[:, 0])
        assert (predicted - points[:, 1]).norm(dim=1).max() < 0.1
        for image, place in zip(images, points.unbind(1), strict=True):
            assert (image[tuple(place.round().long().T)] == 1).all()  # branch points lie in vessels
        before = metrics.target_registration_error(torch.zeros_like(displacement), points, some.spacing)
        assert 3 < before.mean() < 10  # mm


def test_a_subject_depends_on_its_seed_and_number_only(pairs: PairSet) -> None:
    again = lung_pairs(2, spatial=QUARTER, seed=3, first_subject=5)
    assert again.names == pairs.names[5:7] == ("LUNGS_0005_1~LUNGS_0005_2", "LUNGS_0006_1~LUNGS_0006_2")
    assert torch.equal(again.labels, pairs.labels[5:7])
    assert torch.equal(again.displacement, pairs.displacement[5:7])
    assert not torch.equal(lung_pairs(1, spatial=QUARTER, seed=4).labels, pairs.labels[:1])


def test_subjects_differ_more_than_the_two_images_of_one(pairs: PairSet) -> None:
    within = metrics.mean_dice(pairs.moving, pairs.fixed, 2)
    between = metrics.mean_dice(pairs.fixed.roll(1, 0), pairs.fixed, 2)
    assert between.max() < within.min()
    fields_differ = (pairs.displacement[1:] - pairs.displacement[:-1]).norm(dim=1).flatten(1).mean(1)
    assert (4 * fields_differ > 1).all()  # voxels of the frame


def test_other_grids_are_refused() -> None:
    with pytest.raises(DataError, match=r"not on \(80, 96\)"):
        lung_pairs(1, spatial=(80, 96))
