"""Two processes that train together do what one does with batches of their sum."""

import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch
from small_run import small_run

from pairdiff_core import pipeline, processes
from pairdiff_core.checkpoints import load_checkpoint

NEW = multiprocessing.get_context("forkserver")  # a process that starts with everything imported
NEW.set_forkserver_preload(["small_run", "pairdiff_core.results"])


def together(number, function, *arguments):
    """Call a function in so many processes at once, set up as ``torchrun`` does; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(number):
        settings = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": number}
        settings |= {"LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        started.append(NEW.Process(target=_with_settings, args=(settings, function, arguments)))
        started[-1].start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def _with_settings(settings, function, arguments):
    os.environ |= {name: str(value) for name, value in settings.items()}
    torch.set_num_threads(1)
    function(*arguments)
    if processes.joined():
        torch.distributed.destroy_process_group()


def run_with_batch(folder, share):
    """A run whose batches are a ``share`` of 8, and whose autoencoder places and revives codes."""
    run = small_run(folder)
    numbers = run.profile
    return replace(
        run,
        profile=replace(
            numbers,
            vqae=replace(numbers.vqae, batch=8 // share, steps=8, learning_rate=1e-3),
            diffusion=replace(numbers.diffusion, batch=8 // share, copies=3),
            registration=replace(numbers.registration, batch=8 // share, steps=6, learning_rate=1e-3),
            synthesis=replace(numbers.synthesis, pairs=20),
        ),
    )


def train(folder, share):
    run = run_with_batch(folder, share)
    pipeline.make(run)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders of one process and of two with half the batch each."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    train(one, 1)
    assert together(2, train, two, 2) == [0, 0]
    return one, two


@pytest.mark.parametrize("stage", ["vqae", "denoiser", "registration-real", "registration-real-warped"])
def test_two_processes_learn_what_one_learns(folders, stage):
    """The same history and the same codes, but for the order in which floats are added."""
    (weights, told), (weights_two, told_two) = (
        load_checkpoint(folder / f"{stage}.safetensors") for folder in folders
    )
    for entry, entry_two in zip(told["history"], told_two["history"], strict=True):
        assert entry_two == pytest.approx(entry, rel=1e-4)
    for name in (name for name in weights if name.startswith("codebook")):
        torch.testing.assert_close(weights_two[name], weights[name], rtol=1e-3, atol=1e-4)
    assert (told["provenance"]["processes"], told_two["provenance"]["processes"]) == (1, 2)


def test_what_is_made_in_pieces_does_not_depend_on_who_makes_them(tmp_path):
    """Tokens and new pairs, from the same autoencoder and denoiser: bit by bit."""
    train(tmp_path, 1)
    before = {}
    for name in ("tokens", "synthesis"):
        before[name] = load_checkpoint(tmp_path / f"{name}.safetensors")[0]["tensor"]
        (tmp_path / f"{name}.safetensors").unlink()
    assert together(2, train, tmp_path, 1) == [0, 0]
    for name, tensor in before.items():
        assert torch.equal(load_checkpoint(tmp_path / f"{name}.safetensors")[0]["tensor"], tensor)


def codes_and_gradients(folder, share):
    """Each process writes what it has after one step on its share of 8 pairs: codebook and gradients."""
    run = run_with_batch(folder / "run", share)
    fabric = run.fabric("vqae")
    torch.manual_seed(0)
    model = pipeline.new_vqae(run.profile)
    wrapped = fabric.setup(model)
    torch.manual_seed(1)
    labels = run.train.labels[:8].chunk(share)[processes.rank()]
    fabric.backward(pipeline.vqae.VQAELoss(run.train.num_labels)(wrapped(labels), labels))
    gradients = {f"gradient {name}": value.grad for name, value in model.named_parameters()}
    torch.save({**model.codebook.state_dict(), **gradients}, folder / f"{processes.rank()}-of-{share}.pt")


def test_codebook_and_gradients_agree_across_processes(tmp_path):
    codes_and_gradients(tmp_path, 1)
    assert together(2, codes_and_gradients, tmp_path, 2) == [0, 0]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert all(torch.equal(first[name], second[name]) for name in one)
    for name in one:
        torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=1e-6, msg=name)
    assert first["vectors"].abs().sum() > 0


def test_one_process_alone_needs_no_others():
    values = {"loss": 1.0}
    tensor = torch.rand(3)
    assert processes.mean(values) == values and torch.equal(processes.gather(tensor), tensor)
    assert (processes.any_of(True), processes.any_of(False)) == (True, False)
    assert (processes.rank(), processes.count()) == (0, 1)
