"""Batches of freshly warped pairs and of patches: a function of seed and step."""

import math
from dataclasses import replace

import pytest
import torch
from largest import LargestTensor

from pairdiff_core.augmentation import PatchesOfPairs, WarpedPairs, augment
from pairdiff_core.profiles import Augmentation, Patches
from pairdiff_core.training import Samples

STILL = Augmentation(affine=0.0, common=0.0, own=0.0, smoothness=8.0)
MOVING = Augmentation(affine=0.05, common=1.0, own=0.5, smoothness=8.0)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def some_pairs(number, *spatial):
    return torch.randint(0, 4, (number, 2, *spatial), generator=seeded(0)[0], dtype=torch.uint8)


def ramps(*spatial):
    """Images (1, 2, *spatial) whose values count the voxels along the first axis; they show how far they are warped."""
    rows = torch.arange(spatial[0], dtype=torch.uint8).reshape(-1, *[1] * (len(spatial) - 1))
    return rows.expand(1, 2, *spatial).clone()


def motion(image, augmentation, seeds):
    """How far augmentation moves voxels along the first axis, (seeds, 2, *spatial), away from the border."""
    moved = torch.cat([augment(image, augmentation, seeded(seed)) for seed in range(seeds)]).float() - image.float()
    return moved[(..., *[slice(size // 4, -(size // 4)) for size in image.shape[2:]])]


def test_a_batch_depends_on_seed_and_step_alone():
    def patches(seed=0):
        volumes = WarpedPairs(some_pairs(5, 16, 20), Samples(5, 2, seed), MOVING)
        return PatchesOfPairs(volumes, Patches((8, 8), cuts=3))

    in_order = [batch.clone() for batch in map(patches(), range(7))]
    for step in (6, 4, 0):
        assert torch.equal(patches()(step), in_order[step])
    assert not torch.equal(patches(1)(6), in_order[6])


def test_pairs_may_stay_as_they_are():
    labels, samples = some_pairs(3, 16, 20), Samples(3, 2, seed=0)
    assert torch.equal(WarpedPairs(labels, samples, None)(0), labels[samples.chosen(0)])
    assert torch.equal(augment(labels, STILL, seeded(0, 1, 2)), labels)


@pytest.mark.parametrize("spatial", [(32, 40), (16, 16, 20)])
def test_augmentation_is_seeded_and_moves_labels_only(spatial):
    labels = torch.zeros(2, 2, *spatial, dtype=torch.uint8)
    labels[(..., *[slice(5, 11)] * len(spatial))] = 3
    one, again = (augment(labels, MOVING, seeded(1, 2)) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, augment(labels, MOVING, seeded(3, 4)))
    assert one.shape == labels.shape and one.dtype == torch.uint8 and set(one.unique().tolist()) == {0, 3}
    assert not torch.equal(one[0], one[1]), "each pair has its own warp"


def test_more_pairs_take_no_more_memory_at_once():
    largest = []
    for number in (2, 8):
        with LargestTensor() as memory:
            augment(some_pairs(number, 16, 20), MOVING, seeded(*range(number)))
        largest.append(memory.numel)
    assert largest[0] == largest[1]


def test_a_common_warp_keeps_equal_images_equal_and_an_own_warp_does_not():
    image = some_pairs(1, 32, 32)[:, :1].repeat(1, 2, 1, 1)
    common = augment(image, replace(STILL, common=2.0, affine=0.1), seeded(0))
    assert torch.equal(common[:, 0], common[:, 1]) and not torch.equal(common, image)
    own = augment(image, replace(STILL, own=2.0), seeded(0))
    assert not torch.equal(own[:, 0], own[:, 1])


def test_flows_on_a_coarser_grid_are_as_large_and_as_smooth():
    """In voxels of the images, not of the grid on which they are composed."""
    flow = replace(STILL, common=6.0, smoothness=24)
    fine, coarse = (motion(ramps(96, 128), replace(flow, coarser=coarser), 40)[:, 0] for coarser in (1, 4))
    assert float(coarse.std() / fine.std()) == pytest.approx(1, abs=0.1)
    rough = [(each[:, 16:] - each[:, :-16]).std() for each in (fine, coarse)]
    assert float(rough[1] / rough[0]) == pytest.approx(1, abs=0.15)


def test_affine_jitter_on_a_coarser_grid_is_the_same():
    jitter = replace(STILL, affine=0.15)
    fine, coarse = (motion(ramps(64, 96), replace(jitter, coarser=coarser), 8) for coarser in (1, 4))
    assert (fine - coarse).abs().max() <= 1, "but for rounding"
    assert fine.abs().max() > 5


@pytest.mark.parametrize("spatial, size", [((9, 8), (4, 8)), ((6, 5, 7), (6, 2, 3))])
def test_patches_are_of_their_pair_and_from_all_over_it(spatial, size):
    whole = torch.arange(2 * 2 * math.prod(spatial)).reshape(2, 2, *spatial)
    source = PatchesOfPairs(WarpedPairs(whole, Samples(2, 2, seed=0), None), Patches(size, cuts=4))
    patches = [source(step) for step in range(200)]
    assert all(patch.shape == (2, 2, *size) for patch in patches)
    steps = [math.prod(spatial[axis + 1 :]) for axis in range(len(spatial))]
    for axis, step in enumerate(steps):  # neighbours in the patch are neighbours in the whole
        assert (patches[0].diff(dim=axis + 2) == step).all()
    corner = patches[0].flatten(2)[:, :, 0]
    assert (corner[:, 1] - corner[:, 0] == math.prod(spatial)).all()
    assert torch.cat([patch.flatten() for patch in patches]).unique().numel() == whole.numel()


def test_a_volume_is_cut_several_times_before_the_next_is_warped():
    warped = []

    class Volumes(WarpedPairs):
        def __call__(self, step):
            warped.append(step)
            return super().__call__(step)

    source = PatchesOfPairs(Volumes(some_pairs(2, 8, 8), Samples(2, 2, seed=0), None), Patches((4, 4), cuts=3))
    for step in range(7):
        source(step)
    assert warped == [0, 1, 2]
