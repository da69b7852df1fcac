"""Breathing motions: fitted to correspondences, transferred to other lungs, and a model of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pairdiff_core import fields
from pairdiff_core.augmentation import augment
from pairdiff_core.data import breathing
from pairdiff_core.data.breathing import NODE_MM, NODES, STANDARD_BOX, fit, fit_motions, laid, read_motions
from pairdiff_core.data.lung250m import OFFICIAL_TEST, case_files
from pairdiff_core.data.lung_frame import FRAME
from pairdiff_core.data.phantom_lungs import lung_pairs
from pairdiff_core.errors import DataError
from pairdiff_core.motion import motion_model, unfolded
from pairdiff_core.profiles import Augmentation

REAL = Path(__file__).parents[2] / "shared" / "data" / "lung250m"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data/lung250m beside this checkout")
STILL = Augmentation(affine=0.0, common=0.0, own=0.0, smoothness=8, coarser=2, motion=1.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correspondences(number: int = 4000, depth: float = 20.0, seed: int = 0) -> torch.Tensor:
    """Points in the standard box that move down, more at the base than at the apex, as (K, 2, 3) in mm."""
    low, high = STANDARD_BOX
    fixed = low + (high - low) * torch.rand((number, 3), generator=seeded(seed))
    share = (high[2] - fixed[:, 2]) / (high - low)[2]
    moved = fixed + torch.stack([0 * share, -0.2 * depth * share, depth * share**2], 1)
    return torch.stack([fixed, moved], 1)


@pytest.fixture(scope="module")
def real_motions() -> breathing.Motions:
    return read_motions(REAL)


# ------------------------------------------------------------------------------------------------------ fitting


def test_a_smooth_motion_is_found_from_its_correspondences():
    points = correspondences()
    displacement, residual = fit(points)
    assert residual < 0.3
    new = correspondences(seed=1)
    where = fields.resize_points(new[:, 0], FRAME, NODES)
    found = NODE_MM * fields.sample_at(displacement, where)
    assert (found - (new[:, 1] - new[:, 0])).norm(dim=1).mean() < 0.5


def test_what_crosses_is_smoothed_until_nothing_folds():
    points = correspondences()
    points[:, 1] = points[:, 1].flip(0)
    displacement, residual = fit(points)
    assert fields.jacobian_determinant(displacement[None]).min() > 0.1 and residual > 10


def test_a_motion_of_another_size_and_place_is_the_same_in_the_standard_box():
    points = correspondences()
    other = points * torch.tensor([1.2, 0.8, 1.1]) + torch.tensor([-40.0, 300.0, 7.0])
    one, two = (fit_motions({"case": each}).displacement for each in (points, other))
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("spatial", [(64, 52, 64), (32, 26, 32)])
def test_a_motion_is_laid_into_another_box(spatial):
    """In a box of half the size, the corresponding point moves half as far."""
    motion, _ = fit(correspondences())
    box = torch.stack([STANDARD_BOX[0], STANDARD_BOX.mean(0)])
    mm = torch.tensor(FRAME) / torch.tensor(spatial)
    for share in (torch.tensor([0.5, 0.5, 0.2]), torch.tensor([0.3, 0.6, 0.7])):
        there, here = ((each[0] + share * (each[1] - each[0]))[None] for each in (STANDARD_BOX, box))
        expected = NODE_MM * fields.sample_at(motion, fields.resize_points(there, FRAME, NODES))
        found = mm * fields.sample_at(laid(motion, box, spatial), fields.resize_points(here, FRAME, spatial))
        torch.testing.assert_close(found, expected / 2, atol=0.2, rtol=0.02)


def test_the_box_of_an_image_is_that_of_its_vessels():
    labels = torch.zeros(64, 52, 64, dtype=torch.uint8)
    labels[10:50, 5:45, 20:60] = 1
    box = breathing.box_of_vessels(labels)
    torch.testing.assert_close(box, torch.tensor([[41.5, 21.5, 81.5], [197.5, 177.5, 237.5]]), atol=4.0, rtol=0)


# ----------------------------------------------------------------------------------------------- augmentation


def test_a_phantom_goes_along_a_motion_and_back():
    """Both images are the same; the moving one is moved forwards or the fixed one backwards by a known motion."""
    image = lung_pairs(1, spatial=(64, 52, 64)).fixed[0]
    motions = fit_motions({"case": correspondences(depth=30.0)})
    whole = Augmentation(**{**vars(STILL), "motion": 1.0})
    seen = set()
    for seed in range(6):
        [[fixed, moving]] = augment(torch.stack([image, image])[None], whole, [seeded(seed)], motions)
        unmoved = [bool(torch.equal(each, image)) for each in (fixed, moving)]
        assert sum(unmoved) == 1
        seen.add(unmoved[0])
        random = seeded(seed)
        _ = torch.randn((1, 3, 3), generator=random), torch.randn((1, 3, 1), generator=random)  # the affine jitter
        torch.randint(2, (1,), generator=random)
        share = torch.rand(1, generator=random).item()
        forwards = share * fields.resize_field(motions(image, (64, 52, 64), seeded())[None], (64, 52, 64))
        back = fields.warp_labels(moving[None], forwards)[0]  # x in fixed corresponds to x + u(x) in moving
        both, either = ((back > 0) & (fixed > 0)).sum(), (back > 0).sum() + (fixed > 0).sum()
        still = 2 * ((moving > 0) & (fixed > 0)).sum() / ((moving > 0).sum() + (fixed > 0).sum())
        assert 2 * both / either > max(0.75, still)
    assert seen == {True, False}


@pytest.mark.parametrize("spatial", [(40, 36), (24, 20, 22)])
def test_an_inverse_undoes_its_displacement(spatial):
    forth = fields.exponentiate(fields.random_velocity(2, spatial, amplitude=1.0, smoothness=14, generator=seeded()))
    back, inner = fields.invert(forth), (..., *[slice(4, -4)] * len(spatial))
    assert forth[inner].norm(dim=1).max() > 1
    assert fields.compose(back, forth)[inner].abs().max() < 1e-3
    assert fields.compose(forth, back)[inner].abs().max() < 0.2, "all but what interpolating the inverse costs"


# --------------------------------------------------------------------------------------------------- the model


def test_a_model_knows_the_mean_and_what_varies():
    depths = (10.0, 14.0, 18.0, 22.0)
    motions = fit_motions({str(depth): correspondences(depth=depth) for depth in depths})
    model = motion_model(motions.displacement)
    assert len(model.deviations) == 3 and model.deviations[0] > 20 * model.deviations[1]
    torch.testing.assert_close(model.motion(torch.zeros(1)), model.mean)
    lengths = torch.cat([model.draw(seeded(seed)) for seed in range(100)]).norm(dim=1).flatten(1).mean(1)
    known = motions.displacement.norm(dim=1).flatten(1).mean(1)
    assert lengths.mean() == pytest.approx(known.mean().item(), rel=0.1)
    assert lengths.std() == pytest.approx(known.std().item(), rel=0.3)


def test_a_drawn_motion_does_not_fold():
    model = motion_model(fields.random_velocity(5, (20, 18), amplitude=4, smoothness=5, generator=seeded()))
    for seed in range(5):
        assert fields.jacobian_determinant(model.draw(seeded(seed))).min() > 0.1
    smooth = torch.zeros(1, 2, 8, 8)
    assert unfolded(smooth) is smooth


# ------------------------------------------------------------------------------------------------------- files


def test_phantom_motions_are_those_of_other_phantoms():
    motions = breathing.load_motions("phantom3d")
    assert len(motions) == breathing.PHANTOMS and max(motions.residual_mm) < 1.0
    deepest = NODE_MM * motions.displacement.norm(dim=1).flatten(1).amax(1)
    assert 15 < deepest.min() < deepest.max() < 40
    assert not {*motions.cases} & {name[:10] for name in lung_pairs(2, spatial=(64, 52, 64), first_subject=5000).names}


def test_a_folder_without_motions_says_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="holds no motions. Fetch them"):
        read_motions(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "corrfieldTr").mkdir()
    (tmp_path / "corrfieldTr" / "case_001.csv").write_text("1,2,3\n")
    with pytest.raises(DataError, match=r"case_001\.csv must hold six numbers"):
        read_motions(tmp_path)


@real_data
def test_the_real_motions_are_fitted_and_do_not_fold(real_motions):
    assert len(real_motions) == 79
    assert fields.jacobian_determinant(real_motions.displacement).min() > 0.1
    assert sum(real_motions.residual_mm) / 79 < 1.6


@real_data
def test_no_motion_is_that_of_a_held_out_patient(real_motions):
    assert not {*real_motions.cases} & {*case_files(REAL, "validation"), *OFFICIAL_TEST}


def test_the_more_components_the_less_is_left_of_a_left_out_motion():
    from benchmarks.breathing import left_out_residuals

    known = fit_motions({str(depth): correspondences(depth=depth) for depth in (8.0, 12.0, 20.0, 24.0, 30.0)})
    points = 0.5 * correspondences(depth=16.0, seed=1) + 100
    left = left_out_residuals(points, known.displacement)
    assert left["none"] == pytest.approx((points[:, 1] - points[:, 0]).norm(dim=1).mean().item(), rel=1e-4)
    assert left["none"] > left["aligned"] and left["none"] > left["mean"] > left["1"] >= left["2"] >= left["4"]
    assert left["1"] < 0.3, "the depth is all that varies"
