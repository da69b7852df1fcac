"""Training: the loop, its batches, seeds and devices, and pausing."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from pairdiff_core import training
from pairdiff_core.errors import DataError
from pairdiff_core.storage import Progress, Saving
from pairdiff_core.training import Paused, Samples, distributed, fit, generator, pausing, seed_of


def settings(steps, learning_rate=0.1, average=0.0):
    return SimpleNamespace(steps=steps, learning_rate=learning_rate, average=average)


def fit_line(steps=200, average=0.0, batch=None, loss=None, **options):
    """Fit y = 2 x + 1 from seeded batches."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)

    def usual_batch(step):
        return torch.rand(16, 1, generator=generator(0, step))

    def usual_loss(module, x):
        return {"loss": (module(x) - (2 * x + 1)).square().mean(), "constant": torch.tensor(3.0)}

    history = fit(model, loss or usual_loss, batch or usual_batch, settings(steps, average=average), **options)
    return model, history


# --------------------------------------------------------------------------------------------------- the loop


def test_it_learns_and_logs():
    model, history = fit_line()
    assert model.weight.item() == pytest.approx(2, abs=0.05) and model.bias.item() == pytest.approx(1, abs=0.05)
    assert [entry["step"] for entry in history] == list(range(20, 201, 20))
    assert history[-1]["loss"] < 0.01 * history[0]["loss"]
    assert all(entry["constant"] == pytest.approx(3.0) for entry in history)
    assert not model.training


def test_an_entry_of_the_history_is_the_mean_of_its_own_steps():
    def loss(module, step):
        return {"loss": module(step).sum(), "step before": step.mean()}

    _, history = fit_line(47, batch=lambda step: torch.full((1, 1), float(step)), loss=loss)
    assert [entry["step"] for entry in history] == [20, 40, 47]
    assert [entry["step before"] for entry in history] == [9.5, 29.5, 43.0]


def test_the_same_seed_gives_the_same_weights():
    assert torch.equal(fit_line(30)[0].weight, fit_line(30)[0].weight)


def test_training_leaves_the_global_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = nn.Linear(1, 1)
    torch.manual_seed(5)
    fit(model, lambda module, x: {"loss": module(x).sum()}, lambda step: torch.ones(1, 1), settings(3))
    assert torch.equal(torch.rand(3), expected)


class Noisy(nn.Module):
    """Draws random numbers and keeps a buffer, as a codebook does."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.sum()
        return self.line(x + 0.1 * torch.randn(x.shape))


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_training_that_was_interrupted_ends_with_the_same_bits(tmp_path, average):
    def run(folder, pauses=()):
        torch.manual_seed(0)
        model, asked = Noisy(), iter(pauses)
        history = fit(
            model,
            lambda module, x: {"loss": (module(x) - x).square().mean()},
            lambda step: torch.rand(4, 1, generator=generator(0, step)),
            settings(50, average=average),
            progress=Progress(folder / "x.progress", {}, Saving(should_pause=lambda: next(asked, None))),
        )
        return model.state_dict(), history

    weights, history = run(tmp_path / "a")
    for steps in (1, 19, 13):  # 33 in all
        with pytest.raises(Paused, match="training: time is over, paused after step"):
            run(tmp_path / "b", [None] * (steps - 1) + ["time is over"])
        torch.rand(5)
    resumed, history_resumed = run(tmp_path / "b")
    assert history_resumed == history
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_the_average_of_the_weights_replaces_them():
    plain, averaged = fit_line(100)[0], fit_line(100, average=0.9)[0]
    assert not torch.equal(plain.weight, averaged.weight)
    assert averaged.weight.item() == pytest.approx(plain.weight.item(), abs=0.2)


def test_a_loss_or_gradient_that_is_not_finite_stops_the_training():
    def train(loss, steps):
        model = nn.Linear(1, 1, bias=False)
        fit(model, lambda module, x: {"loss": loss(module(x))}, lambda step: torch.zeros(1, 1), settings(steps))

    with pytest.raises(FloatingPointError, match="training: the loss is nan by step 20; lower the learning rate"):
        train(lambda y: y.sum() * torch.nan, 30)
    with pytest.raises(FloatingPointError, match="training: the gradient norm is nan by step 1"):
        train(lambda y: y.sum().sqrt(), 1)


def test_what_is_not_finite_is_never_saved(tmp_path):
    """The loss becomes infinite at the fourth step; the file still holds the state after the third."""
    progress = Progress(tmp_path / "x.progress", {}, Saving(every_minutes=0))
    with pytest.raises(FloatingPointError, match="no finite loss by step 4"):
        fit_line(
            10,
            batch=lambda step: torch.full((1, 1), torch.inf if step == 3 else 1.0),
            loss=lambda module, x: {"loss": module(x).sum()},
            progress=progress,
        )
    state = {"step": 0, "model": nn.Linear(1, 1)}
    progress.restore(Fabric(accelerator="cpu", devices=1), state)
    assert state["step"] == 3 and state["model"].weight.isfinite().all()


@pytest.mark.parametrize(("precision", "depth"), [("bf16-mixed", 2), ("bf16-mixed", 3), ("32-true", 2)])
def test_gradients_that_would_be_wrong_are_refused(precision, depth):
    """For images two voxels deep in bfloat16 on a CPU, PyTorch 2.13 reads uninitialised memory."""
    model = nn.Conv3d(4, 4, 3, padding=1)

    def train(precision):
        return fit(
            model,
            lambda module, x: {"loss": module(x).square().mean()},
            lambda step: torch.ones(1, 4, depth, 3, 3),
            settings(1),
            fabric=Fabric(accelerator="cpu", devices=1, precision=precision),
        )

    if (precision, depth) == ("bf16-mixed", 2):
        with pytest.raises(ValueError, match="remove this stage from the profile's mixed_precision"):
            train(precision)
        with torch.autocast("cpu", torch.bfloat16):  # after training, the model works as before
            model(torch.ones(1, 4, 2, 3, 3))
    else:
        assert len(train(precision)) == 1


# --------------------------------------------------------------------------------------------- batches and seeds


@pytest.fixture
def as_processes(monkeypatch):
    """Call a function once for each of several processes."""

    def call(count, function):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        results = []
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            results.append(function())
        return results

    return call


def test_every_item_comes_once_a_round_in_a_new_order():
    samples = Samples(10, 4, seed=0)
    flat = torch.cat([samples.chosen(step) for step in range(5)])
    assert sorted(flat[:10].tolist()) == list(range(10)) == sorted(flat[10:].tolist())
    assert flat[:10].tolist() != flat[10:].tolist()
    assert not torch.equal(flat, torch.cat([Samples(10, 4, seed=1).chosen(step) for step in range(5)]))


def test_a_batch_may_be_larger_than_the_set():
    assert torch.bincount(Samples(3, 7, seed=0).chosen(0)).min() >= 2


def test_processes_share_the_samples_of_one_without_overlap(as_processes):
    """Two processes with batches of 3 use the same samples and random numbers as one with batches of 6."""

    def taken(batch, step):
        samples = Samples(10, batch, seed=0)
        drawn = torch.cat([torch.rand(1, generator=each) for each in samples.generators(step, "warp")])
        return torch.stack([samples.chosen(step), drawn], 1)

    for step in (0, 1, 5):
        (alone,) = as_processes(1, lambda step=step: taken(6, step))
        assert torch.equal(torch.cat(as_processes(2, lambda step=step: taken(3, step))), alone)


def test_more_processes_than_items_are_refused(as_processes):
    with pytest.raises(DataError, match="4 processes cannot share 3 training items: start at most 3"):
        as_processes(4, lambda: Samples(3, 1, seed=0))


def test_each_purpose_has_a_seed_of_its_own_that_stays():
    seeds = [seed_of(seed, purpose, n) for seed in range(3) for purpose in ("warp", "mask") for n in range(50)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "warp", 17) == 372442933, "the same in every process and version"
    assert seed_of("a", "bc") != seed_of("ab", "c") and seed_of(1, 23) != seed_of(12, 3)
    first = torch.rand(3, generator=generator(0, "warp", 17))
    torch.rand(9)
    assert torch.equal(first, torch.rand(3, generator=generator(0, "warp", 17)))
    assert not torch.equal(first, torch.rand(3, generator=generator(0, "warp", 18)))


# ------------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("instructions", "fast"),
    [({"avx2": True}, False), ({"avx2": True, "avx512_bf16": True}, True), ({"amx_bf16": False}, False)],
)
def test_bfloat16_is_for_processors_that_have_instructions_for_it(monkeypatch, instructions, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert training.fast_in_bfloat16(torch.device("cpu")) is fast
    monkeypatch.setenv("PAIRDIFF_DEVICE", "cpu")
    for allowed in (False, True):
        with training.new_fabric(allowed).autocast():
            found = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        assert found == (torch.bfloat16 if allowed and fast else torch.float32)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not training.fast_in_bfloat16(torch.device("cpu")), "a version of PyTorch that cannot be asked"


def test_a_device_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("PAIRDIFF_DEVICE", "cpu")
    assert training.best_device().type == "cpu"
    monkeypatch.setenv("PAIRDIFF_DEVICE", "abacus")
    with pytest.raises(DataError, match="'abacus', but the devices are cpu and cuda"):
        training.best_device()
    monkeypatch.setenv("PAIRDIFF_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match="asks for cuda, but torch finds no GPU"):
        training.best_device()


def test_one_process_alone_needs_no_others():
    tensor = torch.rand(3)
    assert torch.equal(distributed.mean(tensor), tensor) and torch.equal(distributed.gather(tensor), tensor)
    assert (distributed.any_of(True), distributed.any_of(False)) == (True, False)
    assert (distributed.rank(), distributed.count()) == (0, 1)


# ------------------------------------------------------------------------------------------------------ pausing


def test_signals_and_time_ask_for_a_pause():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with pausing() as reason:
            assert reason() is None
            os.kill(os.getpid(), number)
            assert reason() == f"{signal.Signals(number).name} came"
            assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before, "a second one kills"
    with pausing(minutes=0) as reason:
        assert reason() == "0 minutes are over"
    with pausing(minutes=5) as reason:
        assert reason() is None
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
