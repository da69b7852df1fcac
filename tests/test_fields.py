"""Displacement fields: every operation keeps to the convention, in 2D and 3D."""

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp

from pairdiff_core import fields

GRIDS = [(20, 28), (12, 14, 16)]


def smooth_field(spatial, amplitude=1.0, seed=0, number=1):
    generator = torch.Generator().manual_seed(seed)
    return fields.random_velocity(number, spatial, amplitude=amplitude, smoothness=8, generator=generator)


def inside(field, margin=4):
    return field[(..., *[slice(margin, -margin)] * (field.dim() - 2))]


@pytest.mark.parametrize("spatial", GRIDS)
def test_warp_reads_the_moving_image_at_x_plus_u(spatial):
    image = torch.rand(1, 1, *spatial)
    for axis in range(len(spatial)):
        displacement = torch.zeros(1, len(spatial), *spatial)
        displacement[:, axis] = 2
        warped = fields.warp(image, displacement)
        expected = image.roll(-2, dims=axis + 2)
        keep = [slice(None)] * (2 + len(spatial))
        keep[axis + 2] = slice(0, -2)
        torch.testing.assert_close(warped[tuple(keep)], expected[tuple(keep)], atol=1e-5, rtol=0)


def test_warp_outside_repeats_the_border_or_is_zero():
    image = torch.ones(1, 1, 6, 6)
    far = torch.full((1, 2, 6, 6), 20.0)
    assert torch.all(fields.warp(image, far) == 1)
    assert torch.all(fields.warp(image, far, padding="zeros") == 0)


@pytest.mark.parametrize("spatial", [(24, 20), (16, 12, 20)])
def test_some_voxels_are_warped_as_all_are(spatial):
    """This also holds if the displacement is on a coarser grid, or points out of the image."""
    torch.manual_seed(0)
    image = torch.rand(2, 3, *spatial)
    coarse = 3 * torch.randn(2, len(spatial), *[size // 4 for size in spatial])
    voxels = (torch.rand(spatial) < 0.3).nonzero()
    expected = fields.warp(image, fields.resize_field(coarse, spatial))[(..., *voxels.T)]
    torch.testing.assert_close(fields.warp_at(image, coarse, voxels), expected)


def test_warp_refuses_another_grid():
    with pytest.raises(ValueError, match="differ"):
        fields.warp(torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 9))


@pytest.mark.parametrize("spatial", GRIDS)
def test_labels_keep_their_values_and_type(spatial):
    labels = torch.randint(0, 25, (2, *spatial), dtype=torch.uint8)
    warped = fields.warp_labels(labels, smooth_field(spatial, number=2))
    assert warped.dtype == torch.uint8
    assert set(warped.unique().tolist()) <= set(labels.unique().tolist())
    assert torch.equal(fields.warp_labels(labels, torch.zeros(2, len(spatial), *spatial)), labels)


@pytest.mark.parametrize("spatial", GRIDS)
def test_compose_is_first_then_second(spatial):
    first, second = smooth_field(spatial, seed=1), smooth_field(spatial, seed=2)
    point = torch.tensor([[size / 2 - 0.3 for size in spatial]])
    there = point + fields.sample_at(first[0], point)
    expected = there + fields.sample_at(second[0], there)
    found = point + fields.sample_at(fields.compose(first, second)[0], point)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_compose_translations_exactly():
    first, second = torch.ones(1, 2, 8, 8), 2 * torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(fields.compose(first, second), 3 * torch.ones(1, 2, 8, 8))


@pytest.mark.parametrize("spatial", GRIDS)
def test_exponential_of_the_negative_is_the_inverse(spatial):
    velocity = smooth_field(spatial, amplitude=0.8)
    there, back = fields.exponentiate(velocity), fields.exponentiate(-velocity)
    error = inside(fields.compose(there, back)).norm(dim=1)
    assert error.mean() < 0.05 < inside(there).norm(dim=1).mean()


def test_exponential_of_a_linear_velocity_is_the_matrix_exponential():
    spatial, rate = (33, 33), 0.2
    centre = 16.0
    position = fields.identity_grid(spatial) - centre
    velocity = (rate * position)[None]  # dx/dt = rate x: x(1) = exp(rate) x
    found = fields.exponentiate(velocity, squarings=10)
    expected = (np.exp(rate) - 1) * position[None]
    torch.testing.assert_close(inside(found, 8), inside(expected, 8), atol=0.01, rtol=0)


@pytest.mark.parametrize("spatial", GRIDS)
def test_smoothing_keeps_a_constant_up_to_the_border(spatial):
    field = torch.full((1, len(spatial), *spatial), 3.0)
    torch.testing.assert_close(fields.smooth(field), field)


@pytest.mark.parametrize("spatial", GRIDS)
def test_resize_keeps_a_translation_in_millimetres(spatial):
    field = torch.ones(1, len(spatial), *spatial)
    doubled = fields.resize_field(field, [2 * size for size in spatial])
    torch.testing.assert_close(doubled, 2 * torch.ones_like(doubled))


@pytest.mark.parametrize("spatial", GRIDS)
def test_points_move_with_their_half_voxel(spatial):
    """The centre of the field of view stays the centre; coarse index i is at 2 i + 1/2 on the fine grid."""
    fine = [2 * size for size in spatial]
    coarse_index = torch.tensor([[3.0] * len(spatial)])
    torch.testing.assert_close(fields.resize_points(coarse_index, spatial, fine), 2 * coarse_index + 0.5)
    there_and_back = fields.resize_points(fields.resize_points(coarse_index, spatial, fine), fine, spatial)
    torch.testing.assert_close(there_and_back, coarse_index)


@pytest.mark.parametrize("spatial", GRIDS)
def test_pooling_an_image_and_moving_a_point_agree(spatial):
    """A blob's centre of mass after pooling is where resize_points says."""
    grid = fields.identity_grid(spatial)
    centre = torch.tensor([size / 2 - 1.3 for size in spatial])
    blob = torch.exp(-((grid - centre.reshape(-1, *[1] * len(spatial))) ** 2).sum(0) / 8)
    half = [size // 2 for size in spatial]
    pooled = torch.nn.functional.interpolate(blob[None, None], size=half, mode="area")[0, 0]
    mass = (fields.identity_grid(half) * pooled).flatten(1).sum(1) / pooled.sum()
    torch.testing.assert_close(mass[None], fields.resize_points(centre[None], spatial, half), atol=0.1, rtol=0)


@pytest.mark.parametrize("spatial", GRIDS)
def test_sampling_a_linear_field_is_exact(spatial):
    points = torch.rand(5, len(spatial)) * (torch.tensor(spatial) - 1)
    torch.testing.assert_close(fields.sample_at(fields.identity_grid(spatial), points), points, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spatial", GRIDS)
def test_jacobian_determinant_of_a_scaling(spatial):
    displacement = (0.1 * fields.identity_grid(spatial))[None]
    expected = torch.full((1, *spatial), 1.1 ** len(spatial))
    torch.testing.assert_close(fields.jacobian_determinant(displacement), expected)


def test_jacobian_determinant_of_a_fold_is_negative():
    displacement = torch.zeros(1, 2, 8, 8)
    displacement[:, 0] = -2 * fields.identity_grid((8, 8))[0]  # mirrors axis 0
    assert torch.all(fields.jacobian_determinant(displacement) < 0)


def test_random_velocity_is_seeded_smooth_and_of_the_amplitude_asked_for():
    one, again = smooth_field((40, 40), 2.0, seed=5), smooth_field((40, 40), 2.0, seed=5)
    assert torch.equal(one, again)
    assert not torch.equal(one, smooth_field((40, 40), 2.0, seed=6))
    assert one.std() == pytest.approx(2.0, rel=1e-4)
    assert one.diff(dim=2).std() < 0.5 * one.std()


@pytest.mark.parametrize("spatial", GRIDS)
def test_monai_warp_agrees(spatial):
    image, displacement = torch.rand(1, 1, *spatial), smooth_field(spatial)
    theirs = Warp(mode="bilinear", padding_mode="border")(image, displacement)
    torch.testing.assert_close(fields.warp(image, displacement), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spatial", GRIDS)
def test_itk_vectors_point_to_the_same_place_in_the_world(spatial):
    """With an oblique affine, the ITK vector in LPS ends at the displaced voxel."""
    dims = len(spatial)
    generator = np.random.default_rng(0)
    affine = np.eye(dims + 1)
    affine[:dims, :dims] = np.linalg.qr(generator.normal(size=(dims, dims)))[0] @ np.diag([0.7, 1.3, 2.0][:dims])
    affine[:dims, dims] = [5.0, -7.0, 11.0][:dims]
    field = smooth_field(spatial)[0]
    index = tuple(size // 3 for size in spatial)
    flip = np.array([-1.0, -1.0, 1.0][:dims])

    def to_lps(voxel):
        return flip * (affine[:dims, :dims] @ voxel + affine[:dims, dims])

    moved = np.array(index) + field[(slice(None), *index)].numpy()
    arrow = fields.to_itk(field, affine)[index]
    np.testing.assert_allclose(to_lps(np.array(index)) + arrow, to_lps(moved), atol=1e-5)


def test_learn2reg_form_is_channels_last_voxels():
    field = smooth_field((6, 7, 8))[0]
    converted = fields.to_learn2reg(field)
    assert converted.shape == (6, 7, 8, 3) and converted.dtype == np.float32
    np.testing.assert_allclose(converted[1, 2, 3], field[:, 1, 2, 3].numpy())
