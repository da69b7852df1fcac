"""Volumes of any size: the same as the stages on their own grid, sensible on others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import small_run, small_run_3d

from pairdiff_core import pipeline, volume_registration
from pairdiff_core.checkpoints import CheckpointError
from pairdiff_core.data import grid_affine
from pairdiff_core.fields import resize_field
from pairdiff_core.pairs import DataError
from pairdiff_core.profiles import get_profile
from pairdiff_core.registration import label_maps, pool
from pairdiff_core.resume import AFTERWARDS
from pairdiff_core.volume_registration import (
    Trained,
    differences,
    load_trained,
    network_labels,
    register_by_network,
    register_without_training,
    sampling,
)
from pairdiff_core.volumes import VolumePair


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A small run of slices with a registration network, its pairs, and the network as its folder gives it."""
    run = small_run(tmp_path_factory.mktemp("run"))
    stage = pipeline.train_registration(run, run.train, "synthetic")
    return run, stage, load_trained(run.path)


@pytest.fixture(scope="module")
def lungs(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The same of phantom lungs, 4 mm a voxel, with a network called "real"."""
    run = small_run_3d(tmp_path_factory.mktemp("run"))
    stage = pipeline.train_registration(run, run.train, "real")
    return run, stage, load_trained(run.path, "real")


@pytest.mark.parametrize("kind", ["slices", "lungs"])
@pytest.mark.parametrize("instance", [False, True])
def test_on_its_own_grid_a_network_does_what_the_stage_does(kind, instance, request):
    run, stage, trained = request.getfixturevalue(kind)
    pair = run.test[:1]
    trained = replace(trained, profile=run.profile)  # the folder tells its name only
    levels = run.profile.registration.instance if instance else ()
    found = register_by_network(pair.labels[0], pair.spacing, trained, levels)
    expected = pipeline.register_pairs(run, pair, stage, instance=instance)
    assert expected.displacement.abs().max() > 0.1
    for field, other in zip(found, expected, strict=True):
        torch.testing.assert_close(field, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["slices", "lungs"])
def test_on_its_own_grid_the_optimiser_does_what_the_stage_does(kind, request):
    run, _, _ = request.getfixturevalue(kind)
    pair = run.test[:1]
    found = register_without_training(pair.labels[0], pair.num_labels, run.profile)
    expected = pipeline.register_pairs(run, pair)
    assert expected.displacement.abs().max() > 0.1
    for field, other in zip(found, expected, strict=True):
        torch.testing.assert_close(field, other, atol=1e-4, rtol=0)


def test_a_network_has_the_settings_it_was_trained_with(lungs):
    run, stage, trained = lungs
    today = get_profile("quick", 3).registration
    afterwards = {name: getattr(today, name) for name in AFTERWARDS}
    assert trained.profile.registration == replace(run.profile.registration, **afterwards) != today
    assert trained.stage.fingerprint == stage.fingerprint
    assert trained.spacing == (4.0, 4.0, 4.0)


@pytest.mark.parametrize("times", [2, 3])
def test_a_finer_volume_is_seen_at_the_millimetres_of_training(lungs, times):
    """Each voxel cut into times^3 is the same image: the same field, in smaller voxels."""
    run, _, trained = lungs
    labels = run.test.labels[0, :, :40, :36, :33]  # no multiple of anything
    fine = labels
    for axis in (1, 2, 3):
        fine = fine.repeat_interleave(times, axis)
    header = [4 / times * error for error in (0.998, 1.0, 1.002)]  # as headers say it
    coarse = register_by_network(labels, (4.0, 4.0, 4.0), trained).displacement
    found = register_by_network(fine, header, trained).displacement
    assert found.shape[2:] == fine.shape[1:] and coarse.shape[2:] == labels.shape[1:]
    apart = (found - resize_field(coarse, fine.shape[1:])).abs()  # interpolated once here, twice there
    assert apart.mean() < 0.02 * found.abs().mean() and apart.max() < 0.05 * found.abs().max()


def test_labels_get_to_a_networks_grid_as_its_training_data_did(lungs):
    run, _, _ = lungs
    labels = run.test.labels[:1]
    found = volume_registration.at_sampling(labels[0], (32, 26, 32), 2)
    assert torch.equal(found, run.test[:1].pooled(2).labels[0])


def test_maps_are_those_of_the_stages_label_by_label():
    labels = torch.randint(0, 5, (2, 12, 15), dtype=torch.uint8)
    for coarser in (1, 2):
        found = volume_registration.label_maps(labels, 5, coarser)
        torch.testing.assert_close(found, pool(label_maps(labels, 5), coarser))


@pytest.mark.parametrize(
    "spatial, spacing, grid, padded, as_trained",
    [
        ((64, 52, 64), (4.0, 4.0, 4.0), (64, 52, 64), (64, 52, 64), True),
        ((320, 250, 353), (1.0, 0.998, 1.002), (80, 64, 92), (320, 256, 368), True),
        ((32, 32, 32), (4.0, 4.0, 8.0), (32, 32, 64), (32, 32, 32), True),
        ((40, 40, 40), (0.1, 0.1, 0.1), (64, 40, 40), (64, 40, 40), False),  # a speck of a lung
        (
            (64, 64, 64),
            (40.0, 40.0, 40.0),
            (64, 64, 64),
            (64, 64, 64),
            False,
        ),  # would be 512 times the voxels
        ((256, 208, 256), (0.1, 0.1, 0.1), (64, 52, 64), (256, 208, 256), False),
        ((3, 5, 7), (4.0, 4.0, 4.0), (64, 32, 32), (64, 32, 32), False),
    ],
)
def test_sampling(lungs, spatial, spacing, grid, padded, as_trained):
    assert sampling(spatial, spacing, lungs[2]) == (grid, padded, as_trained)


def volume_pair(labels: torch.Tensor, values, affine=None, spacing=(4.0, 4.0, 4.0)) -> VolumePair:
    affine = np.diag([-4.0, -4.0, 4.0, 1.0]) if affine is None else affine
    paths = (Path("fixed.nii"), Path("moving.nii"))
    spatial = tuple(labels.shape[1:])
    return VolumePair(labels, np.array(values), spacing, spatial, affine, np.dtype(np.int16), paths)


def test_a_network_of_vessels_takes_all_above_zero(lungs):
    labels = torch.tensor([[0, 1, 2]], dtype=torch.uint8).expand(2, 3).reshape(2, 3, 1, 1).repeat(1, 1, 2, 2)
    assert network_labels(volume_pair(labels, [0, 5, 900]), lungs[2])[0, :, 0, 0].tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="fixed.nii holds the label -1; .* knows 0 and above"):
        network_labels(volume_pair(labels, [-1, 0, 1]), lungs[2])


def test_labels_that_a_network_does_not_know_are_named_with_their_file(slices):
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    labels[:, 0], labels[1, 5] = 1, 2  # the third value in the moving image only
    pair = volume_pair(labels, [0, 4, 17], spacing=(1.0, 1.0))
    with pytest.raises(DataError, match="moving.nii holds the label 17; .* knows 0 to 4"):
        network_labels(pair, slices[2])


def test_slices_are_not_for_a_network_of_volumes(lungs):
    pair = volume_pair(torch.zeros(2, 8, 8, dtype=torch.uint8), [0, 1], spacing=(1.0, 1.0))
    with pytest.raises(DataError, match="is one of slices, but .* was trained on volumes"):
        network_labels(pair, lungs[2])


def test_it_is_told_when_millimetres_or_axes_are_not_those_of_training(lungs):
    labels = torch.zeros(2, 40, 40, 40, dtype=torch.uint8)
    assert differences(volume_pair(labels, [0, 1]), lungs[2]) == []
    (axes,) = differences(volume_pair(labels, [0, 1], np.diag([4.0, 4.0, 4.0, 1.0])), lungs[2])
    assert "run to LPS; by the header, these run to RAS" in axes
    (voxels,) = differences(volume_pair(labels, [0, 1], spacing=(0.1, 0.1, 0.1)), lungs[2])
    assert "trained at 4 x 4 x 4 mm; these voxels of 0.1 x 0.1 x 0.1 mm do not fit" in voxels


@pytest.mark.parametrize("spatial", [(1, 2, 3), (5, 4, 7), (33, 1, 20), (2, 9), (51, 30)])
def test_any_size_has_a_finite_field(spatial):
    labels = torch.zeros(2, *spatial, dtype=torch.uint8)
    labels[0].view(-1)[0] = labels[1].view(-1)[-1] = 1
    profile = volume_registration.with_levels(get_profile("laptop", len(spatial)), steps=2)
    found = register_without_training(labels, 2, profile)
    for field in found:
        assert field.shape == (1, len(spatial), *spatial) and field.isfinite().all()
    assert found.displacement.abs().max() > 0


def test_no_steps_is_no_displacement():
    labels = torch.randint(0, 2, (2, 20, 24), dtype=torch.uint8)
    profile = volume_registration.with_levels(get_profile("laptop", 2), steps=0)
    assert not register_without_training(labels, 2, profile).displacement.any()


def test_a_large_volume_is_optimised_on_a_coarser_grid(monkeypatch):
    seen = []
    original = volume_registration.register_multilevel

    def spy(fixed, moving, levels, **settings):
        seen.append(tuple(fixed.shape[2:]))
        return original(fixed, moving, levels, **settings)

    monkeypatch.setattr(volume_registration, "register_multilevel", spy)
    profile = volume_registration.with_levels(get_profile("quick", 2), steps=1)  # 80 x 96
    labels = torch.randint(0, 3, (2, 250, 260), dtype=torch.uint8)
    assert register_without_training(labels, 3, profile).displacement.shape == (1, 2, 250, 260)
    assert seen == [(128, 136)]  # halved, padded to multiples of eight


def test_a_network_that_is_not_there_is_named_with_those_that_are(lungs):
    with pytest.raises(CheckpointError, match="holds no network 'synthetic'; it holds: real"):
        load_trained(lungs[0].path)


def test_the_grid_of_a_run_has_its_place_in_the_world():
    coarse, fine = grid_affine("lung250m", (64, 52, 64)), grid_affine("phantom3d", (256, 208, 256))
    for corner in ((-0.5, -0.5, -0.5, 1), (63.5, 51.5, 63.5, 1)):  # the field of view has the same corners
        on_fine = [*(4 * np.array(corner[:3]) + 1.5), 1]
        np.testing.assert_allclose(coarse @ corner, fine @ on_fine)
    slice_affine = grid_affine("oasis2d", (80, 96))
    assert np.allclose(np.linalg.norm(slice_affine[:3, :3], axis=0), [2, 2, 1])
    assert np.linalg.det(slice_affine[:3, :3]) > 0


def test_trained_on_slices_knows_their_millimetres(slices):
    run, _, trained = slices
    assert Trained(run, trained.profile, trained.stage).spacing == pytest.approx((2.0, 2.0))  # quick: 80 x 96
