"""Exported pairs open in nibabel and SimpleITK, in the right place, with a Learn2Reg description."""

from __future__ import annotations

import json
import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from small_run import small_run, small_run_3d

from pairdiff_core import pipeline, provided, runs, vqae
from pairdiff_core.checkpoints import CheckpointError
from pairdiff_core.data import grid_affine
from pairdiff_core.export import export_pairs
from pairdiff_core.pairs import DataError

NUMBER = 5  # pairs, more than are decoded at once


@pytest.fixture(params=[2, 3])
def finished(request, tmp_path, monkeypatch):
    """A run folder with an autoencoder and random tokens as its synthetic pairs, and those pairs decoded."""
    run = {2: small_run, 3: small_run_3d}[request.param](tmp_path / "run")
    for module in (provided, runs):
        monkeypatch.setattr(module, "get_profile", lambda name, dims: run.profile)
    autoencoder = pipeline.train_vqae(run)
    grid = autoencoder.model.token_grid(run.profile.spatial)
    tokens = torch.randint(0, 16, (NUMBER, *grid), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    config = {"autoencoder": autoencoder.fingerprint}
    runs.load_or_make(run, "synthesis", config, lambda piece: tokens)
    monkeypatch.setattr(runs.data_sets, "load_pairs", None)  # no data are needed from here on
    return run, vqae.decode_labels(autoencoder.model, tokens)


def test_pairs_are_those_of_the_run_and_lie_in_the_right_place(finished, tmp_path):
    run, decoded = finished
    folder = export_pairs(run.path, tmp_path / "pairs")
    spatial = (*run.profile.spatial, 1)[:3]
    axes = {2: "RIA", 3: "LPS"}[len(run.profile.spatial)]
    millimetres = grid_affine(run.dataset, run.profile.spatial)
    for index, pair in enumerate(decoded):
        for image, labels in enumerate(pair):
            path = folder / "imagesTr" / f"PairDiff-{run.dataset}_{index + 1:04d}_{image:04d}.nii.gz"
            opened, itk = nib.load(path), sitk.ReadImage(str(path))
            assert opened.get_data_dtype() == np.uint8 and "".join(nib.aff2axcodes(opened.affine)) == axes
            assert np.array_equal(np.asarray(opened.dataobj), labels.reshape(spatial).numpy())
            assert np.array_equal(sitk.GetArrayFromImage(itk).T, labels.reshape(spatial).numpy())
            np.testing.assert_allclose(
                itk.GetSpacing(), np.linalg.norm(millimetres[:3, :3], axis=0), rtol=1e-5
            )
            voxel = tuple(int(size) - 1 for size in spatial)
            ras = opened.affine @ [*voxel, 1]
            np.testing.assert_allclose(
                itk.TransformIndexToPhysicalPoint(voxel), ras[:3] * [-1, -1, 1], atol=1e-3
            )
            np.testing.assert_allclose(ras, millimetres @ [*voxel, 1], atol=1e-3)


def test_the_description_is_that_of_learn2reg(finished, tmp_path):
    run, _ = finished
    folder = export_pairs(run.path, tmp_path / "pairs")
    told = json.loads((folder / f"PairDiff-{run.dataset}_dataset.json").read_text())
    assert told["numPairedTraining"] == len(told["training_paired_images"]) == NUMBER
    assert told["numTraining"] == len(told["training"]) == 2 * NUMBER
    listed = {entry["image"] for entry in told["training"]}
    assert listed == {pair[role] for pair in told["training_paired_images"] for role in ("fixed", "moving")}
    assert all((folder / image).is_file() for image in listed)
    assert len(list((folder / "imagesTr").iterdir())) == len(listed)
    assert told["tensorImageShape"]["0"] == [*run.profile.spatial, 1][:3]
    assert told["tensorImageSize"]["0"] == f"{len(run.profile.spatial)}D"
    assert len(told["labels"]["0"]) == run.profile.num_labels
    assert told["provenance"]["profile"] == "quick"
    direction, shift = told["registration_direction"], told["img_shift"]
    first = told["training_paired_images"][0]
    for role in ("fixed", "moving"):
        assert first[role].endswith(f"_{shift[role]}.nii.gz") and int(shift[role]) == direction[role]


def test_nothing_is_written_over_or_by_half(finished, tmp_path, monkeypatch):
    run, _ = finished
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="used exists and is not empty"):
        export_pairs(run.path, tmp_path / "used")
    assert os.listdir(tmp_path / "used") == ["mine.txt"]

    def full(path, *_):
        raise DataError(f"{path} could not be written")

    monkeypatch.setattr("pairdiff_core.export.write_nifti", full)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError, match="could not be written"):
        export_pairs(run.path, tmp_path / "pairs")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("finished", [2], indirect=True)
def test_tokens_of_another_autoencoder_are_refused(finished, tmp_path):
    run, _ = finished
    (run.path / "synthesis.safetensors").unlink()
    runs.load_or_make(run, "synthesis", {"autoencoder": "another"}, lambda piece: torch.zeros(1, 6, 10))
    with pytest.raises(CheckpointError, match="synthesis.safetensors was made with another autoencoder"):
        export_pairs(run.path, tmp_path / "pairs")
    (run.path / "synthesis.safetensors").unlink()
    with pytest.raises(CheckpointError, match="synthesis.safetensors does not exist"):
        export_pairs(run.path, tmp_path / "pairs")
