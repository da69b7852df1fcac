"""Two modalities in one space: the contrastive loss, its second term, and the stage."""

import math

import pytest
import torch
from monai.losses import BarlowTwinsLoss
from small_run import small_image_run

from pairdiff_core import pipeline
from pairdiff_core.data.contrasts import draw_images
from pairdiff_core.images import modalities


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_embeddings_cost_the_logarithm_of_the_batch():
    equal = torch.ones(32, 8)
    assert float(modalities.info_nce(equal, equal)) == pytest.approx(math.log(32), abs=1e-4)


def test_the_loss_is_its_formula():
    a, b = some(2, 16, 8)
    s = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T / modalities.TEMPERATURE
    expected = -(2 * s.diagonal() - s.logsumexp(0) - s.logsumexp(1)).mean() / 2
    torch.testing.assert_close(modalities.info_nce(a, b), expected)
    assert modalities.info_nce(a, a) < modalities.info_nce(a, b)


def test_partners_are_found_in_both_directions():
    a = some(10, 8)
    assert modalities.share_found(a, 3 * a) == 1
    assert modalities.share_found(a, a.roll(1, 0)) == 0
    b = a.clone()
    b[0] = a[1]  # then a[0] finds another one, and b[0] finds a[1]
    assert 0.8 <= modalities.share_found(a, b) < 1


def test_views_repeat_and_keep_the_anatomy():
    image = torch.zeros(2, 1, 32, 40)
    image[..., 10:20, 10:30] = 0.8
    views = [
        modalities.augmented_views(image, [torch.Generator().manual_seed(seed) for seed in seeds])
        for seeds in ((0, 1), (0, 1), (2, 3))
    ]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert not torch.equal(views[0][0], views[0][1])
    assert views[0][..., 12:18, 12:28].mean() > 5 * views[0][..., :8, :].mean().abs()


def test_the_second_term_is_that_of_barlow_twins():
    class Flat(torch.nn.Module):
        def forward(self, t1, flair):
            return t1.flatten(1), flair.flatten(1)

    t1, flair, first, second, other, other_again = some(6, 16, 1, 2, 4)
    found = modalities.alignment_loss(Flat(), modalities.Batch(t1, flair, (first, second, other, other_again)))
    flat = [each.flatten(1) for each in (first, second, other, other_again)]
    expected = (BarlowTwinsLoss()(*flat[:2]) + BarlowTwinsLoss()(*flat[2:])) / 8
    torch.testing.assert_close(found["invariant"], expected)
    torch.testing.assert_close(found["loss"], found["contrastive"] + expected)
    assert "invariant" not in modalities.alignment_loss(Flat(), modalities.Batch(t1, flair))


def test_both_images_show_the_same_slice(images_made):
    run, _ = images_made
    t1, flair = pipeline.both_contrasts(run, run.train, 5, "test")
    assert t1.shape == flair.shape == (5, 1, *run.profile.spatial)
    labels = pipeline.t1_images(run, run.train).labels(3, "test")(0)[:5]
    seeds = [run.generator(f"test FLAIR {number}") for number in range(5)]
    assert torch.equal(flair, draw_images(labels, "FLAIR", run.profile.num_labels, seeds))
    inside = labels[:, None] > 0
    assert t1[inside].mean() > 3 * t1[~inside].mean()


def test_each_kind_of_encoders_is_another_one(images_made, tmp_path):
    run, made = small_image_run(tmp_path / "run"), images_made[1]
    few, both = pipeline.train_encoders(run, 4), pipeline.train_encoders(run, 4, invariant=True)
    assert len({made.models["encoders"].fingerprint, few.fingerprint, both.fingerprint}) == 3
    assert "invariant" in both.history[-1] and "invariant" not in few.history[-1]
    assert (run.path / "encoders-4-invariant.safetensors").is_file()
    assert pipeline.train_encoders(run, 4).loaded
    with pytest.raises(ValueError, match="the profile has 40 images with a partner, not 41"):
        pipeline.train_encoders(run, 41)
