"""Every metric on a case that can be computed by hand, in 2D and in 3D."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from scipy import ndimage
from scipy.stats import wasserstein_distance

from pairdiff_core import fields, metrics
from pairdiff_core.metrics import memorisation

DIMS = pytest.mark.parametrize("dims", [2, 3])


def line(values: list[int], dims: int) -> torch.Tensor:
    """A label map (1, 4, ..., len(values)) that varies along its last axis only."""
    return torch.tensor(values, dtype=torch.uint8).expand(1, *[4] * (dims - 1), len(values)).contiguous()


def pair(fixed: list[int], moving: list[int], dims: int = 2) -> torch.Tensor:
    """Label maps (1, 2, 4, ..., len(fixed))."""
    return torch.stack([line(fixed, dims), line(moving, dims)], dim=1)


def blobs(number: int, dims: int, seed: int) -> torch.Tensor:
    """Random label maps (number, 2, 8, ..., 8) of 3 labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (number, 2, *[8] * dims), generator=generator).to(torch.uint8)


def linear_field(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """The displacement (1, D, *spatial) of the map x -> matrix x."""
    x = fields.identity_grid([size] * len(matrix))
    return (torch.einsum("de,e...->d...", matrix, x) - x)[None]


# ---- registration


@DIMS
def test_dice_per_structure(dims: int) -> None:
    a = line([0, 1, 1, 1, 2, 0], dims)
    b = line([0, 0, 1, 1, 1, 3], dims)
    # 1: overlap 2 of 3 and 3; 2 only in a; 3 only in b
    expected = torch.tensor([[2 * 2 / 6, 0.0, 0.0, torch.nan]])
    torch.testing.assert_close(metrics.dice(a, b, 5), expected, equal_nan=True)
    torch.testing.assert_close(metrics.dice(b, a, 5), expected, equal_nan=True)
    torch.testing.assert_close(metrics.mean_dice(a, b, 5), torch.tensor([2 / 9]))


def test_dice_of_a_set_is_that_of_each_image() -> None:
    """Dice does not depend on the number of images, and agrees with MONAI."""
    a, b = (blobs(3, 3, seed).flatten(0, 1) for seed in (0, 1))
    together = metrics.dice(a, b, 3)
    monai = compute_dice(a[:, None], b[:, None], include_background=False, num_classes=3)
    torch.testing.assert_close(together, monai)
    one_by_one = [metrics.dice(a[i : i + 1], b[i : i + 1], 3) for i in range(6)]
    assert torch.equal(together, torch.cat(one_by_one))


def test_a_pair_without_structures_does_not_spoil_the_mean() -> None:
    """Dice is NaN only for the pair in which neither image has a structure, and the mean skips it."""
    empty, full, half = line([0, 0, 0], 2), line([0, 1, 1], 2), line([0, 0, 1], 2)
    dice = metrics.mean_dice(torch.cat([full, empty, full]), torch.cat([full, empty, half]), 3)
    torch.testing.assert_close(dice, torch.tensor([1.0, torch.nan, 2 / 3]), equal_nan=True)
    assert metrics.mean_over_pairs(dice) == pytest.approx(5 / 6)
    assert json.dumps(metrics.mean_over_pairs(metrics.mean_dice(empty, empty, 3)), allow_nan=False) == "null"


@DIMS
def test_hausdorff95_in_millimetres(dims: int) -> None:
    """Structure 1 of ``b`` is 3 voxels away along the last axis; 2 and 3 are in one image only."""
    a = torch.zeros(2, *[12] * dims, dtype=torch.uint8)
    a[0, ..., 2], a[0, ..., 8] = 1, 2
    b = torch.zeros_like(a)
    b[0, ..., 5], b[0, ..., 9] = 1, 3
    with warnings.catch_warnings(action="error"):
        found = metrics.hausdorff95(a, b, 5, (9.0, 7.0, 2.0)[-dims:])
    expected = torch.tensor([[6.0, *[torch.nan] * 3], [torch.nan] * 4])
    torch.testing.assert_close(found, expected, equal_nan=True)


@DIMS
def test_hausdorff95_against_distance_transforms(dims: int) -> None:
    """The larger of the two 95th percentiles; unlike the maximum, it ignores a few outliers."""
    a = torch.zeros(1, *[24] * dims, dtype=torch.uint8)
    a[0][(slice(6, 16),) * dims] = 1
    b = a.roll(2, 1)
    b[(0, *[0] * dims)] = 1  # an outlier in the corner
    spacing = (1.5, 0.5, 1.0)[:dims]
    surface = [mask & ~ndimage.binary_erosion(mask) for mask in (a[0].numpy() > 0, b[0].numpy() > 0)]
    to = [ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in surface]
    ways = (to[1][surface[0]], to[0][surface[1]])
    expected = max(np.percentile(way, 95) for way in ways)
    assert metrics.hausdorff95(a, b, 2, spacing).item() == pytest.approx(expected, rel=1e-5)
    assert expected < ways[1].max()


def test_images_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.dice(line([0, 1], 2), line([0, 1, 1], 2), 2)


@DIMS
def test_target_registration_error_in_millimetres(dims: int) -> None:
    displacement = torch.zeros(dims, *[8] * dims)
    displacement[0] = 3.0
    fixed = torch.full((2, dims), 2.5)
    moving = fixed.clone()
    moving[0, 0] += 3.0  # exactly right
    moving[1, 0] += 1.0  # 2 voxels of 1.5 mm too far ...
    moving[1, 1] += 2.0  # ... and 2 voxels of 2 mm aside
    landmarks = torch.stack([fixed, moving], dim=1)
    error = metrics.target_registration_error(displacement, landmarks, (1.5, 2.0, 9.0)[:dims])
    torch.testing.assert_close(error, torch.tensor([0.0, 5.0]))


def test_target_registration_error_interpolates() -> None:
    displacement = fields.identity_grid((6, 6))  # u(x) = x
    landmarks = torch.tensor([[[1.25, 2.5], [2.5, 5.0]]])
    error = metrics.target_registration_error(displacement, landmarks, (1, 1))
    torch.testing.assert_close(error, torch.zeros(1))


def test_landmark_errors_are_described() -> None:
    found = metrics.describe_errors(torch.tensor([4.0, 0.0, 1.0, 3.0, 2.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]))
    assert found["mean"] == pytest.approx(5) == found["p50"] and found["landmarks"] == 11
    assert (found["p25"], found["p75"], found["p95"]) == pytest.approx((2.5, 7.5, 9.5))
    assert found["worst30"] == pytest.approx(9), "the mean of the three largest"
    assert metrics.describe_errors(torch.tensor([2.0]))["worst30"] == 2


@DIMS
def test_folding_of_a_mirrored_map_is_complete(dims: int) -> None:
    mirror = torch.eye(dims)
    mirror[0, 0] = -1.0
    both = torch.cat([linear_field(mirror, 5), linear_field(torch.eye(dims), 5)])
    torch.testing.assert_close(metrics.folding_percent(both), torch.tensor([100.0, 0.0]))


@DIMS
def test_folding_counts_voxels(dims: int) -> None:
    displacement = torch.zeros(1, dims, *[10] * dims)
    displacement[0, 0, 4], displacement[0, 0, 6] = (1.5, -1.5)  # x = 4 passes x = 6: the central difference is -1.5
    torch.testing.assert_close(metrics.folding_percent(displacement), torch.tensor([10.0]))


def test_collapse_counts_as_folding() -> None:
    collapse = linear_field(torch.diag(torch.tensor([0.0, 1.0])), 5)  # determinant exactly 0
    torch.testing.assert_close(metrics.folding_percent(collapse), torch.tensor([100.0]))


@DIMS
def test_log_jacobian_sd(dims: int) -> None:
    uniform = linear_field(2 * torch.eye(dims), 6)  # determinant 2**D everywhere
    torch.testing.assert_close(metrics.log_jacobian_sd(uniform), torch.zeros(1))
    kink = torch.zeros(1, dims, *[6] * dims)
    kink[0, 0, 3:] = torch.arange(3.0).reshape(3, *[1] * (dims - 1))
    # along axis 0, u = 0 0 0 0 1 2: derivatives 0 0 0 0.5 1 1, determinants 1 1 1 1.5 2 2
    logs = [0, 0, 0, math.log(1.5), math.log(2), math.log(2)]
    mean = sum(logs) / 6
    expected = math.sqrt(sum((value - mean) ** 2 for value in logs) / 6)
    torch.testing.assert_close(metrics.log_jacobian_sd(kink), torch.tensor([expected]))


def test_log_jacobian_sd_is_finite_where_the_map_folds() -> None:
    mirror_half = torch.zeros(1, 2, 4, 4)
    mirror_half[0, 0] = torch.tensor([0.0, 0.0, -4.0, -8.0])[:, None]
    # derivatives 0 -2 -4 -4, determinants 1 -1 -3 -3: three folds at log(1e-9)
    expected = math.sqrt(3) / 4 * -math.log(1e-9)
    torch.testing.assert_close(metrics.log_jacobian_sd(mirror_half), torch.tensor([expected]))


@DIMS
def test_inverse_consistency_error(dims: int) -> None:
    there = torch.zeros(2, dims, *[6] * dims)
    there[:, 0] = 2.0
    back = -there
    back[1, 1] = 0.5  # the second pair comes back half a voxel aside
    torch.testing.assert_close(metrics.inverse_consistency_error(there, back), torch.tensor([0.0, 0.5]))


def test_inverse_consistency_error_on_some_voxels() -> None:
    there = torch.zeros(2, 2, 4, 4)
    back = there.clone()
    back[:, 0, :2] = 3.0  # half of the voxels end three voxels away
    where = torch.zeros(2, 4, 4, dtype=torch.bool)
    where[0, 1:] = True  # one row of three
    found = metrics.inverse_consistency_error(there, back, where)
    assert float(found[0]) == pytest.approx(1.0) and found[1].isnan(), "of no voxel there is no mean"


def test_inverse_is_read_where_the_voxel_went() -> None:
    there = torch.zeros(1, 2, 5, 5)
    there[0, 0] = 1.0
    back = torch.zeros(1, 2, 5, 5)
    back[0, 0] = -torch.arange(5.0)[:, None]  # v = -x along axis 0
    # |1 - (x + 1)| = x for x = 0..3; x = 4 leaves the view and reads v = -4 at the border
    expected = (0 + 1 + 2 + 3 + 3) / 5
    torch.testing.assert_close(metrics.inverse_consistency_error(there, back), torch.tensor([expected]))


# ---- codebook


def test_codebook_use() -> None:
    use = metrics.codebook_use(torch.tensor([[0, 0], [3, 3]]), 4)
    assert use.used == 0.5
    assert use.perplexity == pytest.approx(2.0)
    assert use.counts.tolist() == [2, 0, 0, 2]
    skewed = metrics.codebook_use(torch.tensor([0, 0, 0, 1]), 4)
    assert skewed.perplexity == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_codebook_statistics_agree_with_codebook_use() -> None:
    tokens = torch.tensor([[0, 2], [2, 5]], dtype=torch.int16)
    found, use = metrics.codebook_statistics(tokens, 8), metrics.codebook_use(tokens, 8)
    assert {key: value.item() for key, value in found.items()} == {"codes used": use.used, "perplexity": use.perplexity}


def test_codebook_statistics_need_no_value_on_the_host() -> None:
    """Tensors on the meta device have no values: reading one, as .item() or bincount do, is an error."""
    found = metrics.codebook_statistics(torch.zeros(2, 3, dtype=torch.int64, device="meta"), 8)
    assert all(value.is_meta and value.shape == () for value in found.values())


@pytest.mark.parametrize("tokens", [[], [-1, 0], [0, 4]])
def test_codebook_use_refuses_what_is_no_code(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="from 0 to 3"):
        metrics.codebook_use(torch.tensor(tokens, dtype=torch.int64), 4)


# ---- sizes


@DIMS
def test_structure_areas(dims: int) -> None:
    areas = metrics.structure_areas(pair([0, 1, 1, 1], [1, 0, 0, 2], dims), 4)
    assert areas.tolist() == [[0.75, 0.0, 0.0], [0.25, 0.25, 0.0]]


def test_compare_areas() -> None:
    real, synthetic = pair([0, 1, 1, 1], [1, 0, 0, 2]), pair([1, 0, 0, 0], [1, 0, 0, 0])
    rows = metrics.compare_areas(real, synthetic, ("background", "cortex", "thalamus"))
    assert [row["structure"] for row in rows] == ["cortex", "thalamus"]
    cortex, thalamus = rows
    assert (cortex["real_mean"], cortex["real_sd"], cortex["real_present"]) == (0.5, 0.25, 1.0)
    assert (cortex["synthetic_mean"], cortex["synthetic_sd"]) == (0.25, 0.0)
    assert cortex["wasserstein"] == pytest.approx(0.25)  # half of the images move from 3/4 to 1/4
    assert thalamus["synthetic_present"] == 0.0
    assert thalamus["wasserstein"] == pytest.approx(0.125)


@DIMS
def test_connected_components_are_counted(dims: int) -> None:
    """Real: one component of 12 voxels. Synthetic: one of 6 and, away from it, one of 2 that touch at a corner."""
    real = torch.zeros(1, 2, *[8] * dims, dtype=torch.uint8)
    synthetic = real.clone()
    middle = (0,) * (dims - 2)
    for image in range(2):
        real[(0, image, *middle, slice(0, 2), slice(0, 6))] = 1
        synthetic[(0, image, *middle, slice(0, 1), slice(0, 6))] = 1
        synthetic[(0, image, *middle, 4, 4)] = synthetic[(0, image, *middle, 5, 5)] = 1
    table = metrics.compare_components(real, synthetic)
    assert table["real"]["number"] == 1 and table["real"]["largest"] == 1 and table["real"]["small"] == 0
    assert table["real"]["percentile_50"] == 12
    assert table["synthetic"]["number"] == 2 and table["synthetic"]["largest"] == 0.75
    assert table["synthetic"]["percentile_50"] == 4 and table["synthetic"]["small"] == 1


def test_components_of_empty_images() -> None:
    empty = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    with warnings.catch_warnings(action="error"):
        table = metrics.compare_components(empty, empty)
    assert table["synthetic"]["number"] == 0 and math.isnan(table["synthetic"]["largest"])


@DIMS
def test_displacement_statistics(dims: int) -> None:
    displacement = torch.zeros(1, dims, 101, *[1] * (dims - 1))
    displacement[0, 0] = 0.6 * torch.arange(101.0).reshape(101, *[1] * (dims - 1))
    displacement[0, 1] = 0.8 * torch.arange(101.0).reshape(101, *[1] * (dims - 1))  # lengths 0, 1, ..., 100
    statistics = metrics.displacement_statistics(displacement)
    percentiles = {f"percentile_{p}": p for p in (5, 25, 50, 75, 95, 99)}
    expected = {"mean": 50, "sd": math.sqrt((101**2 - 1) / 12), **percentiles}
    assert statistics == pytest.approx(expected, rel=1e-5)


def test_percentiles_lie_between_two_values() -> None:
    displacement = torch.tensor([0.0, 10.0]).reshape(1, 1, 2, 1).repeat(1, 2, 1, 1) / math.sqrt(2)
    found = metrics.displacement_statistics(displacement)
    assert found["percentile_5"] == pytest.approx(0.5) and found["percentile_75"] == pytest.approx(7.5)


def test_compare_displacements() -> None:
    real, synthetic = torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    real[:, 0], synthetic[:, 1] = 2.0, -5.0
    table = metrics.compare_displacements(real, synthetic)
    assert table["real"]["mean"] == 2.0 and table["synthetic"]["mean"] == 5.0
    assert table["real"]["percentile_95"] == 2.0 and table["synthetic"]["sd"] == 0.0
    assert table["difference"]["wasserstein"] == pytest.approx(3.0)


def test_distance_of_displacements_agrees_with_the_exact_one() -> None:
    """They agree to four digits, for sets of different sizes with lengths like those of breathing lungs."""
    generator = torch.Generator().manual_seed(0)
    real = 3 * torch.randn(2, 3, 20, 20, 20, generator=generator)
    synthetic = 1 + torch.randn(3, 3, 20, 20, 20, generator=generator)
    exact = wasserstein_distance(*(u.norm(dim=1).flatten().double() for u in (real, synthetic)))
    found = metrics.compare_displacements(real, synthetic)["difference"]["wasserstein"]
    assert found == pytest.approx(exact, rel=2e-4)


# ---- distribution


@DIMS
def test_pair_features(dims: int) -> None:
    labels = pair([1, 1, 0, 2], [0, 0, 0, 1], dims)
    features = metrics.pair_features(labels, 3, [1] * (dims - 1) + [2])
    # fixed: structure 1 in both cells, structure 2 in both cells; then moving
    assert features.tolist() == [[1.0, 0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0]]


def test_pair_features_order_and_uneven_cells() -> None:
    labels = torch.zeros(2, 2, 3, 4, dtype=torch.uint8)
    labels[1, 0, 2, :] = 1  # last of three rows: with 2 cells, rows 0 and 1 are the first cell
    features = metrics.pair_features(labels, 2, (2, 2))
    assert features.tolist() == [[0.0] * 8, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]


def test_precision_recall_density_coverage() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # with k = 1 the radii are 1, 1, 1 and 8
    synthetic = torch.tensor([[0.5], [0.75], [1.5], [30.0]])  # radii 0.25, 0.25, 0.75 and 28.5
    quality = metrics.precision_recall_density_coverage(real, synthetic, neighbours=1)
    assert quality["precision"] == 0.75  # all but 30
    assert quality["recall"] == 0.75  # 1 and 0.75 touch; 2 and 10 are in the balls of 1.5 and 30; 0 is in none
    assert quality["density"] == 6 / 4  # 0.5: 0 1; 0.75: 0 1; 1.5: 1 2; 30: none -> 6 of 4
    assert quality["coverage"] == 0.75  # 10 reaches from 2 to 18, where no synthetic sample is


def test_equal_sets_are_perfect_and_distant_ones_are_not() -> None:
    real = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    same = metrics.precision_recall_density_coverage(real, real, neighbours=5)
    # itself and the five, in the balls of forty on average
    expected = {"precision": 1.0, "recall": 1.0, "density": pytest.approx(6 / 5), "coverage": 1.0}
    assert same == expected
    assert set(metrics.precision_recall_density_coverage(real, real + 100).values()) == {0.0}


def test_too_few_samples_for_the_neighbours() -> None:
    with pytest.raises(ValueError, match="more than 5 samples"):
        metrics.precision_recall_density_coverage(torch.zeros(9, 2), torch.zeros(5, 2), neighbours=5)


# ---- copies


@DIMS
def test_pair_distances(dims: int) -> None:
    a = pair([0, 1, 1, 2], [0, 0, 1, 1], dims)
    b = torch.cat([a, pair([0, 1, 2, 0], [0, 0, 0, 1], dims)])
    # foreground in either: 3 + 2 columns; differing: 2 in the fixed, 1 in the moving image
    torch.testing.assert_close(metrics.pair_distances(a, b), torch.tensor([[0.0, 3 / 5]]))
    torch.testing.assert_close(metrics.pair_distances(b, a), torch.tensor([[0.0], [3 / 5]]))


def test_pair_distances_against_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 4, (5, 2, 6, 7), generator=generator).to(torch.uint8)
    b = torch.randint(0, 3, (4, 2, 6, 7), generator=generator).to(torch.uint8)
    b[3] = b[0].flip(0)  # the same two images in another pair
    foreground = ((a[:, None] > 0) | (b[None] > 0)).flatten(2)
    expected = ((a[:, None] != b[None]).flatten(2) & foreground).sum(2) / foreground.sum(2)
    torch.testing.assert_close(metrics.pair_distances(a, b), expected)
    monkeypatch.setattr(memorisation, "VOXELS_AT_A_TIME", 10)
    torch.testing.assert_close(metrics.pair_distances(a, b), expected)


def test_two_empty_pairs_are_equal() -> None:
    empty = torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
    assert metrics.pair_distances(empty, empty).item() == 0.0


def test_features_of_the_same_kind_are_in_the_real_range() -> None:
    generator = torch.Generator().manual_seed(0)
    real, other = (torch.randn(2000, 3, generator=generator) for _ in range(2))
    assert metrics.share_in_real_range(real, other) == pytest.approx(0.9, abs=0.02)
    assert metrics.share_in_real_range(real, other + torch.tensor([9.0, 0, 0])) == pytest.approx(0.6, abs=0.02)


@DIMS
def test_memorisation_audit_finds_copies(dims: int) -> None:
    training, held_out, fresh = blobs(12, dims, 0), blobs(20, dims, 1), blobs(10, dims, 2)
    copies = training[[3, 7, 7, 0, 11]]
    copies[:, 0, 0] = 0  # not quite the same
    audit = metrics.memorisation_audit(torch.cat([copies, fresh[:5]]), training, held_out)
    assert audit.memorised
    assert audit.nearest[:5].tolist() == [3, 7, 7, 0, 11]
    assert audit.closer >= 0.5
    assert audit.distances.shape == (10,) and audit.held_out_distances.shape == (20,)
    assert torch.equal(audit.distances[:5], metrics.pair_distances(copies, training).min(1).values)


def test_memorisation_audit_accepts_what_is_like_held_out_data() -> None:
    training, held_out = blobs(12, 2, 0), blobs(20, 2, 1)
    audit = metrics.memorisation_audit(held_out, training, held_out)
    assert not audit.memorised
    assert audit.closer == 0.05  # one of 20 is below the 5th percentile of the 20
    assert audit.threshold == pytest.approx(audit.held_out_distances.quantile(0.05).item())


def test_memorisation_audit_allows_for_chance() -> None:
    training, held_out = blobs(12, 2, 0), blobs(20, 2, 1)
    far = metrics.memorisation_audit(held_out, training, held_out).distances.argsort()[10:19]
    audit = metrics.memorisation_audit(torch.cat([training[:1], held_out[far]]), training, held_out)
    assert audit.closer == 0.1  # one of ten; up to 0.05 + 3 * sqrt(0.05 * 0.95 / 10) = 0.26 may be chance
    assert not audit.memorised


def test_memorisation_audit_of_single_images() -> None:
    training, held_out = blobs(6, 2, 0), blobs(8, 2, 1)
    # copied images in new combinations
    mixed = torch.stack([training[:, 0], training.roll(1, 0)[:, 1]], dim=1)
    sets = [labels.flatten(0, 1)[:, None] for labels in (mixed, training, held_out)]
    audit = metrics.memorisation_audit(*sets)
    assert audit.memorised and audit.distances.max() == 0.0
