"""Registration: it is inverse consistent by construction and finds known motion, in 2D and 3D."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pairdiff_core import fields, metrics, registration
from pairdiff_core.pairs import PairSet
from pairdiff_core.profiles import CorrelationSettings, Level, UNetSettings, get_profile
from pairdiff_core.registration import (
    Deformation,
    integrate,
    integrate_on,
    optimise,
    refine,
    refine_network,
    registration_loss,
)

GRIDS = [(64, 80), (32, 48, 64)]
ALIKE = 2 * (UNetSettings(2, (4, 8, 8, 8, 8, 4)),)
COARSE_TO_FINE = (UNetSettings(2, (4, 8, 8, 8, 8, 4)), UNetSettings(1, (4, 8, 8, 8, 8, 4)))
CORRELATION = CorrelationSettings(scale=1, control=4, reach=1, features=4, width=8, dilations=(1, 2))


def settings(**changes):
    usual = {"unets": ALIKE, "control": 2, "squarings": 6, "smoothness": 0.05, "merge": False}
    return replace(get_profile("quick").registration, **usual | changes)


def random_velocities(spatial, number=2, seed=0, smoothness=16):
    generator = torch.Generator().manual_seed(seed)
    options = {"amplitude": 1.0, "smoothness": smoothness, "generator": generator}
    return tuple(fields.random_velocity(1, spatial, **options) for _ in range(number))


def zero(spatial, number=1):
    """No velocity, on a grid of one voxel."""
    return (torch.zeros(number, len(spatial), *[1] * len(spatial)),)


def still(*spatial):
    return Deformation(*torch.zeros(2, 1, len(spatial), *spatial))


def ball_maps(spatial, shift):
    """Two nested balls as soft maps (1, 2, *spatial), their centre moved by ``shift`` voxels along axis 0."""
    grid = fields.identity_grid(spatial)
    centre = torch.tensor([size / 2 - 0.5 for size in spatial]).reshape(-1, *[1] * len(spatial))
    centre[0] += shift
    radius = (grid - centre).norm(dim=0)
    size = min(spatial)
    return torch.stack([torch.sigmoid(size / 3 - radius), torch.sigmoid(size / 6 - radius)])[None]


def small_network(dims, trained=True, **changes):
    torch.manual_seed(0)
    network = registration.RegistrationNetwork(settings(**changes), dims, 2)
    if trained:  # anything but the identity of an untrained network
        for step in network.steps:
            last = step.unet.final_conv if isinstance(step, registration.UNetStep) else step.final_conv
            torch.nn.init.normal_(last.weight, std=0.3)
    return network.eval()


def inverse_error(deformation):
    return float(metrics.inverse_consistency_error(deformation.displacement, deformation.inverse).mean())


# ------------------------------------------------------------------------------------------------ deformations


@pytest.mark.parametrize("spatial", GRIDS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_negating_all_velocities_inverts_the_deformation(spatial, number):
    velocities = random_velocities(spatial, number)
    deformation, negated = integrate(velocities), integrate(tuple(-velocity for velocity in velocities))
    torch.testing.assert_close(negated.displacement, deformation.inverse)
    assert inverse_error(deformation) < 0.04 < float(deformation.displacement.norm(dim=1).mean())


def test_plain_composition_would_not_be_inverted_that_way():
    """The symmetric form is needed because exp(v1) o exp(v2) and exp(-v1) o exp(-v2) are not inverses."""
    first, second = random_velocities((32, 40))
    plain = fields.compose(fields.exponentiate(3 * first), fields.exponentiate(3 * second))
    negated = fields.compose(fields.exponentiate(-3 * first), fields.exponentiate(-3 * second))
    assert inverse_error(Deformation(plain, negated)) > 3 * inverse_error(integrate((3 * first, 3 * second)))


IMAGES = [((80, 96), 2), ((96, 80), 4), ((64, 52, 64), 4)]  # voxels, and voxels per node


def rough_velocities(spatial, times, roughest, nodes=4, seed=0):
    """Two velocities whose largest roughness is ``roughest`` voxels of the image."""
    velocities = random_velocities([size // times for size in spatial], seed=seed, smoothness=nodes)
    scale = roughest / float(registration.roughness(velocities, spatial).max())
    return tuple(scale * each for each in velocities)


def round_trip(deformation):
    """The larger mean round-trip error in voxels of what stays in view, and the smallest determinant."""
    both, back = deformation.both, deformation.inverted()
    size = torch.tensor(deformation.spatial).reshape(-1, *[1] * len(deformation.spatial))
    places = fields.identity_grid(deformation.spatial) + both
    inside = ((places >= 0) & (places <= size - 1)).all(1)
    distances = fields.compose(both, back.both).norm(dim=1)
    means = [float(far[here].mean()) for far, here in zip(distances, inside, strict=True)]
    return max(means), min(float(each.jacobian_determinant().min()) for each in (deformation, back))


@pytest.mark.parametrize(("spatial", "times"), IMAGES)
def test_velocities_as_rough_as_a_network_makes_them_are_bounded(spatial, times):
    """The lung network's roughness is up to 21 voxels at 4 voxels per node; integrated unchanged, they fold."""
    rough = rough_velocities(spatial, times, 21)
    far, determinant = round_trip(integrate(rough, 5).resized(spatial))
    assert far > 0.4 or determinant <= 0
    bounded = integrate_on(rough, spatial, 5)
    far, determinant = round_trip(bounded)
    assert far <= 0.1 and determinant > 0
    assert float(bounded.displacement.norm(dim=1).max()) > 4, "it still moves"
    negated = integrate_on(tuple(-each for each in rough), spatial, 5)
    torch.testing.assert_close(negated.displacement, bounded.inverse)


@hypothesis_settings(max_examples=15, deadline=None)
@given(
    image=st.sampled_from([((80, 96), 2), ((96, 80), 4), ((32, 40, 36), 4)]),
    roughest=st.floats(9.01, 60),
    nodes=st.sampled_from([3, 5, 8]),
    seed=st.integers(0, 1000),
)
def test_however_rough_velocities_are_their_deformation_undoes_itself(image, roughest, nodes, seed):
    spatial, times = image
    far, determinant = round_trip(integrate_on(rough_velocities(spatial, times, roughest, nodes, seed), spatial, 5))
    assert far <= 0.1 and determinant > 0


@pytest.mark.parametrize(("spatial", "times"), IMAGES)
def test_smooth_velocities_and_those_beside_rough_ones_stay_as_they_are(spatial, times):
    smooth, rough = rough_velocities(spatial, times, 8.9), rough_velocities(spatial, times, 15, seed=1)
    plain = integrate(smooth, 5).resized(spatial)
    assert torch.equal(integrate_on(smooth, spatial, 5).both, plain.both)
    beside = integrate_on(tuple(torch.cat(each) for each in zip(smooth, rough, strict=True)), spatial, 5)
    torch.testing.assert_close(beside[:1].both, plain.both)
    torch.testing.assert_close(beside[1:].both, integrate_on(rough, spatial, 5).both)


def test_a_deformation_moves_between_grids_and_back():
    deformation = integrate(random_velocities((32, 40)))
    assert deformation.spatial == (32, 40) and len(deformation) == 1
    finer = deformation.resized((64, 80))
    torch.testing.assert_close(finer.displacement.mean(), 2 * deformation.displacement.mean(), rtol=1e-3, atol=1e-4)
    cropped = deformation.cropped((20, 40))
    assert torch.equal(cropped.inverse, deformation.inverse[:, :, :20])
    both = registration.concatenated([deformation, deformation.inverted()])
    assert len(both) == 2 and torch.equal(both[1:].displacement, deformation.inverse)


def test_a_deformation_warps_moving_to_fixed():
    labels = torch.zeros(1, 20, 20, dtype=torch.uint8)
    labels[:, 8:12, 8:12] = 3
    displacement = torch.zeros(1, 2, 20, 20)
    displacement[:, 0] = 2.0
    deformation = Deformation(displacement, -displacement)
    assert torch.equal(deformation.warp_labels(labels.roll(2, 1)), labels)
    maps = labels[:, None].float()
    torch.testing.assert_close(deformation.warp(maps.roll(2, 2)), maps)
    torch.testing.assert_close(deformation.jacobian_determinant(), torch.ones(1, 20, 20))


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("spatial", GRIDS)
@pytest.mark.parametrize("changes", [{}, {"unets": COARSE_TO_FINE}, {"correlation": CORRELATION}])
def test_swapping_the_images_swaps_displacement_and_inverse(spatial, changes):
    network = small_network(len(spatial), **changes)
    fixed, moving = ball_maps(spatial, 0), ball_maps(spatial, 3)
    with torch.no_grad():
        forth, back = network(fixed, moving), network(moving, fixed)
        repeated = network.velocities(fixed, moving, repeats=3), network.velocities(moving, fixed, repeats=3)
    assert float(forth.displacement.abs().max()) > 0.1
    torch.testing.assert_close(forth.displacement, back.inverse, atol=1e-4, rtol=0)
    torch.testing.assert_close(forth.inverse, back.displacement, atol=1e-4, rtol=0)
    assert len(repeated[0]) == len(network.steps) + 2
    for one, other in zip(*repeated, strict=True):
        torch.testing.assert_close(one, -other, rtol=1e-3, atol=1e-3)


def test_each_step_sees_images_at_its_own_scale_and_answers_on_its_own_grid():
    network, seen = small_network(2, unets=COARSE_TO_FINE, correlation=CORRELATION), []
    for step in network.steps:
        step.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
        inner = step.patches if isinstance(step, registration.UNetStep) else step.features
        inner.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    velocities = network.velocities(ball_maps((64, 96), 0), ball_maps((64, 96), 3))
    assert seen[1::2] == [(64, 96), (32, 48), (64, 96)]
    assert [tuple(each.shape[2:]) for each in velocities] == [(16, 24), (32, 48), (32, 48)]
    with pytest.raises(ValueError, match="at least 32 voxels"):
        network.velocities(ball_maps((24, 96), 0), ball_maps((24, 96), 3))
    with pytest.raises(ValueError, match="control must be a multiple of scale, got 1 and 2"):
        small_network(2, control=1)


@pytest.mark.parametrize("spatial", GRIDS)
def test_features_are_most_similar_where_they_moved_to(spatial):
    """Noise that was shifted by one cell is most similar at a distance of one cell."""
    step = registration.CorrelationStep(CORRELATION, len(spatial), 1)
    step.features = step.head = step.final_conv = torch.nn.Identity()
    one = torch.randn(1, 1, *[8] * len(spatial), generator=torch.Generator().manual_seed(1))
    similarities = step.answers(torch.cat([one, one.roll(1, 2)]))[:1, : 3 ** len(spatial)]
    inner = (..., *[slice(2, -2)] * len(spatial))
    shift = (3 ** len(spatial) - 1) // 2 + 3 ** (len(spatial) - 1)  # one cell along axis 0
    normal = one / (one.square() + 1e-3).sqrt()
    torch.testing.assert_close(similarities[:, shift][inner], (normal * normal)[:, 0][inner])
    assert similarities.mean((0, *range(2, similarities.dim()))).argmax() == shift


@pytest.mark.parametrize("spatial", [*GRIDS, (62, 74), (34, 38, 66)])
def test_an_untrained_network_is_the_identity(spatial):
    deformation = small_network(len(spatial), trained=False)(ball_maps(spatial, 0), ball_maps(spatial, 3))
    assert deformation.spatial == tuple(size // 2 for size in spatial)
    assert not deformation.both.any()
    moved = small_network(len(spatial))(ball_maps(spatial, 0), ball_maps(spatial, 3))
    assert moved.both.any() and moved.both.isfinite().all()


@pytest.mark.parametrize("spatial", GRIDS)
def test_training_brings_images_closer_and_repeated_steps_those_that_are_farther_apart(spatial):
    network = small_network(len(spatial), trained=False).train()
    labels = torch.cat([ball_maps(spatial, shift) for shift in (0, 2)]).round().sum(1).byte()[None]
    adam, losses = torch.optim.Adam(network.parameters(), 1e-2), []
    for _ in range(12):
        terms = registration.training_loss(network, labels, 3, settings())
        adam.zero_grad()
        terms["loss"].backward()
        adam.step()
        losses.append(terms["dissimilarity"].item())
    assert losses[-1] < 0.7 * losses[0]
    fixed, moving = ball_maps(spatial, 0), ball_maps(spatial, 5)
    with torch.no_grad():
        once, often = (network.velocities(fixed, moving, repeats) for repeats in (1, 4))
        misfit = [(integrate(each, 6).resized(spatial).warp(moving) - fixed).abs().mean() for each in (once, often)]
    assert len(often) == 5 and all(map(torch.equal, once, often))
    assert misfit[1] < 0.9 * misfit[0]


# ----------------------------------------------------------------------------------------------------- losses


def test_pooling_gives_the_share_of_each_structure():
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, :2, :1] = 2
    assert registration.label_maps(labels, 3, scale=2)[0].tolist() == [[[0, 0], [0, 0]], [[0.5, 0], [0, 0]]]
    maps = registration.label_maps(labels, 3)
    assert torch.equal(registration.pool(maps, 2), registration.label_maps(labels, 3, scale=2))


def test_squared_gradient_of_a_ramp():
    ramp = 0.5 * fields.identity_grid((8, 8))[None]  # du0/dx0 = du1/dx1 = 0.5, mean over the two channels
    assert float(registration.squared_gradient(ramp)) == pytest.approx(0.25)


@pytest.mark.parametrize("dims", [2, 3])
def test_bending_energy_is_zero_for_an_affine_map_and_that_of_a_parabola(dims):
    x = fields.identity_grid([8] * dims)[None]  # (1, D, *spatial)
    assert float(registration.bending_energy(0.3 * x + 2 * x.flip(1) + 1)) == pytest.approx(0, abs=1e-6)
    parabola = torch.zeros_like(x)
    parabola[:, 0] = 0.5 * x[:, 0] ** 2  # d2u0/dx0dx0 = 1, all else 0; mean over D channels
    assert float(registration.bending_energy(parabola)) == pytest.approx(1 / dims)
    saddle = torch.zeros_like(x)
    saddle[:, 0] = x[:, 0] * x[:, 1]  # two mixed derivatives of 1
    assert float(registration.bending_energy(saddle)) == pytest.approx(2 / dims)


def test_the_loss_is_zero_only_for_a_perfect_and_smooth_match():
    maps = ball_maps((16, 16), 0)
    assert float(registration_loss(still(16, 16), maps, maps, 0.5).total) == 0
    shifted = registration_loss(still(16, 16), maps, ball_maps((16, 16), 2), 0.5)
    assert float(shifted.dissimilarity) > 0 and float(shifted.roughness) == 0


def test_coarser_scales_see_a_thin_structure_that_is_far_off():
    """A line 12 voxels away does not overlap; only the coarser scales notice when it comes closer."""

    def loss(offset, scales):
        fixed, moving = torch.zeros(2, 1, 1, 32, 32)
        fixed[..., 8, :], moving[..., 8 + offset, :] = 1, 1
        return float(registration_loss(still(32, 32), fixed, moving, 0.5, scales=scales).total)

    assert loss(12, 1) == loss(6, 1) == pytest.approx(2 / 32)
    assert loss(12, 4) > loss(6, 4) > loss(2, 4)
    assert loss(0, 4) == 0


# ------------------------------------------------------------------------------------------------ optimisation


@pytest.mark.parametrize("spatial", GRIDS)
def test_optimisation_finds_a_known_shift(spatial):
    fixed, moving = ball_maps(spatial, 0), ball_maps(spatial, 3)
    levels = [Level(scale, 2, 30, 0.2) for scale in (4, 2)]
    deformation = integrate(refine(fixed, moving, zero(spatial), levels, settings()), 6).resized(spatial)
    inside = fixed[0, 1] > 0.5
    shift = deformation.displacement[0, 0][inside].mean()
    assert float(shift) == pytest.approx(3.0, abs=0.5), "fixed x lies at x + 3 in moving: u is +3, not -3"
    assert float(metrics.folding_percent(deformation.displacement)) == 0
    assert inverse_error(deformation) < 0.1


def test_images_of_a_batch_do_not_influence_each_other():
    spatial, levels = (32, 40), [Level(2, 2, 10, 0.2)]
    fixed = torch.cat([ball_maps(spatial, 0), ball_maps(spatial, 1)])
    moving = torch.cat([ball_maps(spatial, 3), ball_maps(spatial, -1)])
    (together,) = refine(fixed, moving, zero(spatial, 2), levels, settings())
    (alone,) = refine(fixed[:1], moving[:1], zero(spatial), levels, settings())
    torch.testing.assert_close(together[:1], alone, atol=2e-3, rtol=0)


def test_a_level_may_weigh_the_bending():
    fixed, moving = ball_maps((32, 40), 0), ball_maps((32, 40), 3)
    energies = []
    for bending in (2.0, 0.0):
        found = optimise(fixed, moving, zero((32, 40)), Level(2, 1, 30, 0.2, bending), smoothness=0.0)
        energies.append(float(registration.bending_energy(integrate(found).displacement)))
    assert energies[0] < 0.5 * energies[1]


def two_balls(spatial, middle):
    """A map of two small balls, (1, 1, *spatial), on opposite sides of the image."""
    grid = fields.identity_grid(spatial)
    opposite = [size - 1 - x for size, x in zip(spatial, middle, strict=True)]
    near = [(grid - torch.tensor(x).reshape(-1, *[1] * len(spatial))).norm(dim=0) < 3 for x in (middle, opposite)]
    return (near[0] | near[1]).float()[None, None]


@pytest.mark.parametrize(("spatial", "middle"), [((48, 40), [12.0, 9.0]), ((32, 28, 36), [9.0, 8.0, 9.0])])
def test_comparing_only_voxels_near_a_structure_loses_nothing(spatial, middle):
    fixed, moving = two_balls(spatial, middle), two_balls(spatial, [x + 2 for x in middle])
    generator = torch.Generator().manual_seed(0)
    velocity = fields.random_velocity(1, [s // 2 for s in spatial], amplitude=0.5, smoothness=8, generator=generator)
    deformation = integrate((velocity,))
    voxels = registration.voxels_near(deformation, fixed, moving)
    assert len(voxels) < 0.3 * fixed.numel()
    some, everything = (registration_loss(deformation, fixed, moving, 0.1, each) for each in (voxels, None))
    for one, other in zip(some, everything, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    full = torch.ones(1, 1, *spatial)
    assert registration.voxels_near(still(*spatial), full, full) is None, "here it would not pay"


def test_where_a_structure_is_warped_to_is_near():
    """This also holds where both images are empty: a warped structure there adds to the loss and has to move."""
    fixed = moving = two_balls((64, 64), [14.0, 14.0])
    aside = torch.stack([torch.zeros(64, 64), torch.full((64, 64), 18.0)])[None]
    warped = fields.warp(moving, aside)
    assert float((warped * fixed).sum()) == 0 < float(warped.sum())
    voxels = registration.voxels_near(Deformation(aside, -aside), fixed, moving)
    near = torch.zeros(64, 64)
    near[tuple(voxels.T)] = 1
    assert bool((near[warped[0, 0] > 0] == 1).all())


def test_large_images_are_compared_near_structures_only_and_move_alike(monkeypatch):
    """They move further than the margin around structures, which therefore have to be found again."""
    fixed, moving = two_balls((64, 64), [14.0, 14.0]), two_balls((64, 64), [18.0, 19.0])
    level = Level(scale=1, control=4, steps=40, learning_rate=0.2)

    def found(only_near=None):
        velocities = optimise(fixed, moving, zero((64, 64)), level, smoothness=0.01, only_near=only_near)
        return integrate(velocities).resized((64, 64)).displacement

    near, everywhere = found(True), found(False)
    inside = fixed[0, 0] > 0
    assert float(everywhere[0, :, inside].norm(dim=0).mean()) > 4
    assert float((near - everywhere)[0, :, inside].norm(dim=0).mean()) < 0.25
    for large, expected in ((64 * 64, near), (64 * 64 + 1, everywhere)):
        monkeypatch.setitem(optimise.__globals__, "LARGE", large)
        assert torch.equal(found(), expected)


LEVELS = [Level(2, 2, 40, 0.2), Level(2, 2, 20, 0.1, bending=0.1)]


def test_a_merged_start_is_optimised_as_one_velocity():
    """Several velocities are replaced by their sum, which moves nearly the same and can be optimised as a whole."""
    spatial, merge = (32, 64), settings(merge=True, instance=tuple(LEVELS), baseline=tuple(LEVELS))
    network, (fixed, moving) = small_network(2), (ball_maps(spatial, 0), ball_maps(spatial, 3))
    with torch.no_grad():
        velocities = network.velocities(fixed, moving, 2)
    outer = refine_network(fixed, moving, velocities, replace(merge, merge=False))
    assert len(outer) == 3 and all(map(torch.equal, outer[:2], velocities[:2])), "without merging, the last one only"
    (one,) = refine_network(fixed, moving, velocities, merge)
    deformation = integrate((one,), 6).resized(spatial)
    assert inverse_error(deformation) < 0.1
    losses = [float(registration_loss(each, fixed, moving, 0.05).total) for each in (deformation, still(*spatial))]
    assert losses[0] < 0.5 * losses[1]
    assert refine_network(fixed, moving, velocities, replace(merge, instance=())) == velocities


def test_a_start_that_brings_a_pair_no_closer_is_not_used():
    """The start of the first pair is near the truth and helps; that of the second is far off."""
    fixed = torch.cat([ball_maps((64, 40), 0)] * 2)
    moving = torch.cat([ball_maps((64, 40), 20), ball_maps((64, 40), 1)])
    start = torch.zeros(2, 2, 16, 10)  # in voxels of a grid four times as coarse
    start[0, 0], start[1, 0] = 5.0, -6.0
    usual = settings(optimiser_smoothness=0.01, instance=tuple(LEVELS[:1]), baseline=tuple(LEVELS), merge=True)
    assert registration.brings_closer(fixed, moving, start, usual).tolist() == [True, False]
    (found,) = refine_network(fixed, moving, (start / 2, start / 2), usual)
    (from_start,) = refine(fixed[:1], moving[:1], (start[:1],), usual.instance, usual)
    (from_zero,) = refine(fixed[1:], moving[1:], (0 * start[1:],), usual.baseline, usual)
    assert torch.equal(found, torch.cat([from_start, from_zero]))


# ------------------------------------------------------------------------------------------- whole sets of pairs


@pytest.fixture(scope="module")
def pairs():
    """Three pairs of different motion on a grid whose size no pooling factor divides."""
    maps = torch.cat([ball_maps((49, 75), shift) for shift in (0, 3, 0, -2, 1, 0)])
    labels = maps.round().sum(1).byte().unflatten(0, (3, 2))  # nested, so that their sum is a label map
    return PairSet(labels, ("background", "shell", "core"), (1.0, 1.0), ("a~b", "c~d", "e~f"))


def test_the_optimiser_has_a_smoothness_and_a_blur_of_its_own():
    fixed, moving, level = ball_maps((32, 40), 0), ball_maps((32, 40), 3), Level(1, 1, 20, 0.2)
    found = {
        name: refine(fixed, moving, zero((32, 40)), [level], settings(**changes))[0]
        for name, changes in {
            "as in training": {"smoothness": 0.5},
            "its own": {"smoothness": 9.0, "optimiser_smoothness": 0.5},
            "blurred": {"smoothness": 0.5, "blur": 3.0},
            "rougher": {"smoothness": 0.5, "optimiser_smoothness": 0.0},
        }.items()
    }
    as_in_training, own, blurred, rougher = found.values()
    assert torch.equal(as_in_training, own) and not torch.allclose(as_in_training, blurred, atol=0.01)
    assert registration.squared_gradient(rougher) > 1.1 * registration.squared_gradient(own)


PROFILE = replace(
    get_profile("quick"),
    spatial=(48, 80),
    num_labels=3,
    registration=settings(instance=(Level(2, 1, 5, 0.2),), baseline=(Level(4, 1, 20, 0.2), Level(2, 1, 20, 0.2))),
)


@pytest.mark.parametrize("by_network", [True, False])
def test_sets_are_registered_in_parts_and_back_on_their_grid(pairs, by_network, monkeypatch):
    network = small_network(2) if by_network else None
    together = registration.register(pairs, PROFILE, network)
    monkeypatch.setitem(registration.register.__globals__, "VOXELS_AT_ONCE", 2 * 49 * 75)  # two and one
    in_parts = registration.register(pairs, PROFILE, network)
    assert together.displacement.shape == together.inverse.shape == (3, 2, 49, 75)
    torch.testing.assert_close(in_parts.displacement, together.displacement, atol=5e-3, rtol=0)


def test_without_a_network_it_is_the_baseline_from_the_identity(pairs):
    found = registration.register(pairs, PROFILE)
    before, after = (
        metrics.dice(image, pairs.fixed, 3).mean() for image in (pairs.moving, found.warp_labels(pairs.moving))
    )
    assert after > 0.95 > before
    assert inverse_error(found) < 0.1
    swapped = registration.register(pairs.swapped(), PROFILE)
    torch.testing.assert_close(swapped.displacement, found.inverse, atol=0.02, rtol=0)


def test_instance_optimisation_improves_the_answer_of_a_network(pairs):
    network = small_network(2, trained=False)
    alone = registration.register(pairs, PROFILE, network, instance=False)
    assert not alone.both.any()
    better = registration.register(pairs, PROFILE, network)
    dice = [metrics.dice(each.warp_labels(pairs.moving), pairs.fixed, 3).mean() for each in (alone, better)]
    assert dice[1] > dice[0] + 0.02
