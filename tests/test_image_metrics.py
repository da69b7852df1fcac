"""Measures of grey images on sets for which the answer is known."""

import pytest
import torch

from pairdiff_core import metrics
from pairdiff_core.data.contrasts import draw_images
from pairdiff_core.data.phantom_brains import brain_subjects
from pairdiff_core.metrics.images import COMPONENTS, principal_features


@pytest.fixture(scope="module")
def brains():
    labels = brain_subjects(48, spatial=(80, 96)).labels
    return draw_images(labels, "T1", 5, [torch.Generator().manual_seed(index) for index in range(48)])


def test_ms_ssim_is_1_for_equal_images_and_falls_with_noise(brains):
    noise = torch.randn(brains[:4].shape, generator=torch.Generator().manual_seed(0))
    likeness = [metrics.multiscale_ssim(brains[:4], brains[:4] + amount * noise).mean() for amount in (0, 0.05, 0.2)]
    assert float(likeness[0]) == pytest.approx(1) and likeness[0] > likeness[1] > likeness[2]


def test_ms_ssim_is_that_of_each_pair(brains):
    both = metrics.multiscale_ssim(brains[:2], brains[[0, 2]])
    assert both.shape == (2,) and float(both[0]) == pytest.approx(1) and both[1] < 0.9


def test_copies_of_one_image_have_no_variety(brains):
    assert metrics.similarity_of_samples(brains[:1].repeat(4, 1, 1, 1)) == pytest.approx(1)
    assert metrics.similarity_of_samples(brains) < 0.9


def test_distances_are_root_mean_squares():
    a = torch.zeros(2, 1, 8, 8)
    a[1] = 0.5
    torch.testing.assert_close(metrics.image_distances(a, a), torch.tensor([[0.0, 0.5], [0.5, 0.0]]))


def test_principal_features_of_the_training_images_are_standardised_and_uncorrelated(brains):
    known, same = principal_features(brains, brains)
    assert known.shape == (48, COMPONENTS) and torch.equal(known, same)
    torch.testing.assert_close(known.T.cov(), torch.eye(COMPONENTS, dtype=torch.float64), atol=1e-6, rtol=0)


def test_images_of_the_same_kind_are_nearer_than_others(brains):
    sets = {"same": brains[24:], "upside down": brains[24:].flip(3), "bright": (1.3 * brains[24:]).clamp(0, 1)}
    found = metrics.compare_images(brains[:24], brains[24:], sets)
    assert found["same"]["frechet"] < min(found["upside down"]["frechet"], found["bright"]["frechet"])


def test_copies_are_found(brains):
    noise = 0.01 * torch.randn(brains[:20].shape, generator=torch.Generator().manual_seed(0))
    found = metrics.compare_images(brains[:20], brains[20:34], {"copies": brains[:20] + noise, "new": brains[34:]})
    assert found["copies"]["memorised"] and found["copies"]["closer"] == 1
    assert not found["new"]["memorised"]


def test_errors_of_images_are_those_of_their_definitions(brains):
    found, truth = brains[:3], brains[3:6]
    errors = metrics.image_errors(found, truth)
    for index in range(3):
        difference = found[index] - truth[index]
        assert float(errors["mae"][index]) == pytest.approx(float(difference.abs().mean()))
        assert float(errors["psnr"][index]) == pytest.approx(float(-10 * difference.square().mean().log10()))
    torch.testing.assert_close(errors["ms_ssim"], metrics.multiscale_ssim(found, truth))
