"""Images drawn from label maps: contrast, blur, noise, seeds; measured T1 images where the data set has them."""

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_slice

from pairdiff_core.data import load_pairs
from pairdiff_core.data.contrasts import (
    BRIGHTEST,
    CSF,
    GREY,
    WHITE,
    draw_images,
    each_slice_once,
    mean_intensities,
    measured_t1,
    tissue_signal,
)
from pairdiff_core.data.phantom_brains import TISSUE_OF_STRUCTURE, brain_pairs, brain_subjects
from pairdiff_core.errors import DataError
from pairdiff_core.profiles import get_profile


def seeds(number, first=0):
    return [torch.Generator().manual_seed(first + index) for index in range(number)]


def mean_of(images, labels, label):
    return float(images[:, 0][labels == label].mean())


@pytest.fixture(scope="module")
def labels():
    return brain_subjects(4, spatial=(80, 96)).labels


def test_white_matter_is_brightest_in_t1_and_csf_is_dark_in_flair():
    t1, flair = ({tissue: tissue_signal(tissue, name) for tissue in (GREY, WHITE, CSF)} for name in ("T1", "FLAIR"))
    assert t1[WHITE] > t1[GREY] > t1[CSF] > 0
    assert flair[GREY] > flair[WHITE] and flair[CSF] == pytest.approx(0, abs=1e-12)


def test_a_spoiled_gradient_echo_at_its_limits():
    """After a long repetition, only density, flip angle and echo time count."""
    quick = WHITE._replace(t1=1e-3)
    expected = 0.77 * np.sin(np.pi / 6) * np.exp(-10 / 61)
    assert tissue_signal(quick, "T1") == pytest.approx(expected)


@pytest.mark.parametrize("contrast", ["T1", "FLAIR"])
def test_structures_have_the_means_of_their_tissues(contrast):
    tissues, structures = mean_intensities(contrast, 5), mean_intensities(contrast, 25)
    assert tissues[0] == 0 and float(tissues.max()) == pytest.approx(BRIGHTEST)
    assert torch.equal(structures, tissues[list(TISSUE_OF_STRUCTURE)])


@pytest.mark.parametrize("num_labels", [5, 25])
@pytest.mark.parametrize("contrast", ["T1", "FLAIR"])
def test_drawn_images_have_these_means(contrast, num_labels):
    labels = brain_subjects(4, spatial=(160, 192), num_labels=num_labels).labels
    images = draw_images(labels, contrast, num_labels, seeds(4))
    assert images.shape == (4, 1, 160, 192) and images.min() >= 0 and images.max() <= 1
    means = mean_intensities(contrast, num_labels)
    white = {5: 3, 25: 1}[num_labels]  # a large structure, so blur changes little
    assert mean_of(images, labels, white) == pytest.approx(float(means[white]), abs=0.06)
    assert mean_of(images, labels, 0) < 0.06


def test_an_image_depends_on_its_generator_alone(labels):
    images = draw_images(labels, "T1", 5, seeds(4))
    assert torch.equal(images[2:], draw_images(labels[2:], "T1", 5, seeds(2, first=2)))
    assert not torch.equal(images, draw_images(labels, "T1", 5, seeds(4, first=1)))


def test_borders_are_blurred_and_the_bias_is_smooth():
    half = torch.zeros(1, 64, 64, dtype=torch.uint8)
    half[:, 32:] = 3
    image = torch.stack([draw_images(half, "T1", 5, seeds(1, first))[0, 0] for first in range(64)])
    profile = image.mean((0, 2))  # over images and along the border
    assert 0.05 < profile[31] / BRIGHTEST < 0.3 and 0.7 < profile[32] / BRIGHTEST < 0.95, "a voxel sees its neighbour"
    quarters = image[:, 34:].reshape(64, 30, 2, 32).mean((1, 3))  # left and right half of the bright part
    assert (quarters[:, 0] - quarters[:, 1]).std() > 0.03, "the bias field differs from side to side"


def test_wrong_requests_are_named(labels):
    with pytest.raises(DataError, match="no contrast 'T2'; choose one of T1, FLAIR"):
        draw_images(labels, "T2", 5, seeds(4))
    with pytest.raises(DataError, match="from 5 or 25 labels .*, not 2"):
        mean_intensities("T1", 2)


def test_each_slice_of_the_pairs_comes_once():
    pairs = brain_pairs(12, subjects=4, spatial=(80, 96))
    images, names = each_slice_once(pairs)
    assert len(images) == len(set(names)) == 4
    index = next(i for i, name in enumerate(pairs.names) if name.endswith(f"~{names[0]}"))
    assert torch.equal(images[0], pairs.moving[index])


def test_the_measured_t1_image_is_read_where_the_folder_has_it(oasis_folder):
    profile = get_profile("quick")
    pairs = load_pairs("oasis2d", "train", profile, data=oasis_folder)
    assert measured_t1(pairs, "phantom2d") is None
    assert measured_t1(pairs, "oasis2d", oasis_folder) is None, "label maps alone"
    labels, names = each_slice_once(pairs)
    for name, image in zip(names, labels, strict=True):  # stored left last, as the label maps of the folder are
        write_slice(oasis_folder / name / "slice_norm.nii.gz", (image.flip(0).numpy() / 4).astype(np.float32))
    found = measured_t1(pairs, "oasis2d", oasis_folder)
    torch.testing.assert_close(found[:, 0], labels / 4)
    (oasis_folder / names[-1] / "slice_norm.nii.gz").unlink()
    assert measured_t1(pairs, "oasis2d", oasis_folder) is None
    nib.save(
        nib.Nifti1Image(np.zeros((8, 8, 2), np.float32), np.eye(4)), oasis_folder / names[-1] / "slice_norm.nii.gz"
    )
    with pytest.raises(DataError, match=r"slice_norm\.nii\.gz has shape \(8, 8, 2\); expected one slice, \(80, 96\)"):
        measured_t1(pairs, "oasis2d", oasis_folder)
