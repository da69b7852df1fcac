"""Registration: inverse consistency by construction, and that it finds known motion, in 2D and 3D."""

import pytest
import torch

from pairdiff_core import fields, metrics, registration
from pairdiff_core.profiles import Level

GRIDS = [(64, 80), (32, 48, 64)]


def random_velocities(spatial, number=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        fields.random_velocity(1, spatial, amplitude=1.0, smoothness=16, generator=generator)
        for _ in range(number)
    )


def ball_maps(spatial, shift):
    """Two nested balls as soft maps (1, 2, *spatial), their centre moved by ``shift`` voxels along axis 0."""
    grid = fields.identity_grid(spatial)
    centre = torch.tensor([size / 2 - 0.5 for size in spatial]).reshape(-1, *[1] * len(spatial))
    centre[0] += shift
    radius = (grid - centre).norm(dim=0)
    size = min(spatial)
    return torch.stack([torch.sigmoid(size / 3 - radius), torch.sigmoid(size / 6 - radius)])[None]


def small_network(spatial, scale=2, trained=True, **options):
    torch.manual_seed(0)
    network = registration.TwoStepNetwork(len(spatial), 2, (4, 8, 8, 8, 8, 4), scale, squarings=6, **options)
    if trained:  # anything but the identity it starts as
        for step in network.steps:
            torch.nn.init.normal_(step.final_conv.weight, std=0.3)
    return network.eval()


@pytest.mark.parametrize("spatial", GRIDS)
@pytest.mark.parametrize("number", [1, 2])
def test_negating_all_velocities_inverts_the_deformation(spatial, number):
    deformation = registration.integrate(random_velocities(spatial, number))
    error = metrics.inverse_consistency_error(*deformation)
    assert float(error) < 0.03 < float(deformation.displacement.norm(dim=1).mean())


def test_plain_composition_would_not_be_inverted_that_way():
    """Why the symmetric form is needed: exp(v1) o exp(v2) and exp(-v1) o exp(-v2) are not inverse to each other."""
    first, second = random_velocities((32, 40))
    plain = fields.compose(fields.exponentiate(3 * first), fields.exponentiate(3 * second))
    negated = fields.compose(fields.exponentiate(-3 * first), fields.exponentiate(-3 * second))
    symmetric = registration.integrate((3 * first, 3 * second))
    error = metrics.inverse_consistency_error(plain, negated)
    assert float(error) > 3 * float(metrics.inverse_consistency_error(*symmetric))


@pytest.mark.parametrize("spatial", GRIDS)
@pytest.mark.parametrize("options", [{}, {"scale": 1, "control": 2, "coarser": 2}])
def test_swapping_the_images_swaps_displacement_and_inverse(spatial, options):
    network = small_network(spatial, **options)
    fixed, moving = ball_maps(spatial, 0), ball_maps(spatial, 3)
    with torch.no_grad():
        forth, back = network(fixed, moving), network(moving, fixed)
    assert float(forth.displacement.abs().max()) > 0.1
    torch.testing.assert_close(forth.displacement, back.inverse, atol=1e-4, rtol=0)
    torch.testing.assert_close(forth.inverse, back.displacement, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spatial", GRIDS)
def test_the_second_step_may_be_repeated_from_where_the_last_one_led(spatial):
    network = small_network(spatial)
    fixed, moving = ball_maps(spatial, 0), ball_maps(spatial, 3)
    with torch.no_grad():
        there, back = (
            network.velocities(*images, repeats=3) for images in ((fixed, moving), (moving, fixed))
        )
        once = network.velocities(fixed, moving)
    assert len(there) == 4 and len(once) == 2
    for one, other in zip(once, there, strict=False):
        assert torch.equal(one, other)
    for one, other in zip(there, back, strict=True):  # swapping the images still swaps the signs
        torch.testing.assert_close(one, -other, rtol=1e-3, atol=1e-3)
    halves = [registration.integrate((velocity / 2,), 6) for velocity in there[:2]]
    images = registration.pool(fixed, 2), registration.pool(moving, 2)
    for half in halves:
        images = fields.warp(images[0], half.inverse), fields.warp(images[1], half.displacement)
    with torch.no_grad():
        third = network._velocity(network.steps[1], *images)
    torch.testing.assert_close(there[2], third)


def test_the_first_step_sees_coarser_images_and_answers_on_the_same_grid():
    network, seen = small_network((64, 96), scale=1, control=2, coarser=2), []
    for step in network.steps:
        step.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    first, second = network.velocities(ball_maps((64, 96), 0), ball_maps((64, 96), 3))
    assert seen == [(32, 48), (64, 96)]
    assert first.shape == second.shape == (1, 2, 32, 48)
    with pytest.raises(ValueError, match="at least 32 voxels"):
        network.velocities(ball_maps((24, 96), 0), ball_maps((24, 96), 3))
    with pytest.raises(ValueError, match="coarser must divide control, got coarser 2 and control 1"):
        small_network((64, 96), coarser=2)


@pytest.mark.parametrize("spatial", GRIDS)
def test_an_untrained_network_is_the_identity(spatial):
    network = small_network(spatial, trained=False)
    deformation = registration.register(network, ball_maps(spatial, 0), ball_maps(spatial, 3))
    assert deformation.displacement.shape == (1, len(spatial), *spatial)
    assert torch.all(deformation.displacement == 0)


@pytest.mark.parametrize("spatial", GRIDS)
def test_the_multilevel_baseline_finds_a_known_shift(spatial):
    fixed, moving = ball_maps(spatial, 0), ball_maps(spatial, 3)
    levels = [Level(scale, 2, 30, 0.2) for scale in (4, 2)]
    deformation = registration.register_multilevel(fixed, moving, levels, smoothness=0.05)
    inside = fixed[0, 1] > 0.5
    shift = deformation.displacement[0, 0][inside].mean()
    assert float(shift) == pytest.approx(3.0, abs=0.5), "fixed x lies at x + 3 in moving: u is +3, not -3"
    assert float(metrics.folding_percent(deformation.displacement)) == 0
    assert float(metrics.inverse_consistency_error(*deformation)) < 0.1


@pytest.mark.parametrize("spatial", GRIDS)
def test_instance_optimisation_improves_on_its_start_and_keeps_the_inverse(spatial):
    network = small_network(spatial, trained=False)
    fixed, moving = ball_maps(spatial, 0), ball_maps(spatial, 2)
    before = registration.register(network, fixed, moving)
    after = registration.register(network, fixed, moving, [Level(2, 2, 30, 0.2)], smoothness=0.05)

    def misfit(deformation):
        return (fields.warp(moving, deformation.displacement) - fixed).abs().mean()

    assert misfit(after) < 0.5 * misfit(before)
    assert float(metrics.inverse_consistency_error(*after)) < 0.1


def test_images_of_a_batch_do_not_influence_each_other():
    spatial = (32, 40)
    fixed = torch.cat([ball_maps(spatial, 0), ball_maps(spatial, 1)])
    moving = torch.cat([ball_maps(spatial, 3), ball_maps(spatial, -1)])
    levels = [Level(2, 2, 10, 0.2)]
    together = registration.register_multilevel(fixed, moving, levels, smoothness=0.05)
    alone = registration.register_multilevel(fixed[:1], moving[:1], levels, smoothness=0.05)
    torch.testing.assert_close(together.displacement[:1], alone.displacement, atol=2e-3, rtol=0)


def test_pooling_gives_the_share_of_each_structure():
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, :2, :1] = 1
    assert registration.pool(maps, 2)[0, 0].tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert registration.pool(maps, 1) is maps


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


def test_a_level_may_weigh_the_bending():
    fixed, moving = ball_maps((32, 40), 0), ball_maps((32, 40), 3)
    stiff, soft = (
        registration.register_multilevel(fixed, moving, [Level(2, 1, 30, 0.2, bending)], smoothness=0.0)
        for bending in (2.0, 0.0)
    )
    energies = [float(registration.bending_energy(each.displacement)) for each in (stiff, soft)]
    assert energies[0] < 0.5 * energies[1]


def test_the_loss_is_zero_only_for_a_perfect_and_smooth_match():
    maps = ball_maps((16, 16), 0)
    still = registration.Deformation(torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16))
    assert float(registration.registration_loss(still, maps, maps, 0.5).total) == 0
    shifted = registration.registration_loss(still, maps, ball_maps((16, 16), 2), 0.5)
    assert float(shifted.dissimilarity) > 0 and float(shifted.roughness) == 0


def test_coarser_scales_tell_of_a_thin_structure_that_is_far_off():
    """A line 12 voxels away overlaps with nothing; when it comes nearer, only the coarser views see it."""

    def loss(offset, scales):
        fixed, moving = torch.zeros(2, 1, 1, 32, 32)
        fixed[..., 8, :], moving[..., 8 + offset, :] = 1, 1
        still = registration.Deformation(*torch.zeros(2, 1, 2, 32, 32))
        return float(registration.registration_loss(still, fixed, moving, 0.5, scales=scales).total)

    assert loss(12, 1) == loss(6, 1) == pytest.approx(2 / 32)
    assert loss(12, 4) > loss(6, 4) > loss(2, 4)
    assert loss(0, 4) == 0


@pytest.mark.parametrize("spatial", GRIDS)
def test_training_brings_images_closer(spatial):
    network = small_network(spatial, trained=False).train()
    fixed, moving = ball_maps(spatial, 0), ball_maps(spatial, 2)
    pooled = registration.pool(fixed, 2), registration.pool(moving, 2)
    adam, losses = torch.optim.Adam(network.parameters(), 5e-3), []
    for _ in range(25):
        loss = registration.registration_loss(network(fixed, moving), *pooled, smoothness=0.05)
        adam.zero_grad()
        loss.total.backward()
        adam.step()
        losses.append(float(loss.dissimilarity))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("spatial", [(62, 74), (34, 38, 66)])
def test_odd_sizes_are_registered_too(spatial):
    deformation = registration.register(small_network(spatial), ball_maps(spatial, 0), ball_maps(spatial, 1))
    assert deformation.displacement.shape == (1, len(spatial), *spatial)
    assert torch.isfinite(deformation.displacement).all()


def test_images_too_small_for_the_network_are_refused():
    with pytest.raises(ValueError, match="at least 32 voxels a side"):
        small_network((24, 40))(ball_maps((24, 40), 0), ball_maps((24, 40), 1))


def two_balls(spatial, middle):
    """A map of two balls, (1, 1, *spatial), the second one opposite to the first; little of the image is filled."""
    places = fields.identity_grid(spatial)
    opposite = [size - 1 - x for size, x in zip(spatial, middle, strict=True)]
    near = [
        (places - torch.tensor(x).reshape(-1, *[1] * len(spatial))).norm(dim=0) < 3
        for x in (middle, opposite)
    ]
    return (near[0] | near[1]).float()[None, None]


@pytest.mark.parametrize(("spatial", "middle"), [((48, 40), [12.0, 9.0]), ((32, 28, 36), [9.0, 8.0, 9.0])])
def test_looking_at_the_voxels_in_play_alone_loses_nothing(spatial, middle):
    fixed, moving = two_balls(spatial, middle), two_balls(spatial, [x + 2 for x in middle])
    velocity = fields.random_velocity(
        1, [s // 2 for s in spatial], amplitude=0.5, smoothness=8, generator=torch.Generator().manual_seed(0)
    )
    deformation = registration.integrate((velocity,))
    voxels = registration.voxels_in_play(deformation, fixed, moving)
    assert len(voxels) < 0.3 * fixed.numel()
    some, everything = (
        registration.registration_loss(deformation, fixed, moving, 0.1, v) for v in (voxels, None)
    )
    for a, b in zip(some, everything, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_where_most_of_an_image_is_in_play_all_of_it_is_looked_at():
    full, still = torch.ones(1, 1, 16, 16), torch.zeros(1, 2, 16, 16)
    assert registration.voxels_in_play(registration.Deformation(still, still), full, full) is None


def test_where_a_structure_is_warped_to_is_in_play():
    """Also where neither image shows anything: there a warped structure costs, and has to go on or back."""
    fixed = moving = two_balls((64, 64), [14.0, 14.0])
    aside = torch.stack([torch.zeros(64, 64), torch.full((64, 64), 18.0)])[None]
    warped = fields.warp(moving, aside)
    assert float((warped * fixed).sum()) == 0 < float(warped.sum())
    voxels = registration.voxels_in_play(registration.Deformation(aside, -aside), fixed, moving)
    in_play = torch.zeros(64, 64)
    in_play[tuple(voxels.T)] = 1
    assert bool((in_play[warped[0, 0] > 0] == 1).all())


@pytest.mark.parametrize(("large", "looks"), [(0, 3), (64 * 64, 3), (64 * 64 + 1, 0)])
def test_large_images_are_looked_at_again_as_they_move(monkeypatch, large, looks):
    seen, look = [], registration.voxels_in_play
    monkeypatch.setattr(registration, "LARGE", large)
    monkeypatch.setattr(registration, "voxels_in_play", lambda *all_: seen.append(1) or look(*all_))
    fixed, moving = two_balls((64, 64), [14.0, 14.0]), two_balls((64, 64), [16.0, 17.0])
    level = Level(scale=1, control=4, steps=2 * registration.LOOK_AGAIN + 1, learning_rate=0.1)
    registration.optimise(fixed, moving, (torch.zeros(1, 2, 16, 16),), level, smoothness=0.01)
    assert len(seen) == looks


def test_several_velocities_become_one_that_moves_nearly_alike():
    random = torch.Generator().manual_seed(0)
    small = fields.random_velocity(2, (40, 48), amplitude=1.0, smoothness=16, generator=random)
    velocities = (small[:1], small[1:])
    (one,) = registration.merged(velocities)
    both, single = (registration.integrate(each).displacement for each in (velocities, (one,)))
    assert (both - single).norm(dim=1).mean() < 0.1 * both.norm(dim=1).mean()


LEVELS = [Level(2, 2, 40, 0.2), Level(2, 2, 20, 0.1, bending=0.1)]


def test_a_merged_start_is_optimised_as_one_velocity():
    spatial = (32, 64)
    network, (fixed, moving) = small_network(spatial), (ball_maps(spatial, 0), ball_maps(spatial, 3))
    found = registration.register(network, fixed, moving, LEVELS, smoothness=0.05, repeats=2, merge=True)
    with torch.no_grad():
        velocities = network.velocities(fixed, moving, 2)
    one = registration.refine_merged(
        fixed, moving, velocities, LEVELS, smoothness=0.05, squarings=network.squarings
    )
    assert len(one) == 1
    expected = registration.integrate(one, network.squarings).resized(spatial)
    torch.testing.assert_close(found.displacement, expected.displacement)
    assert float(metrics.inverse_consistency_error(*found)) < 0.1


def test_of_each_pair_the_better_start_is_taken():
    """The first pair is helped by its start, which is near the truth; the second is not, its start is far off."""
    fixed = torch.cat([ball_maps((64, 40), 0)] * 2)
    moving = torch.cat([ball_maps((64, 40), 20), ball_maps((64, 40), 1)])
    start = torch.zeros(2, 2, 16, 10)  # in voxels of a grid four times as coarse
    start[0, 0], start[1, 0] = 5.0, -6.0
    options = {"smoothness": 0.01, "squarings": 6}
    (found,) = registration.refine_merged(fixed, moving, (start,), LEVELS[:1], **options)
    (from_start,), (from_nothing,) = (
        registration.refine(fixed, moving, (each,), LEVELS[:1], **options)
        for each in (start, torch.zeros_like(start))
    )
    torch.testing.assert_close(found[0], from_start[0])
    torch.testing.assert_close(found[1], from_nothing[1])
    assert not torch.allclose(from_start[0], from_nothing[0], atol=0.1)
