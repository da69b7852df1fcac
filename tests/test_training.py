"""The training loop and its batches: seeded, complete, and honest about failure."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pairdiff_core import training
from pairdiff_core.profiles import Augmentation

STILL = Augmentation(affine=0.0, common=0.0, own=0.0, smoothness=8.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_index_comes_once_a_round_in_a_new_order():
    batches = list(itertools.islice(training.shuffled(10, 4, seeded()), 5))
    flat = torch.cat(batches)
    assert sorted(flat[:10].tolist()) == list(range(10)) == sorted(flat[10:].tolist())
    assert flat[:10].tolist() != flat[10:].tolist()


def test_a_batch_may_be_larger_than_the_set():
    batch = next(training.shuffled(3, 7, seeded()))
    assert torch.bincount(batch).min() >= 2


@pytest.mark.parametrize("spatial", [(32, 40), (16, 16, 20)])
def test_augmentation_is_seeded_and_moves_labels_only(spatial):
    labels = torch.zeros(2, 2, *spatial, dtype=torch.uint8)
    labels[(..., *[slice(5, 11)] * len(spatial))] = 3
    numbers = Augmentation(affine=0.05, common=1.0, own=0.5, smoothness=8)
    one, again = (training.augment(labels, numbers, seeded(1)) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, training.augment(labels, numbers, seeded(2)))
    assert one.shape == labels.shape and one.dtype == torch.uint8 and set(one.unique().tolist()) == {0, 3}
    assert not torch.equal(one[0], one[1]), "each pair has its own warp"


def test_without_amplitude_nothing_moves():
    labels = torch.randint(0, 4, (2, 2, 16, 20), dtype=torch.uint8)
    assert torch.equal(training.augment(labels, STILL, seeded()), labels)


def test_a_common_warp_keeps_equal_images_equal_and_an_own_warp_does_not():
    image = torch.randint(0, 4, (1, 1, 32, 32), dtype=torch.uint8).repeat(1, 2, 1, 1)
    common = training.augment(image, replace(STILL, common=2.0, affine=0.1), seeded())
    assert torch.equal(common[:, 0], common[:, 1]) and not torch.equal(common, image)
    own = training.augment(image, replace(STILL, own=2.0), seeded())
    assert not torch.equal(own[:, 0], own[:, 1])


def test_flows_on_a_coarser_grid_are_as_large_and_as_smooth():
    """In voxels of the images, not of the grid that they were integrated on."""

    def flow(coarser):
        numbers = Augmentation(affine=0.0, common=2.0, own=0.0, smoothness=24, coarser=coarser)
        return training._random_flow(20, (64, 96), 2.0, numbers, seeded())

    fine, coarse = flow(None), flow(4)
    assert coarse.shape == fine.shape
    assert float(coarse.std() / fine.std()) == pytest.approx(1, abs=0.1)
    assert float(coarse.diff(dim=3).std() / fine.diff(dim=3).std()) == pytest.approx(1, abs=0.15)


def line_fit(steps=200, **changes):
    """Fit y = 2 x + 1 from seeded batches."""
    torch.manual_seed(0)
    model, generator = nn.Linear(1, 1), seeded()

    def batches():
        while True:
            yield torch.rand(16, 1, generator=generator)

    def loss(module, x):
        return {"loss": (module(x) - (2 * x + 1)).square().mean(), "constant": torch.tensor(3.0)}

    history = training.fit(model, batches(), loss, steps=steps, learning_rate=0.1, log_every=50, **changes)
    return model, history


def test_it_learns_and_logs():
    model, history = line_fit()
    assert float(model.weight) == pytest.approx(2, abs=0.05) and float(model.bias) == pytest.approx(
        1, abs=0.05
    )
    assert [entry["step"] for entry in history] == [50, 100, 150, 200]
    assert history[-1]["loss"] < 0.01 * history[0]["loss"]
    assert all(entry["constant"] == pytest.approx(3.0) for entry in history)
    assert not model.training


def test_the_last_log_entry_averages_only_its_own_steps():
    _, history = line_fit(steps=60)
    assert [entry["step"] for entry in history] == [50, 60]
    assert history[-1]["constant"] == pytest.approx(3.0)


def test_the_same_seed_gives_the_same_weights():
    assert torch.equal(line_fit(30)[0].weight, line_fit(30)[0].weight)


def test_the_average_of_the_weights_replaces_them():
    plain, averaged = line_fit(100)[0], line_fit(100, average=0.9)[0]
    assert not torch.equal(plain.weight, averaged.weight)
    assert float(averaged.weight) == pytest.approx(float(plain.weight), abs=0.2)


def test_a_loss_that_is_not_finite_stops_the_run():
    model = nn.Linear(1, 1)
    before = model.weight.clone()
    with pytest.raises(FloatingPointError, match="step 1; lower the learning rate"):
        training.fit(
            model,
            itertools.repeat(torch.full((1, 1), torch.nan)),
            lambda module, x: {"loss": module(x).sum()},
            steps=3,
            learning_rate=0.1,
        )
    assert torch.equal(model.weight, before)


def test_the_learning_rate_rises_then_falls_to_zero():
    shares = [training._warm_up_and_cosine(step, 100) for step in range(101)]
    assert shares[0] == pytest.approx(0.2) and max(shares) == 1.0 and shares.index(1.0) in (4, 5)
    assert shares[-1] == pytest.approx(0, abs=1e-9)
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares[5:]))


@pytest.mark.parametrize("spatial, size", [((9, 8), (4, 8)), ((6, 5, 7), (6, 2, 3))])
def test_patches_are_pieces_of_their_pair_from_all_over_it(spatial, size):
    whole = torch.arange(2 * 2 * math.prod(spatial)).reshape(2, 2, *spatial)
    generator = torch.Generator().manual_seed(0)
    pieces = list(training.patches(iter([whole]), size, 200, generator))
    assert len(pieces) == 200 and all(piece.shape == (2, 2, *size) for piece in pieces)
    steps = torch.tensor([math.prod(spatial[axis + 1 :]) for axis in range(len(spatial))])
    corner = pieces[0].flatten(2)[:, :, 0]
    for axis, step in enumerate(steps.tolist()):  # neighbours in the piece are neighbours in the whole
        assert torch.equal(pieces[0].diff(dim=axis + 2), torch.full_like(pieces[0].diff(dim=axis + 2), step))
    assert torch.equal(corner[:, 1] - corner[:, 0], torch.full((2,), math.prod(spatial)))
    assert torch.cat([piece.flatten() for piece in pieces]).unique().numel() == whole.numel()
