"""Exported pairs open in nibabel and SimpleITK, in the right place, with a Learn2Reg description."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from small_run import small_run, small_run_3d

from pairdiff_cli.export import export_pairs, make_pairs, read_given
from pairdiff_core import pipeline, vqae
from pairdiff_core.data import datasets, grid_affine
from pairdiff_core.errors import CheckpointError, DataError

NUMBER = 5  # pairs, more than are decoded at once


@pytest.fixture(params=[2, 3])
def finished(request, tmp_path, monkeypatch):
    """A run folder with an autoencoder and random tokens as its synthetic pairs, and those pairs decoded."""
    run = {2: small_run, 3: small_run_3d}[request.param](tmp_path / "run")
    run = replace(run, profile=replace(run.profile, vqae=replace(run.profile.vqae, steps=1)))
    autoencoder = pipeline.train_vqae(run)
    grid = autoencoder.model.token_grid(run.profile.spatial)
    tokens = torch.randint(0, 16, (NUMBER, *grid), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    pipeline.load_or_make(run, "synthesis", {"autoencoder": autoencoder.fingerprint}, lambda shard: tokens, 1)
    monkeypatch.setattr(datasets, "brain_pairs", None)  # no data are needed from here on
    monkeypatch.setattr(datasets, "lung_pairs", None)
    return run, vqae.decode_labels(autoencoder.model, tokens)


def test_the_grid_of_a_run_has_its_place_in_the_world():
    coarse, fine = grid_affine("lung250m", (64, 52, 64)), grid_affine("phantom3d", (256, 208, 256))
    for corner in ((-0.5, -0.5, -0.5, 1), (63.5, 51.5, 63.5, 1)):  # the field of view has the same corners
        on_fine = [*(4 * np.array(corner[:3]) + 1.5), 1]
        np.testing.assert_allclose(coarse @ corner, fine @ on_fine)
    slices = grid_affine("oasis2d", (80, 96))
    assert np.allclose(np.linalg.norm(slices[:3, :3], axis=0), [2, 2, 1]) and np.linalg.det(slices[:3, :3]) > 0


def test_pairs_are_those_of_the_run_and_lie_in_the_right_place(finished, tmp_path):
    run, decoded = finished
    assert export_pairs(run.path, tmp_path / "pairs") == NUMBER
    spatial, affine = (*run.profile.spatial, 1)[:3], grid_affine(run.dataset, run.profile.spatial)
    axes = {2: "RIA", 3: "LPS"}[run.profile.spatial_dims]
    for index, pair in enumerate(decoded):
        for image, labels in enumerate(pair):
            path = tmp_path / "pairs" / "imagesTr" / f"PairDiff-{run.dataset}_{index + 1:04d}_{image:04d}.nii.gz"
            opened, itk = nib.load(path), sitk.ReadImage(str(path))
            assert opened.get_data_dtype() == np.uint8 and "".join(nib.aff2axcodes(opened.affine)) == axes
            assert np.array_equal(np.asarray(opened.dataobj), labels.reshape(spatial).numpy())
            assert np.array_equal(sitk.GetArrayFromImage(itk).T, labels.reshape(spatial).numpy())
            np.testing.assert_allclose(itk.GetSpacing(), np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-5)
            voxel = tuple(int(size) - 1 for size in spatial)
            ras = affine @ [*voxel, 1]
            np.testing.assert_allclose(opened.affine @ [*voxel, 1], ras, atol=1e-3)
            np.testing.assert_allclose(itk.TransformIndexToPhysicalPoint(voxel), ras[:3] * [-1, -1, 1], atol=1e-3)


def test_the_description_is_that_of_learn2reg(finished, tmp_path):
    run, _ = finished
    folder = tmp_path / "pairs"
    export_pairs(run.path, folder)
    described = json.loads((folder / f"PairDiff-{run.dataset}_dataset.json").read_text())
    assert described["numPairedTraining"] == len(described["training_paired_images"]) == NUMBER
    assert described["numTraining"] == len(described["training"]) == 2 * NUMBER
    listed = {entry["image"] for entry in described["training"]}
    assert listed == {pair[role] for pair in described["training_paired_images"] for role in ("fixed", "moving")}
    assert all((folder / image).is_file() for image in listed)
    assert len(list((folder / "imagesTr").iterdir())) == len(listed)
    assert described["tensorImageShape"]["0"] == [*run.profile.spatial, 1][:3]
    assert len(described["labels"]["0"]) == run.profile.num_labels
    assert described["provenance"]["profile"] == "quick" and described["registration_val"] == []
    direction, shift = described["registration_direction"], described["img_shift"]
    for role in ("fixed", "moving"):
        first = described["training_paired_images"][0][role]
        assert first.endswith(f"_{shift[role]}.nii.gz") and int(shift[role]) == direction[role]


def test_nothing_is_written_over_or_by_half(finished, tmp_path, monkeypatch):
    run, _ = finished
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="used exists and is not empty"):
        export_pairs(run.path, tmp_path / "used")
    assert os.listdir(tmp_path / "used") == ["mine.txt"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match="could not be written"):
        export_pairs(run.path, tmp_path / "pairs")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("finished", [2], indirect=True)
def test_tokens_of_another_autoencoder_are_refused(finished, tmp_path):
    run, _ = finished
    (run.path / "synthesis.safetensors").unlink()
    with pytest.raises(CheckpointError, match="synthesis.safetensors does not exist"):
        export_pairs(run.path, tmp_path / "pairs")
    pipeline.load_or_make(run, "synthesis", {"autoencoder": "another"}, lambda shard: torch.zeros(1, 6, 10), 1)
    with pytest.raises(CheckpointError, match="synthesis.safetensors was made with a different autoencoder"):
        export_pairs(run.path, tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


@pytest.fixture(scope="module")
def lungs(tmp_path_factory):
    """A run on phantom lungs whose denoiser may be given fixed images, and one of them as a file."""
    run = small_run_3d(tmp_path_factory.mktemp("lungs") / "run")
    pipeline.run_stages(run, "denoiser")
    labels, affine = run.validation.fixed[0].numpy(), grid_affine(run.dataset, run.profile.spatial)
    path = run.path.parent / "fixed.nii.gz"
    nib.save(nib.Nifti1Image(labels, affine), path)
    return run, path, labels, affine


def opened(folder, pair, image):
    return nib.load(folder / "imagesTr" / f"PairDiff-phantom3d_{pair:04d}_{image:04d}.nii.gz")


def test_partners_are_drawn_for_a_given_fixed_image(lungs, tmp_path, monkeypatch):
    run, path, labels, affine = lungs
    drawn_for = []

    def recorded(run, denoiser, shard, given):
        drawn_for.append(given)
        return pipeline.sample_pairs(run, denoiser, shard, given)

    monkeypatch.setattr("pairdiff_cli.export.sample_pairs", recorded)
    assert make_pairs(run.path, tmp_path / "partners", 3, given=path) == 3
    moving = []
    for pair in (1, 2, 3):
        fixed, drawn = (opened(tmp_path / "partners", pair, image) for image in (0, 1))
        assert np.array_equal(np.asarray(fixed.dataobj), labels)
        np.testing.assert_allclose(fixed.affine, affine, atol=1e-4)
        np.testing.assert_allclose(drawn.affine, affine, atol=1e-4)
        moving.append(np.asarray(drawn.dataobj))
    assert not np.array_equal(moving[0], moving[1]), "each partner is drawn anew"
    make_pairs(run.path, tmp_path / "free", 3)
    twice = torch.from_numpy(labels).expand(1, 2, *labels.shape)
    (known, nothing), autoencoder = drawn_for, pipeline.load_model(run.path, "vqae").model
    assert torch.equal(known, vqae.encode_pairs(autoencoder, twice)) and nothing is None


def test_a_given_image_on_another_grid_is_resampled(lungs, tmp_path):
    run, _, labels, affine = lungs
    fine = affine @ np.diag([0.5, 0.5, 0.5, 1])
    fine[:3, 3] = affine[:3, 3] - affine[:3, :3] @ np.full(3, 0.25)
    other = nib.Nifti1Image(labels.repeat(2, 0).repeat(2, 1).repeat(2, 2)[::-1], fine @ nib.affines.from_matvec(
        np.diag([-1, 1, 1]), [2 * labels.shape[0] - 1, 0, 0]
    ))  # half the voxel size, and the first axis the other way round  # fmt: skip
    nib.save(other, tmp_path / "other.nii.gz")
    given = read_given(tmp_path / "other.nii.gz", run)
    assert np.mean(given.labels.numpy() != labels) < 0.01 and given.labels.any()
    np.testing.assert_allclose(given.affine[:3, :3], affine[:3, :3], atol=1e-4)
    assert np.abs(given.affine[:3, 3] - affine[:3, 3]).max() <= 2, "within half a voxel"


def test_given_images_that_do_not_fit_are_refused(lungs, tmp_path):
    run, path, labels, affine = lungs
    nib.save(nib.Nifti1Image(np.zeros_like(labels), affine), tmp_path / "empty.nii.gz")
    with pytest.raises(DataError, match=r"empty\.nii\.gz"):
        make_pairs(run.path, tmp_path / "pairs", 1, given=tmp_path / "empty.nii.gz")
    slices = small_run(tmp_path / "slices")
    pipeline.run_stages(slices, "denoiser")
    with pytest.raises(CheckpointError, match="trained without fixed images"):
        make_pairs(slices.path, tmp_path / "pairs", 1, given=path)
    assert not (tmp_path / "pairs").exists()
