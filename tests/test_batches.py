"""Batches: a function of seed and step, every item once a round, shared by processes without overlap."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from pairdiff_core import batches, processes
from pairdiff_core.batches import Pieces, Samples, WarpedPairs
from pairdiff_core.pairs import DataError
from pairdiff_core.profiles import Augmentation, Patches

STILL = Augmentation(affine=0.0, common=0.0, own=0.0, smoothness=8.0)
MOVING = Augmentation(affine=0.05, common=1.0, own=0.5, smoothness=8.0)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def some_pairs(number, *spatial):
    return torch.randint(0, 4, (number, 2, *spatial), generator=seeded(0)[0], dtype=torch.uint8)


@pytest.fixture
def as_processes(monkeypatch):
    """Call a function as each of several processes would."""

    def call(count, function):
        monkeypatch.setattr(processes, "count", lambda: count)
        results = []
        for rank in range(count):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            results.append(function())
        return results

    return call


def test_every_item_comes_once_a_round_in_a_new_order():
    samples = Samples(10, 4, seed=0)
    flat = torch.cat([samples.chosen(step) for step in range(5)])
    assert sorted(flat[:10].tolist()) == list(range(10)) == sorted(flat[10:].tolist())
    assert flat[:10].tolist() != flat[10:].tolist()
    assert not torch.equal(flat, torch.cat([Samples(10, 4, seed=1).chosen(step) for step in range(5)]))


def test_a_batch_may_be_larger_than_the_set():
    assert torch.bincount(Samples(3, 7, seed=0).chosen(0)).min() >= 2


def test_processes_share_the_samples_of_one_without_overlap(as_processes):
    """Two processes with batches of 3 take, together, what one with batches of 6 takes."""

    def made(batch, step):
        return WarpedPairs(some_pairs(10, 16, 20), Samples(10, batch, seed=0), MOVING)(step)

    for step in (0, 1, 5):
        (alone,) = as_processes(1, partial(made, 6, step))
        assert torch.equal(torch.cat(as_processes(2, partial(made, 3, step))), alone)


def test_more_processes_than_items_are_refused(as_processes):
    with pytest.raises(DataError, match="4 processes cannot share 3 training items: start at most 3"):
        as_processes(4, lambda: Samples(3, 1, seed=0))


def test_a_batch_depends_on_seed_and_step_alone():
    def source(seed=0):
        volumes = WarpedPairs(some_pairs(5, 16, 20), Samples(5, 2, seed), MOVING)
        return Pieces(volumes, Patches((8, 8), cuts=3))

    in_order = [batch.clone() for batch in map(source(), range(7))]
    for step in (6, 4, 0):
        assert torch.equal(source()(step), in_order[step])
    assert not torch.equal(source(1)(6), in_order[6])


def test_pairs_may_stay_as_they_are():
    labels, samples = some_pairs(3, 16, 20), Samples(3, 2, seed=0)
    assert torch.equal(WarpedPairs(labels, samples, None)(0), labels[samples.chosen(0)])


@pytest.mark.parametrize("spatial", [(32, 40), (16, 16, 20)])
def test_augmentation_is_seeded_and_moves_labels_only(spatial):
    labels = torch.zeros(2, 2, *spatial, dtype=torch.uint8)
    labels[(..., *[slice(5, 11)] * len(spatial))] = 3
    numbers = Augmentation(affine=0.05, common=1.0, own=0.5, smoothness=8)
    one, again = (batches.augment(labels, numbers, seeded(1, 2)) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, batches.augment(labels, numbers, seeded(3, 4)))
    assert one.shape == labels.shape and one.dtype == torch.uint8 and set(one.unique().tolist()) == {0, 3}
    assert not torch.equal(one[0], one[1]), "each pair has its own warp"


def test_without_amplitude_nothing_moves():
    labels = torch.randint(0, 4, (2, 2, 16, 20), dtype=torch.uint8)
    assert torch.equal(batches.augment(labels, STILL, seeded(0, 1)), labels)


def test_a_common_warp_keeps_equal_images_equal_and_an_own_warp_does_not():
    image = torch.randint(0, 4, (1, 1, 32, 32), dtype=torch.uint8).repeat(1, 2, 1, 1)
    common = batches.augment(image, replace(STILL, common=2.0, affine=0.1), seeded(0))
    assert torch.equal(common[:, 0], common[:, 1]) and not torch.equal(common, image)
    own = batches.augment(image, replace(STILL, own=2.0), seeded(0))
    assert not torch.equal(own[:, 0], own[:, 1])


def test_flows_on_a_coarser_grid_are_as_large_and_as_smooth():
    """In voxels of the images, not of the grid that they were put together on."""

    def flow(coarser):
        numbers = Augmentation(affine=0.0, common=2.0, own=0.0, smoothness=24, coarser=coarser)
        return torch.cat([batches._random_warps((64, 96), numbers, each) for each in seeded(*range(20))])

    fine, coarse = flow(None), flow(4)
    assert coarse.shape == fine.shape
    assert float(coarse.std() / fine.std()) == pytest.approx(1, abs=0.1)
    assert float(coarse.diff(dim=3).std() / fine.diff(dim=3).std()) == pytest.approx(1, abs=0.15)


def test_affine_jitter_on_a_coarser_grid_is_the_same_inside():
    """Linear interpolation keeps an affine map as it is, up to half a coarse voxel from the border."""
    fine, coarse = (
        batches._random_warps((32, 48), replace(STILL, affine=0.05, coarser=factor), *seeded(3))
        for factor in (None, 4)
    )
    torch.testing.assert_close(coarse[..., 2:-2, 2:-2], fine[..., 2:-2, 2:-2], atol=1e-3, rtol=0)


@pytest.mark.parametrize("spatial, size", [((9, 8), (4, 8)), ((6, 5, 7), (6, 2, 3))])
def test_pieces_are_of_their_pair_and_from_all_over_it(spatial, size):
    whole = torch.arange(2 * 2 * math.prod(spatial)).reshape(2, 2, *spatial)
    source = Pieces(WarpedPairs(whole, Samples(2, 2, seed=0), None), Patches(size, cuts=4))
    pieces = [source(step) for step in range(200)]
    assert all(piece.shape == (2, 2, *size) for piece in pieces)
    steps = [math.prod(spatial[axis + 1 :]) for axis in range(len(spatial))]
    for axis, step in enumerate(steps):  # neighbours in the piece are neighbours in the whole
        assert torch.equal(pieces[0].diff(dim=axis + 2), torch.full_like(pieces[0].diff(dim=axis + 2), step))
    corner = pieces[0].flatten(2)[:, :, 0]
    assert torch.equal(corner[:, 1] - corner[:, 0], torch.full((2,), math.prod(spatial)))
    assert torch.cat([piece.flatten() for piece in pieces]).unique().numel() == whole.numel()


def test_a_volume_is_cut_several_times_before_the_next_is_warped():
    made = []

    def volumes(step):
        made.append(step)
        return some_pairs(2, 8, 8)

    volumes.samples = Samples(2, 2, seed=0)
    source = Pieces(volumes, Patches((4, 4), cuts=3))
    for step in range(7):
        source(step)
    assert made == [0, 1, 2]
