"""A student of a diffusion: the weights of the divergences, and losses that change one network each."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pairdiff_core import pipeline
from pairdiff_core.errors import CheckpointError
from pairdiff_core.images import distillation, latent_diffusion
from pairdiff_core.profiles import get_profile

T = 40
F_OF = {
    "reverse KL": lambda r: -r.log(),
    "forward KL": lambda r: r * r.log(),
    "Jensen-Shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
}


def networks():
    """A teacher whose last layer is not zero, as if trained, its student and the critics; latents of 8 x 8."""
    torch.manual_seed(0)
    settings = replace(get_profile("quick").gaussian_denoiser, channels=(4, 8), timesteps=T)
    teacher, student = (latent_diffusion.new_unet(settings, 2, 2) for _ in range(2))
    nn.init.normal_(teacher.out[-1].conv.weight, std=0.1)
    student.load_state_dict(teacher.state_dict())
    return teacher.requires_grad_(False), student, distillation.Critics(teacher, (2, 8, 8))


def a_batch(number=3):
    seeds = [torch.Generator().manual_seed(number) for number in range(number)]
    latents = torch.randn(number, 2, 8, 8, generator=torch.Generator().manual_seed(9))
    return distillation.training_batch(latents, T, seeds)


def losses(teacher, student, critics, divergence="Jensen-Shannon"):
    return distillation.matching_loss(student, critics, a_batch(), teacher=teacher, timesteps=T, divergence=divergence)


def changed_by(loss, *networks):
    """Which networks get a gradient from a loss."""
    parameters = [list(each.parameters()) for each in networks]
    wanted = [p for each in parameters for p in each if p.requires_grad]
    given = dict(zip(wanted, torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True), strict=True))
    return [any(given.get(p) is not None and bool(given[p].any()) for p in each) for each in parameters]


@pytest.mark.parametrize("divergence", F_OF)
def test_the_weight_is_the_curvature_of_the_divergence(divergence):
    r = torch.linspace(0.1, 5, 50, dtype=torch.double, requires_grad=True)
    (slope,) = torch.autograd.grad(F_OF[divergence](r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(distillation.WEIGHTS[divergence](r), r**2 * curvature)


def test_each_loss_changes_one_network_only():
    teacher, student, critics = networks()
    nn.init.normal_(critics.velocity.out[-1].conv.weight, std=0.1)  # unlike the teacher, so that the student is pushed
    found = losses(teacher, student, critics)
    every = (teacher, student, critics.velocity, critics.ratio)
    assert changed_by(found["student"], *every) == [False, True, False, False]
    assert changed_by(found["velocity"], *every) == [False, False, True, False]
    assert changed_by(found["ratio"], *every) == [False, False, False, True]
    torch.testing.assert_close(found["loss"], found["student"] + found["velocity"] + found["ratio"])


def test_a_student_whose_score_is_that_of_the_data_is_not_pushed():
    teacher, student, critics = networks()  # both critics start as copies
    assert losses(teacher, student, critics)["student"].item() == pytest.approx(0, abs=1e-12)
    nn.init.normal_(critics.velocity.out[-1].conv.weight, std=0.1)
    assert losses(teacher, student, critics)["student"].item() > 1e-6


def test_one_step_is_that_of_ddim():
    teacher, student, _ = networks()
    noise = a_batch().start
    scheduler = latent_diffusion.new_scheduler("ddim", T, 1)
    with torch.no_grad():
        _, clean = scheduler.step(teacher(noise, torch.full((3,), T - 1)), T - 1, noise)
        torch.testing.assert_close(distillation.one_step(student, noise, T), clean)


def test_only_the_student_is_kept(images_made):
    _, made = images_made
    student, teacher = (made.models[stage].model for stage in ("student", "gaussian_denoiser"))
    assert student.state_dict().keys() == teacher.state_dict().keys()
    assert made.models["student"].fingerprint != made.models["gaussian_denoiser"].fingerprint
    assert {"velocity", "ratio", "student"} < made.models["student"].history[-1].keys()


def test_a_student_learns_a_single_point():
    """The teacher knows data at one point; the student starts elsewhere and has to end there."""
    torch.manual_seed(0)

    class Teacher(nn.Module):  # the exact velocity of a point at 2
        def forward(self, noisy, t):
            a = latent_diffusion.new_scheduler("ddpm", T).alphas_cumprod[t].reshape(-1, 1, 1, 1)
            return (a.sqrt() * noisy - 2) / (1 - a).sqrt()

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.point = nn.Parameter(torch.zeros(1))

        def forward(self, noise, t):
            a = latent_diffusion.new_scheduler("ddpm", T).alphas_cumprod[t].reshape(-1, 1, 1, 1)
            return (a.sqrt() * noise - self.point) / (1 - a).sqrt()

    class Critics(nn.Module):  # the exact velocity of the student's point, and the same weight everywhere
        def __init__(self, student):
            super().__init__()
            self.student = [student]

        def velocity(self, noisy, t):
            return self.student[0](noisy, t).detach()

        def ratio(self, noisy):
            return 0 * noisy.flatten(1)[:, :1]

    student = Student()
    optimiser = torch.optim.SGD(student.parameters(), 0.5)
    for step in range(60):
        seeds = [torch.Generator().manual_seed(step)]
        batch = distillation.training_batch(torch.full((1, 1, 4, 4), 2.0), T, seeds)
        optimiser.zero_grad()
        distillation.matching_loss(
            student, Critics(student), batch, teacher=Teacher(), timesteps=T, divergence="reverse KL"
        )["loss"].backward()
        optimiser.step()
    assert float(student.point) == pytest.approx(2, abs=0.05)


def test_the_stage_needs_the_denoiser_it_was_made_with(images_made):
    run, made = images_made
    with pytest.raises(CheckpointError, match=r"student\.safetensors was made with other"):
        pipeline.train_student(run, made.latents, made.models["rectified_flow"])
