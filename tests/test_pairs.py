"""PairSet: what it accepts, and that labels, landmarks and displacement stay consistent."""

import json

import pytest
import torch

from pairdiff_core import fields
from pairdiff_core.errors import DataError
from pairdiff_core.pairs import PairSet, one_hot, pack_labels, resize_labels, unpack_labels


def example(spatial=(8, 12), number=3, **changes):
    generator = torch.Generator().manual_seed(0)
    dims = len(spatial)
    values = {
        "labels": torch.randint(0, 3, (number, 2, *spatial), generator=generator, dtype=torch.uint8),
        "label_names": ("background", "inner", "outer"),
        "spacing": (1.0,) * dims,
        "names": tuple(f"a{i}~b{i}" for i in range(number)),
        "displacement": torch.ones(number, dims, *spatial),
        "landmarks": tuple(torch.rand(4 + i, 2, dims, generator=generator) for i in range(number)),
    }
    return PairSet(**{**values, **changes})


@pytest.mark.parametrize("spatial", [(8, 12), (4, 6, 8)])
def test_shape_is_read_off_the_labels(spatial):
    pairs = example(spatial)
    assert (len(pairs), pairs.spatial, pairs.spatial_dims, pairs.num_labels) == (3, spatial, len(spatial), 3)
    assert torch.equal(pairs.fixed, pairs.labels[:, 0]) and torch.equal(pairs.moving, pairs.labels[:, 1])
    assert pairs.one_hot().shape == (3, 2, 3, *spatial)
    assert torch.equal(pairs.one_hot().argmax(2).byte(), pairs.labels)


@pytest.mark.parametrize("index, expected", [(1, [1]), (-1, [2]), (slice(0, 2), [0, 1]), ([2, 0], [2, 0])])
def test_indexing_takes_everything_along(index, expected):
    pairs = example()
    some = pairs[index]
    assert some.names == tuple(pairs.names[i] for i in expected)
    assert torch.equal(some.labels, pairs.labels[expected])
    assert [len(points) for points in some.landmarks] == [4 + i for i in expected]


def test_an_index_out_of_range_is_an_error():
    with pytest.raises(IndexError):
        example()[7]


def test_swapping_exchanges_images_names_and_landmarks():
    pairs, swapped = example(), example().swapped()
    assert torch.equal(swapped.fixed, pairs.moving)
    assert swapped.names[0] == "b0~a0"
    assert torch.equal(swapped.landmarks[0][:, 0], pairs.landmarks[0][:, 1])
    assert swapped.displacement is None


@pytest.mark.parametrize("spatial", [(8, 12), (4, 6, 8)])
def test_resizing_carries_spacing_displacement_and_landmarks(spatial):
    pairs = example(spatial)
    fine = pairs.resized([2 * size for size in spatial])
    assert fine.spacing == (0.5,) * len(spatial)
    torch.testing.assert_close(fine.displacement, torch.full_like(fine.displacement, 2.0))
    torch.testing.assert_close(fine.landmarks[0], 2 * pairs.landmarks[0] + 0.5)
    assert pairs.resized(spatial) is pairs


def test_a_landmark_stays_on_its_structure_when_the_grid_changes():
    labels = torch.zeros(1, 2, 16, 16, dtype=torch.uint8)
    labels[0, :, 8:12, 4:8] = 2
    centre = torch.tensor([[[9.5, 5.5], [9.5, 5.5]]])
    pairs = example(labels=labels, names=("a~b",), displacement=None, landmarks=(centre,))
    coarse = pairs.resized((8, 8))
    at = fields.sample_at(one_hot(coarse.fixed, 3)[0], coarse.landmarks[0][:, 0])
    torch.testing.assert_close(at, torch.tensor([[0.0, 0.0, 1.0]]))


def test_resizing_is_a_majority_vote():
    labels = torch.tensor([[[1, 1, 0, 0], [2, 1, 0, 2]]], dtype=torch.uint8)
    assert resize_labels(labels, (1, 2), 3).tolist() == [[[1, 0]]]


@pytest.mark.parametrize("spatial", [(8, 12), (4, 8, 12)])
def test_pooling_keeps_a_thin_line_and_carries_everything_along(spatial):
    labels = torch.zeros(3, 2, *spatial, dtype=torch.uint8)
    labels[:, :, 1] = 1  # one voxel thin: a majority vote would lose it
    pairs = example(spatial, labels=labels)
    coarse = pairs.pooled(4)
    assert coarse.spatial == tuple(size // 4 for size in spatial)
    assert (coarse.labels[:, :, 0] == 1).all() and (coarse.labels[:, :, 1:] == 0).all()
    assert not pairs.resized(coarse.spatial).labels.any()
    assert coarse.spacing == (4.0,) * len(spatial)
    torch.testing.assert_close(coarse.displacement, torch.full_like(coarse.displacement, 0.25))
    torch.testing.assert_close(coarse.landmarks[0], (pairs.landmarks[0] - 1.5) / 4)  # voxel 0 is centred at 1.5
    assert pairs.pooled(1) is pairs


def test_pooling_twice_is_pooling_once():
    pairs = example((8, 12, 16), displacement=torch.rand(3, 3, 8, 12, 16))
    once, twice = pairs.pooled(4), pairs.pooled(2).pooled(2)
    assert torch.equal(once.labels, twice.labels)
    torch.testing.assert_close(once.displacement, twice.displacement)
    torch.testing.assert_close(once.landmarks, twice.landmarks)
    assert once.spacing == twice.spacing


@pytest.mark.parametrize("factor", [0, 3, 5])
def test_pooling_needs_a_factor_of_the_grid(factor):
    with pytest.raises(DataError, match="cannot be pooled"):
        example((8, 12)).pooled(factor)


def test_a_pair_without_landmarks_among_others():
    points = (torch.zeros(0, 2, 2), torch.ones(5, 2, 2), torch.zeros(0, 2, 2))
    pairs = example(landmarks=points)
    for changed in (pairs.pooled(2), pairs.resized((4, 6)), pairs.swapped(), pairs[:]):
        assert [len(some) for some in changed.landmarks] == [0, 5, 0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": torch.zeros(3, 2, 8, 12)}, "uint8"),
        ({"labels": torch.zeros(3, 3, 8, 12, dtype=torch.uint8)}, "uint8 of shape"),
        ({"labels": torch.full((3, 2, 8, 12), 9, dtype=torch.uint8)}, "label 9 occurs"),
        ({"spacing": (1.0, 1.0, 1.0)}, "spacing has 3"),
        ({"names": ("a",)}, "1 names for 3 pairs"),
        ({"displacement": torch.zeros(3, 2, 8, 11)}, "displacement must have shape"),
        ({"landmarks": (torch.zeros(4, 2, 2),)}, "1 sets of landmarks"),
        ({"landmarks": (torch.zeros(4, 2, 3),) * 3}, "landmarks of a0~b0"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        example(**changes)


def test_label_maps_survive_packing() -> None:
    labels = torch.randint(0, 25, (2, 2, 5, 7), dtype=torch.uint8)
    assert torch.equal(unpack_labels(json.loads(json.dumps(pack_labels(labels)))), labels)
