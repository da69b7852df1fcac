"""The stages of control: the U-Net stays locked, conditions belong to their latents, and partners to their images."""

from dataclasses import replace

import pytest
import torch
from small_run import small_image_run

from pairdiff_core import pipeline
from pairdiff_core.data.contrasts import draw_images
from pairdiff_core.errors import CheckpointError
from pairdiff_core.images import controlnet
from pairdiff_core.pipeline import control_stages
from pairdiff_core.pipeline.image_stages import SHARD
from pairdiff_core.storage import Saving
from pairdiff_core.training import Paused, Samples

CONTROL = ("controlnet_flair", "controlnet_fixed")


def trained_again(run, made, stage, monkeypatch):
    """The training of a stage, as it would be started now."""
    found = []
    monkeypatch.setattr(control_stages, "load_or_train", lambda _, training: found.append(training))
    pipeline.train_controlnet(run, made.latents, made.models["gaussian_denoiser"], stage)
    return found[0]


def test_the_unet_is_locked_and_the_controlnet_is_trained(images_made, monkeypatch):
    run, made = images_made
    stored = pipeline.load_model(run.path, "gaussian_denoiser").fingerprint
    assert made.models["gaussian_denoiser"].fingerprint == stored, "as before both trainings"
    assert not any(weights.requires_grad for weights in made.models["gaussian_denoiser"].model.parameters())
    for stage in CONTROL:
        start = pipeline.new_control(run.profile, stage)
        controlnet.copy_encoder(start, made.models["gaussian_denoiser"].model)
        trained = made.models[stage].model.state_dict()
        assert not torch.equal(trained["conv_in.conv.weight"], start.state_dict()["conv_in.conv.weight"])
        assert trained["controlnet_mid_block.conv.weight"].abs().max() > 0
        model = pipeline.new_control(run.profile, stage)
        trained_again(run, made, stage, monkeypatch).start(model)
        assert torch.equal(model.conv_in.conv.weight, start.conv_in.conv.weight), "a training starts from the copy"


def test_the_conditions_are_of_the_same_slice_or_of_its_partner(images_made, monkeypatch):
    run, made = images_made
    of_shard = pipeline.t1_images(run, run.train).labels(SHARD // 2, "latents")
    labels = torch.cat([of_shard(0), of_shard(1)])
    images = pipeline.t1_images(run, run.train).batches(SHARD // 2, "latents")(0)
    torch.testing.assert_close(made.models["kl_autoencoder"].model.encode(images), made.latents[:SHARD])
    for stage in CONTROL:
        batches = trained_again(run, made, stage, monkeypatch).batches
        samples = Samples(len(made.latents), 2, run.seed_of(stage))
        for step in (0, 3):
            drawn, chosen = batches(step), samples.chosen(step)
            assert torch.equal(drawn.latents, made.latents[chosen])
            if stage == "controlnet_fixed":
                partners = torch.tensor([index + 1 if index % 2 == 0 else index - 1 for index in chosen.tolist()])
                assert torch.equal(drawn.condition.argmax(1), labels[partners].long())
            else:
                generators = samples.generators(step, "condition")
                assert torch.equal(drawn.condition, draw_images(labels[chosen], "FLAIR", 5, generators))
                again = made.models["kl_autoencoder"].model.encode(
                    pipeline.t1_images(run, run.train).batches(SHARD // 2, "latents")(0)
                )
                torch.testing.assert_close(again, made.latents[: len(again)])


def test_controlled_samples_repeat_and_scale_zero_is_the_unet_alone(images_made):
    run, made = images_made
    conditions = torch.rand(3, 1, *run.profile.spatial, generator=torch.Generator().manual_seed(0))
    scales, stage = (1.0, 1.0, 0.0), "controlnet_flair"
    found = [pipeline.sample_controlled(run, made.models, stage, conditions, "ddim", scale) for scale in scales]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    torch.testing.assert_close(found[2], pipeline.sample_latents(run, made.models["gaussian_denoiser"], "ddim", 3))
    with pytest.raises(ValueError, match="must be 3 images of 64 x 80"):
        pipeline.sample_controlled(run, made.models, "controlnet_flair", conditions[..., :40], "ddim")


def test_partners_keep_the_fixed_images_of_their_pairs(images_made):
    run, made = images_made
    pairs, images = pipeline.draw_partners(run, made.models, run.train[:3])
    assert torch.equal(pairs.fixed, run.train.fixed[:3]) and images.shape == (3, 1, *run.profile.spatial)
    assert torch.equal(pairs.moving, pipeline.segment(made.models["segmenter"], images))
    assert pairs.displacement is None and pairs.landmarks is None
    assert [name.split("~")[0] for name in pairs.names] == [name.split("~")[0] for name in run.train.names[:3]]
    alone, _ = pipeline.draw_partners(run, made.models, run.train[:3], scale=0.0)
    assert not torch.equal(alone.moving, pairs.moving)


@pytest.mark.parametrize("stage", ["controlnet_fixed", "segmenter", "student", "encoders", "score_network"])
def test_a_paused_training_ends_with_the_same_bits(images_made, tmp_path, stage):
    run, made = images_made

    def train(saving):
        new, denoiser = replace(small_image_run(tmp_path), saving=saving), made.models["gaussian_denoiser"]
        trainings = {
            "controlnet_fixed": lambda: pipeline.train_controlnet(new, made.latents, denoiser, stage),
            "segmenter": lambda: pipeline.train_segmenter(new, made.models["kl_autoencoder"]),
            "student": lambda: pipeline.train_student(new, made.latents, denoiser),
            "encoders": lambda: pipeline.train_encoders(new),
            "score_network": lambda: pipeline.train_score_network(new),
        }
        return trainings[stage]()

    asked = iter([None] * 3 + ["time is over"])
    with pytest.raises(Paused, match=f"{stage}: time is over, paused after step 4"):
        train(Saving(should_pause=lambda: next(asked)))
    assert train(Saving()).fingerprint == made.models[stage].fingerprint


def test_a_controlnet_beside_another_unet_is_refused(images_made):
    run, made = images_made
    other = made.models["rectified_flow"]
    with pytest.raises(CheckpointError, match=r"controlnet_flair\.safetensors was made with other .*\(inputs differ"):
        pipeline.train_controlnet(run, made.latents, other, "controlnet_flair")


def test_pretrained_models_take_the_place_of_these_trainings(images_made, tmp_path, monkeypatch):
    run, made = images_made
    (tmp_path / "phantom2d-quick").symlink_to(run.path)
    monkeypatch.setenv("PAIRDIFF_MODELS", str(tmp_path))
    found = pipeline.run_image_stages(small_image_run(tmp_path / "new", seed=1))
    assert len(found.models) == len(made.models) == 10
    for stage, trained in made.models.items():
        assert found.models[stage].fingerprint == trained.fingerprint
