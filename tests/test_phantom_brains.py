"""Phantom brains: what they look like, and that their displacement and landmarks are true."""

from __future__ import annotations

import pytest
import torch

from pairdiff_core import fields
from pairdiff_core.data import phantom_brains
from pairdiff_core.data.oasis import read_label_table
from pairdiff_core.pairs import resize_labels


def dice(a: torch.Tensor, b: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Dice per image and structure, (N, C - 1)."""
    scores = [
        2 * ((a == label) & (b == label)).sum((1, 2)) / ((a == label).sum((1, 2)) + (b == label).sum((1, 2)))
        for label in range(1, num_labels)
    ]
    return torch.stack(scores, 1)


def centre(labels: torch.Tensor, label: int) -> torch.Tensor:
    return (labels == label).nonzero().float().mean(0)


@pytest.mark.parametrize(("spatial", "num_labels"), [((80, 96), 5), ((80, 96), 25), ((160, 192), 25)])
def test_every_subject_has_every_structure(spatial: tuple[int, int], num_labels: int) -> None:
    people = phantom_brains.brain_subjects(12, spatial=spatial, num_labels=num_labels, seed=3)
    assert people.labels.shape == (12, *spatial)
    assert people.labels.dtype == torch.uint8
    for labels in people.labels:
        assert labels.unique().tolist() == list(range(num_labels))
        assert (labels[0] == 0).all() and (labels[-1] == 0).all() and (labels[:, 0] == 0).all()


def test_left_is_at_low_indices_and_the_crown_is_up() -> None:
    for labels in phantom_brains.brain_subjects(4, num_labels=25).labels:
        for label, (name, _) in enumerate(phantom_brains.STRUCTURES):
            across, down = centre(labels, label)
            if name.startswith("Left"):
                assert across < labels.shape[0] / 2
            elif name.startswith("Right"):
                assert across > labels.shape[0] / 2
        assert centre(labels, 3)[1] < centre(labels, 4)[1] < centre(labels, 9)[1]  # ventricle, thalamus, brain stem


def test_the_cortex_is_a_folded_ribbon() -> None:
    """It is thin, between white matter and outside, and much longer than the outline of a convex brain."""
    labels = phantom_brains.brain_subjects(1, num_labels=5).labels[0]
    cortex = (labels == 1)[None, None].float()
    eroded = -torch.nn.functional.max_pool2d(-cortex, 7, stride=1, padding=3)
    assert eroded.sum() < 0.01 * cortex.sum()  # nowhere 7 voxels thick
    assert 0.10 < cortex.mean() < 0.20  # real slices: 0.13
    assert 0.10 < (labels == 3).float().mean() < 0.20  # white matter; real slices: 0.15
    crossings = (labels[:-1] != labels[1:]).sum(0)
    assert crossings.max() > 20  # on a line through the brain


def test_tissues_are_the_structures_put_together() -> None:
    structures = phantom_brains.brain_subjects(3, num_labels=25).labels
    tissues = phantom_brains.brain_subjects(3, num_labels=5).labels
    assert torch.equal(tissues, torch.tensor(phantom_brains.TISSUE_OF_STRUCTURE, dtype=torch.uint8)[structures.long()])
    of_name = {"Cortex": 1, "White-Matter": 3, "Ventricle": 4}
    for (name, _), tissue in zip(phantom_brains.STRUCTURES[1:], phantom_brains.TISSUE_OF_STRUCTURE[1:], strict=True):
        assert tissue == next((value for part, value in of_name.items() if name.endswith(part)), 2), name


@pytest.mark.parametrize("num_labels", [5, 25])
def test_names_and_colours_are_those_of_the_data(best_oasis_folder, num_labels: int) -> None:
    names, colours = read_label_table(best_oasis_folder / f"seg{num_labels - 1}_labels.txt", num_labels)
    assert tuple(zip(names, colours, strict=True)) == phantom_brains.LABEL_TABLES[num_labels]


@pytest.mark.parametrize("num_labels", [5, 25])
def test_subjects_differ_about_as_much_as_people(num_labels: int) -> None:
    pairs = phantom_brains.brain_pairs(40, num_labels=num_labels, subjects=12, seed=5)
    before = dice(pairs.fixed, pairs.moving, num_labels).mean()
    assert 0.4 < before < 0.62  # real middle slices: 0.51 (4 labels), 0.45 (24)


def test_warps_are_smooth_and_invertible() -> None:
    people = phantom_brains.brain_subjects(12, seed=11)
    assert fields.jacobian_determinant(people.to_template).min() > 0.05
    for there, back in ((people.to_template, people.from_template), (people.from_template, people.to_template)):
        rest = fields.compose(there, back).norm(dim=1)
        assert rest.mean() < 0.05 and rest.max() < 1.0  # mm


@pytest.mark.parametrize(
    ("spatial", "num_labels", "lowest"),
    [((320, 384), 5, 0.95), ((320, 384), 25, 0.95), ((160, 192), 5, 0.92), ((80, 96), 5, 0.85)],
)
def test_warping_moving_gives_fixed(spatial: tuple[int, int], num_labels: int, lowest: float) -> None:
    """The ribbon is 3 mm thin: the nearest-neighbour warp itself costs Dice at voxels of 1 or 2 mm."""
    pairs = phantom_brains.brain_pairs(6, spatial=spatial, num_labels=num_labels, subjects=4, seed=2)
    warped = fields.warp_labels(pairs.moving, pairs.displacement)
    assert dice(warped, pairs.fixed, num_labels).mean() > lowest
    assert dice(pairs.moving, pairs.fixed, num_labels).mean() < 0.7


@pytest.mark.parametrize("spatial", [(160, 192), (80, 96), (96, 96)])
def test_landmarks_agree_with_the_displacement(spatial: tuple[int, int]) -> None:
    pairs = phantom_brains.brain_pairs(8, spatial=spatial, subjects=5, seed=4)
    for displacement, points in zip(pairs.displacement, pairs.landmarks, strict=True):
        assert points.shape[0] > 30
        assert (points >= 0).all() and (points <= torch.tensor(spatial) - 1).all()
        predicted = points[:, 0] + fields.sample_at(displacement, points[:, 0])
        assert (predicted - points[:, 1]).norm(dim=1).max() < 0.5
        assert (points[:, 0] - points[:, 1]).norm(dim=1).mean() > 1  # there was something to find


def test_landmarks_sit_in_their_structure() -> None:
    """The last two are the centres of the third ventricle and of the brain stem, in every subject."""
    people = phantom_brains.brain_subjects(6, num_labels=25, seed=8)
    for labels, points in zip(people.labels, people.landmarks, strict=True):
        found = [int(labels[tuple(point.round().long())]) for point in points[-2:]]
        assert found == [8, 9]


def test_every_grid_shows_the_same_brain() -> None:
    fine, native, coarse = (
        phantom_brains.brain_pairs(3, subjects=12, spatial=spatial, num_labels=25, seed=1)
        for spatial in ((320, 384), (160, 192), (80, 96))
    )
    assert fine.names == native.names == coarse.names
    assert (fine.spacing, native.spacing, coarse.spacing) == ((0.5, 0.5), (1.0, 1.0), (2.0, 2.0))
    assert torch.equal(coarse.fixed, resize_labels(native.fixed, (80, 96), 25))
    again = resize_labels(fine.fixed, (160, 192), 25)
    assert (again == native.fixed).float().mean() > 0.97
    resized = native.resized((80, 96))
    assert torch.allclose(resized.displacement, coarse.displacement, atol=1e-4)
    assert torch.allclose(torch.stack(resized.landmarks), torch.stack(coarse.landmarks), atol=1e-4)


def test_a_subject_depends_on_its_seed_and_number_only() -> None:
    few, many = phantom_brains.brain_subjects(2, seed=6), phantom_brains.brain_subjects(4, seed=6)
    assert torch.equal(few.labels, many.labels[:2])
    assert torch.equal(phantom_brains.brain_subjects(1, seed=6, first=3).labels[0], many.labels[3])
    assert not torch.equal(phantom_brains.brain_subjects(1, seed=7).labels, few.labels[:1])
    assert few.names == ("PHANTOM_0000", "PHANTOM_0001")


def test_pairs_are_seeded_ordered_and_of_two_subjects() -> None:
    pairs = phantom_brains.brain_pairs(100, spatial=(80, 96), subjects=4, seed=9)
    assert len(pairs) == len(set(pairs.names)) == 12  # 4 x 3 is the maximum
    assert all(len(set(name.split("~"))) == 2 for name in pairs.names)
    again = phantom_brains.brain_pairs(5, spatial=(80, 96), subjects=4, seed=9)
    assert again.names == pairs.names[:5]
    assert torch.equal(again.labels, pairs.labels[:5])
    assert phantom_brains.brain_pairs(12, spatial=(80, 96), subjects=4, seed=10).names != pairs.names
