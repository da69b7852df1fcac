"""Pairs of any size and spacing: how a network sees them, and that the result fits them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from largest import LargestTensor

from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import get_profile, with_levels
from pairdiff_core.registration import integrate, label_maps, register, sampling

MM = (4.0, 4.0, 4.0)  # at which the phantom lungs of the small run are drawn


def one_pair(labels: torch.Tensor, num_labels: int = 2, spacing: tuple[float, ...] | None = None) -> PairSet:
    """A set of one pair from labels (2, *spatial)."""
    spacing = spacing or (1.0,) * (labels.dim() - 1)
    return PairSet(labels[None], tuple(map(str, range(num_labels))), spacing, ("fixed~moving",))


@pytest.mark.parametrize("fixture", ["trained", "trained_3d"])
def test_on_its_own_grid_a_network_sees_the_pairs_as_they_are(fixture, request):
    run, made = request.getfixturevalue(fixture)
    network = made.networks["real"].model if fixture == "trained" else made.model
    pairs, settings = run.validation[:2], run.profile.registration
    found = register(pairs, run.profile, network, instance=False)
    fixed, moving = (label_maps(image, pairs.num_labels) for image in (pairs.fixed, pairs.moving))
    with torch.no_grad():
        velocities = network.velocities(fixed, moving, settings.repeats)
    expected = integrate(velocities, settings.squarings).resized(pairs.spatial)
    assert expected.displacement.abs().max() > 0.1
    torch.testing.assert_close(found.both, expected.both, atol=1e-4, rtol=0)


def test_instance_optimisation_starts_from_the_network(trained):
    run, made = trained
    pairs, network = run.validation[:2], made.networks["real"].model
    alone, optimised = (register(pairs, run.profile, network, instance=instance) for instance in (False, True))
    unchanged = register(pairs, with_levels(run.profile, steps=0), network)
    assert not torch.allclose(alone.displacement, optimised.displacement, atol=1e-2)
    torch.testing.assert_close(unchanged.both, alone.both, atol=0.05, rtol=0)  # resized to another grid and back


@pytest.mark.parametrize("by_network", [False, True])
def test_a_pair_does_not_depend_on_those_beside_it(trained, by_network):
    run, made = trained
    network = made.networks["real"].model if by_network else None
    together = register(run.validation[:3], run.profile, network)
    alone = register(run.validation[1], run.profile, network)
    torch.testing.assert_close(together[1:2].both, alone.both, atol=1e-3, rtol=0)


@pytest.mark.parametrize("times", [2, 3])
def test_a_finer_volume_is_seen_at_the_millimetres_of_training(trained_3d, times):
    """If each voxel is split into times^3, the image is the same, and so is the field, in smaller voxels."""
    run, network = trained_3d
    labels = run.validation.labels[0, :, :40, :36, :33]  # not multiples of anything
    fine = labels
    for axis in (1, 2, 3):
        fine = fine.repeat_interleave(times, axis)
    header = tuple(4 / times * error for error in (0.998, 1.0, 1.002))  # as in real headers
    options = {"profile": run.profile, "network": network.model, "instance": False, "trained_spacing": MM}
    coarse = register(one_pair(labels, spacing=MM), **options).displacement
    found = register(one_pair(fine, spacing=header), **options).displacement
    assert found.shape[2:] == fine.shape[1:] and coarse.shape[2:] == labels.shape[1:]
    pooled = F.avg_pool3d(found, times) / times  # in voxels of the coarse grid
    torch.testing.assert_close(pooled, coarse, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "spatial, spacing, grid, padded, as_trained",
    [
        ((64, 52, 64), MM, (64, 52, 64), (64, 52, 64), True),
        ((320, 250, 353), (1.0, 0.998, 1.002), (80, 64, 92), (320, 256, 368), True),
        ((32, 32, 32), (4.0, 4.0, 8.0), (32, 32, 64), (32, 32, 32), True),
        ((40, 40, 40), (0.1, 0.1, 0.1), (64, 40, 40), (64, 40, 40), False),  # a very small lung
        ((64, 64, 64), (40.0, 40.0, 40.0), (64, 64, 64), (64, 64, 64), False),  # would be 512 times the voxels
        ((256, 208, 256), (0.1, 0.1, 0.1), (64, 52, 64), (256, 208, 256), False),
        ((3, 5, 7), MM, (64, 32, 32), (64, 32, 32), False),
    ],
)
def test_sampling(trained_3d, spatial, spacing, grid, padded, as_trained):
    assert sampling(spatial, spacing, trained_3d[0].profile, MM) == (grid, padded, as_trained)


@pytest.mark.parametrize("spatial", [(1, 2, 3), (5, 4, 7), (33, 1, 20), (2, 9), (51, 30)])
def test_any_size_has_a_finite_field(spatial):
    labels = torch.zeros(2, *spatial, dtype=torch.uint8)
    labels[0].view(-1)[0] = labels[1].view(-1)[-1] = 1
    found = register(one_pair(labels), with_levels(get_profile("laptop", len(spatial)), steps=2))
    assert found.both.shape == (2, len(spatial), *spatial) and found.both.isfinite().all()
    assert found.displacement.abs().max() > 0


def test_no_steps_is_no_displacement():
    labels = torch.randint(0, 2, (2, 20, 24), dtype=torch.uint8)
    assert not register(one_pair(labels), with_levels(get_profile("laptop"), steps=0)).both.any()


def test_large_volumes_with_many_labels_need_little_memory():
    """They are optimised on a coarser grid, and their maps are pooled label by label."""
    profile = replace(with_levels(get_profile("quick", 3), levels=1, steps=1), num_labels=12)  # 64 x 52 x 64
    labels = torch.randint(0, 12, (2, 190, 180, 170), dtype=torch.uint8)
    with LargestTensor() as largest:
        found = register(one_pair(labels, 12), profile)
    assert found.displacement.shape == (1, 3, 190, 180, 170)
    assert largest.numel <= 6 * 192 * 184 * 184, "no more than the two displacements themselves, padded"
