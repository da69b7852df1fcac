"""The training loop: seeded, resumable, and honest about failure."""

import itertools

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from pairdiff_core import training
from pairdiff_core.randomness import generator
from pairdiff_core.resume import Bookmark, Paused


def line_fit(steps=200, **changes):
    """Fit y = 2 x + 1 from seeded batches."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)

    def batch(step):
        return torch.rand(16, 1, generator=generator(0, step))

    def loss(module, x):
        return {"loss": (module(x) - (2 * x + 1)).square().mean(), "constant": torch.tensor(3.0)}

    history = training.fit(model, batch, loss, steps=steps, learning_rate=0.1, log_every=50, **changes)
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


class Noisy(nn.Module):
    """Draws random numbers of its own, and keeps a buffer, as a codebook does."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.sum()
        return self.line(x + 0.1 * torch.randn(x.shape))


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_training_that_was_interrupted_ends_with_the_same_bits(tmp_path, average):
    def fit(pauses, folder):
        torch.manual_seed(0)
        model, asked = Noisy(), iter(pauses)
        bookmark = Bookmark(folder / "x.part", {}, should_pause=lambda: next(asked, None))
        history = training.fit(
            model,
            lambda step: torch.rand(4, 1, generator=generator(0, step)),
            lambda module, x: {"loss": (module(x) - x).square().mean()},
            steps=30,
            learning_rate=0.1,
            average=average,
            bookmark=bookmark,
            log_every=7,
        )
        return model.state_dict(), history

    weights, history = fit([], tmp_path / "a")
    for steps in (1, 9, 13):  # 23 in all
        with pytest.raises(Paused, match="time is over: paused after step"):
            fit([None] * (steps - 1) + ["time is over"], tmp_path / "b")
        torch.rand(5)
    resumed, history_resumed = fit([], tmp_path / "b")
    assert history_resumed == history
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_what_was_done_is_kept_now_and_then(tmp_path):
    """As if the process were killed at step 12: its bookmark holds the last step that was due."""
    bookmark = Bookmark(tmp_path / "x.part", {}, minutes=0)

    def batch(step):
        if step == 12:
            raise KeyboardInterrupt
        return torch.ones(1, 1)

    with pytest.raises(KeyboardInterrupt):
        training.fit(
            nn.Linear(1, 1), batch, lambda m, x: {"loss": m(x).sum()}, steps=20, learning_rate=0.1,
            bookmark=bookmark,
        )  # fmt: skip
    assert bookmark.load()[1]["step"] == 12


def test_compiled_training_agrees():
    plain, compiled = line_fit(30)[0], line_fit(30, compiled=True)[0]
    torch.testing.assert_close(plain.weight, compiled.weight)


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
            lambda step: torch.full((1, 1), torch.nan),
            lambda module, x: {"loss": module(x).sum()},
            steps=3,
            learning_rate=0.1,
        )
    assert torch.equal(model.weight, before)


def test_a_gradient_that_is_not_finite_stops_the_run():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.clone()
    with pytest.raises(FloatingPointError, match="the gradient is .* at step 1; lower the learning rate"):
        training.fit(
            model,
            lambda step: torch.zeros(1, 1),
            lambda module, x: {"loss": module(x).sum().sqrt()},
            steps=3,
            learning_rate=0.1,
        )
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(("precision", "depth"), [("bf16-mixed", 2), ("bf16-mixed", 3), ("32-true", 2)])
def test_gradients_that_would_be_wrong_are_refused(precision, depth):
    """Two voxels deep, in bfloat16, on a CPU: PyTorch 2.13 then reads memory that nobody wrote."""
    model = nn.Conv3d(4, 4, 3, padding=1)

    def train():
        return training.fit(
            model,
            lambda step: torch.ones(1, 4, depth, 3, 3),
            lambda module, x: {"loss": module(x).square().mean()},
            steps=1,
            learning_rate=0.1,
            fabric=Fabric(accelerator="cpu", devices=1, precision=precision),
        )

    if (precision, depth) == ("bf16-mixed", 2):
        with pytest.raises(ValueError, match="take this stage out of the profile's mixed_precision"):
            train()
    else:
        assert len(train()) == 1
    assert not model._forward_pre_hooks


def test_the_learning_rate_rises_then_falls_to_zero():
    shares = [training._warm_up_and_cosine(step, 100) for step in range(101)]
    assert shares[0] == pytest.approx(0.2) and max(shares) == 1.0 and shares.index(1.0) in (4, 5)
    assert shares[-1] == pytest.approx(0, abs=1e-9)
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares[5:]))


@pytest.mark.parametrize(
    ("instructions", "fast"),
    [({"avx2": True}, False), ({"avx2": True, "avx512_bf16": True}, True), ({"amx_bf16": False}, False)],
)
def test_bfloat16_is_for_processors_that_have_instructions_for_it(monkeypatch, instructions, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert training.fast_in_bfloat16(torch.device("cpu")) is fast
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not training.fast_in_bfloat16(torch.device("cpu")), "a version of PyTorch that cannot tell"
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *, including_emulation: not including_emulation
    )
    assert training.fast_in_bfloat16(torch.device("cuda"))


def test_a_device_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("PAIRDIFF_DEVICE", "cpu")
    assert training.best_device().type == "cpu"
    monkeypatch.setenv("PAIRDIFF_DEVICE", "abacus")
    with pytest.raises(ValueError, match="'abacus', but the devices are cpu and cuda"):
        training.best_device()
    monkeypatch.setenv("PAIRDIFF_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="asks for cuda, but torch finds no GPU"):
        training.best_device()
