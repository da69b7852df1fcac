"""Two processes that train together do the same as one process with batches twice as large."""

import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch
from small_run import small_run

from pairdiff_core import pipeline, training, vqae
from pairdiff_core.storage import load_checkpoint
from pairdiff_core.training import distributed

NEW = multiprocessing.get_context("forkserver")  # a process that starts with everything imported
NEW.set_forkserver_preload(["small_run", "pairdiff_core.pipeline", "monai", "lightning_fabric"])


def together(number, function, *arguments):
    """Call a function in several processes at once, set up as ``torchrun`` does; all must end well."""
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
    assert [process.exitcode for process in started] == [0] * number


def _with_settings(settings, function, arguments):
    os.environ |= {name: str(value) for name, value in settings.items()}
    torch.set_num_threads(1)
    function(*arguments)
    if distributed.joined():
        torch.distributed.destroy_process_group()


def run_with_batch(folder, share):
    """A run whose batches are a ``share`` of 8, and whose autoencoder places and revives codes."""
    run = small_run(folder)
    profile, batch = run.profile, 8 // share
    changes = {
        "vqae": replace(profile.vqae, batch=batch, steps=8, learning_rate=1e-3),
        "denoiser": replace(profile.denoiser, batch=batch, copies=3),
        "registration": replace(profile.registration, batch=batch, steps=6, learning_rate=1e-3),
        "synthesis": replace(profile.synthesis, pairs=20),
    }
    return replace(run, profile=replace(profile, **changes))


def train(folder, share):
    run = run_with_batch(folder, share)
    made = pipeline.run_stages(run, "synthesis")
    pipeline.train_registration(run, run.train, "real", warped=True)
    assert len(made.synthetic) == 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders of one process and of two with half the batch each."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    train(one, 1)
    together(2, train, two, 2)
    return one, two


@pytest.mark.parametrize("stage", ["vqae", "denoiser", "registration-real"])
def test_two_processes_learn_what_one_learns(folders, stage):
    """History and codes are the same, up to the order in which floats are added."""
    (weights, made_by), (weights_two, made_by_two) = (
        load_checkpoint(each / f"{stage}.safetensors") for each in folders
    )
    for entry, entry_two in zip(made_by["history"], made_by_two["history"], strict=True):
        assert entry_two == pytest.approx(entry, rel=1e-4)
    for name in (name for name in weights if name.startswith("codebook")):
        torch.testing.assert_close(weights_two[name], weights[name], rtol=1e-3, atol=1e-4)
    assert (made_by["provenance"]["processes"], made_by_two["provenance"]["processes"]) == (1, 2)


def test_shards_do_not_depend_on_who_makes_them(folders):
    """Tokens and synthetic pairs of the same autoencoder and denoiser are equal bit by bit."""
    folder, before = folders[0], {}
    for name in ("tokens", "synthesis"):
        before[name] = load_checkpoint(folder / f"{name}.safetensors")[0]["tensor"]
        (folder / f"{name}.safetensors").unlink()
    together(2, train, folder, 1)
    for name, tensor in before.items():
        tensors, description = load_checkpoint(folder / f"{name}.safetensors")
        assert torch.equal(tensors["tensor"], tensor) and description["provenance"]["processes"] == 2


def codes_and_gradients(folder, share):
    """Each process writes its codebook and gradients after one step on its share of 8 pairs."""
    run = run_with_batch(folder / "run", share)
    fabric = training.new_fabric()
    torch.manual_seed(0)
    model = pipeline.new_vqae(run.profile)
    wrapped = fabric.setup(model)
    torch.manual_seed(1)
    labels = run.train.labels[:8].chunk(share)[distributed.rank()]
    fabric.backward(vqae.training_loss(wrapped, labels, run.profile.vqae.codes)["loss"])
    gradients = {f"gradient {name}": value.grad for name, value in model.named_parameters()}
    torch.save({**model.codebook.state_dict(), **gradients}, folder / f"{distributed.rank()}-of-{share}.pt")


def test_codebook_and_gradients_agree_across_processes(tmp_path):
    codes_and_gradients(tmp_path, 1)
    together(2, codes_and_gradients, tmp_path, 2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert all(torch.equal(first[name], second[name]) for name in one)
    for name in one:
        torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=1e-6, msg=name)
    assert first["vectors"].abs().sum() > 0
