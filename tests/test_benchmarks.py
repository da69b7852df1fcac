"""The benchmarks: both sides do the same work, and the numbers are right. Nothing is timed here."""

import json
import shutil
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from small_run import small_run

from benchmarks import __main__ as command
from benchmarks import codebook, continuous, measure, moved, on_gpu, peers, published, quality, rows, steps
from pairdiff_core import absorbing, fields, metrics, pipeline, registration, vqae
from pairdiff_core.data.breathing import load_motions
from pairdiff_core.data.phantom_lungs import lung_pairs
from pairdiff_core.errors import CheckpointError
from pairdiff_core.profiles import Level, Patches, get_profile
from pairdiff_core.training import best_device, fast_in_bfloat16

TINY = rows.SMALL._replace(spatial=(64, 32, 32))


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------- the published procedure


def test_the_published_networks_have_their_sizes():
    with torch.device("meta"):
        assert parameters(published.Denoiser()) == pytest.approx(28.0e6, rel=2e-3)
        assert parameters(published.Autoencoder().network) == pytest.approx(9.86e6, rel=0.05)
        grid = published.Autoencoder().network.encode(torch.empty(1, 2, *published.SPATIAL)).shape[2:]
    assert tuple(grid) == published.TOKENS


class Translation(torch.nn.Module):
    """The simplest trainable registration: one displacement for all voxels, and its inverse."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1, 3, 1, 1, 1))

    def forward(self, fixed, moving):
        there = self.shift.expand(1, 3, *fixed.shape[2:])
        return there, -there


def test_the_published_instance_optimisation_moves_towards_the_fixed_image():
    fixed, moving = torch.zeros(2, 1, 1, 24, 16, 16)
    fixed[..., 8:16, 4:12, 4:12], moving[..., 10:18, 4:12, 4:12] = 1, 1
    found = published.optimise_instance(Translation(), fixed, moving, steps=60)[0, :, 0, 0, 0].detach()
    assert 0.6 < 12 * found[2] < 2 and found[:2].abs().max() < 0.01, "towards two voxels along the first axis"


def test_the_published_training_step_starts_near_the_identity():
    fixed, moving = rows.pair_of_maps(TINY)
    loss = rows.published_registration_step(TINY)()
    assert loss == pytest.approx(2 * float((fixed - moving).abs().mean()), rel=0.1)


def bump(*spatial):
    """A smooth displacement (1, 3, *spatial) in voxels, different along each axis and zero at the border."""
    axes = [torch.linspace(0, torch.pi, size).sin() for size in spatial]
    height = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None]
    return torch.tensor([3.0, -2.0, 1.0]).reshape(1, 3, 1, 1, 1) * height


def in_units_of_grid_sample(displacement):
    """The published convention: x first, and two units from edge to edge."""
    voxels = torch.tensor(displacement.shape[2:]).reshape(1, 3, 1, 1, 1)
    return (2 * displacement / voxels).flip(1)


def test_the_published_exponential_of_minus_v_is_the_inverse():
    velocity = in_units_of_grid_sample(bump(24, 24, 24))
    forth, back = published.exponentiate(velocity), published.exponentiate(-velocity)
    assert (forth + published.warp(back, forth)).abs().max() < 0.1 * forth.abs().max()


# ------------------------------------------------------------------------------------ both sides do the same work


def test_both_autoencoders_give_the_same_for_the_same_weights():
    torch.manual_seed(0)
    theirs, ours = published.Autoencoder().eval(), pipeline.new_vqae(rows.PAPER).eval()
    ours.network.load_state_dict(theirs.network.state_dict())
    ours.codebook.vectors.copy_(theirs.codebook.vectors.detach())
    labels = rows.pair_of_labels((32, 32, 32))
    with torch.no_grad():
        output, (latent, tokens, _) = ours(labels), theirs.codebook(theirs.network.encode(labels.float()))
        loss = vqae.reconstruction_loss(output, labels) - vqae.COMMITMENT_WEIGHT * output.commitment
        logits = theirs.network.decode(latent).unflatten(1, (2, 2))
        image = theirs.image(logits.flatten(0, 1), labels.flatten(0, 1)[:, None])
    assert torch.equal(output.tokens, tokens)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(loss, image)


def test_the_timed_training_step_is_that_of_our_autoencoder():
    """Its codebook starts on the latents, so its first loss is that without a codebook, unlike the published one's."""
    torch.manual_seed(0)
    plain, labels = published.Autoencoder(), rows.pair_of_labels((32, 32, 32))
    logits = plain.network(labels.float()).unflatten(1, (2, 2)).flatten(0, 1)
    expected = float(plain.image(logits, labels.flatten(0, 1)[:, None]).detach())
    assert rows.vqae_step(True, rows.SMALL)() == pytest.approx(expected, rel=1e-4)
    assert rows.vqae_step(False, rows.SMALL)() > 1.01 * expected


def test_both_denoisers_give_the_same_logits_for_the_same_weights():
    ours, theirs = (rows.new_denoiser(side, TINY) for side in (True, False))
    tokens = torch.randint(published.CODES + 1, (2, 18))
    assert isinstance(ours, absorbing.Denoiser) and isinstance(theirs, published.Denoiser)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens))


@pytest.mark.parametrize(
    "sample",
    [
        lambda predict: published.sample(predict, 12, mask=4, steps=5),
        lambda predict: absorbing.sample(predict, 1, 12, 4, torch.Generator().manual_seed(0), steps=5),
    ],
    ids=["published", "ours"],
)
def test_both_samplers_reveal_everything_and_keep_to_what_is_certain(sample):
    certain = torch.arange(12) % 4
    assert torch.equal(sample(lambda tokens: 50.0 * torch.nn.functional.one_hot(certain, 4).float()[None])[0], certain)


@pytest.mark.parametrize("amount", [0.0, 1.0], ids=["identity", "displaced"])
def test_both_registration_losses_are_the_same_but_for_a_factor(amount):
    """The published one is the sum over both directions, ours the mean, with half the weight of the gradient."""
    fixed, moving = rows.pair_of_maps(TINY)
    displacement = amount * bump(*TINY.spatial)
    both = in_units_of_grid_sample(displacement), in_units_of_grid_sample(-displacement)
    theirs = published.registration_loss(lambda *_: both, fixed, moving)
    deformation = registration.Deformation(displacement, -displacement)
    ours = registration.registration_loss(deformation, fixed, moving, smoothness=0.25)
    torch.testing.assert_close(2 * ours.total, theirs)
    torch.testing.assert_close(published.warp(moving, both[0]), fields.warp(moving, displacement))


def test_all_variants_of_our_registration_step_start_from_the_identity():
    prepared = [*steps.registration_variants(TINY).values()][1:3]
    prepared += [*steps.registration_variants(rows.SMALL).values()][3:5]  # their U-Nets need more voxels
    for prepare, sizes in zip(prepared, (TINY, TINY, rows.SMALL, rows.SMALL), strict=True):
        fixed, moving = (registration.pool(image, 2) for image in rows.pair_of_maps(sizes))
        assert prepare()() == pytest.approx(float((fixed - moving).abs().mean()), rel=1e-5)


def test_all_variants_of_instance_optimisation_align_the_pair():
    fixed, moving = rows.pair_of_maps(TINY)
    for change, prepare in steps.instance_variants(TINY, steps=5).items():
        found = registration.integrate(prepare()(), 5).resized(TINY.spatial)
        assert (found.warp(moving) - fixed).abs().mean() < 0.85 * (moving - fixed).abs().mean(), change


def test_comparing_voxels_near_vessels_alone_finds_the_same():
    level = Level(1, 4, 3, 0.2)
    everywhere, near = (steps.optimisation(rows.SMALL, level, only_near)()[0] for only_near in (False, True))
    torch.testing.assert_close(near, everywhere, atol=0.05, rtol=0)
    assert everywhere.abs().max() > 0.3


def test_all_variants_of_the_published_autoencoder_have_the_same_loss():
    losses = [prepare()() for prepare in steps.vqae_variants(TINY).values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2e-3)
    assert len(losses) == (4 if fast_in_bfloat16(best_device()) else 2)


def test_all_variants_of_the_denoiser_give_the_same_logits():
    variants = steps.denoiser_variants(TINY)
    variants.pop("the same, compiled", None)  # compiling takes longer than all other tests of this file
    expected = variants.pop("published")()()
    for change, prepare in variants.items():
        logits, wanted = prepare()().float(), expected[:, ::48] if "only where" in change else expected
        assert logits.shape == wanted.shape
        assert (logits - wanted).norm() < (0.01 if "bfloat16" in change else 1e-5) * wanted.norm(), change


# ------------------------------------------------------------------------------------------ rows and commands


@pytest.mark.parametrize(
    ("row", "ratio", "reached"),
    [
        (measure.Row("time", "s", 2.0, 10.0, 4.0), 5.0, True),
        (measure.Row("time", "s", 2.0, 10.0, 6.0), 5.0, False),
        (measure.Row("error", "mm", 2.7, 3.0, 2.65, absolute=True), 3.0 / 2.7, False),
        (measure.Row("codes", "%", 95.0, 7.0, 90.0, absolute=True, more_is_better=True), 95.0 / 7.0, True),
        (measure.Row("folding", "%", 0.0, None, 0.1, absolute=True), None, True),
    ],
)
def test_a_row_says_whether_its_target_is_reached(row, ratio, reached):
    assert row.described()["ratio"] == ratio and row.described()["reached"] is reached


def test_both_sides_are_timed_in_turn():
    calls = []

    def work(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    ours, theirs = measure.seconds_in_turn(lambda: work("a", 0), lambda: work("b", 0.05), repeats=2)
    assert calls == ["a", "b"] * 3 and theirs >= 0.05 > ours


def test_peak_memory_is_that_of_the_work():
    assert measure.peak_gib(partial, torch.ones, 2**26) == pytest.approx(0.25, abs=0.03)


def test_work_that_fails_is_not_waited_for():
    with pytest.raises(EOFError):
        measure.peak_gib(partial, torch.ones, -1)


def run_command(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    main()
    return json.loads(arguments[-1].read_text())


def test_the_command_prints_and_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "peak_gib", lambda *_: 0.5)  # needs another process, and is tested above
    monkeypatch.setattr(vqae, "LARGE", 0)  # tokens as few as these are decoded in tiles, too
    monkeypatch.setattr(vqae, "TILE", 2**20)
    parts = ("autoencoder", "decode", "denoiser", "sampling")
    written = run_command(monkeypatch, command.main, "--small", *parts, "--json", tmp_path / "b.json")
    found = {row["name"]: row["ours"] for row in written["rows"]}
    assert list(found) == [
        "one autoencoder training step, 64 x 64 x 64 voxels",
        "autoencoder loss, first 4 steps: largest difference from 32 bit",
        "decoding a whole pair: peak memory",
        "decoding a whole pair: voxels with the same label",
        "one denoiser pass",
        "one denoiser pass: difference from the published one",
        "one denoiser pass: peak memory",
        "sampling a pair, 48 steps instead of 256",
    ]
    assert found["decoding a whole pair: voxels with the same label"] == 100
    assert 0 < found["one denoiser pass: difference from the published one"] < 1
    loss = found["autoencoder loss, first 4 steps: largest difference from 32 bit"]
    assert loss < 2 and (loss > 0) is fast_in_bfloat16(best_device()), "else both are in 32 bit"
    assert written["provenance"]["wall_seconds"] > 0 and "of 8 reached" in capsys.readouterr().out


def test_the_measured_rows_are_those_that_the_book_shows(tmp_path, monkeypatch):
    written = run_command(monkeypatch, command.main, *rows.MEASURED, "--json", tmp_path / "b.json")
    shown = {row["name"]: row for row in rows.read("bench")["rows"]}
    for row in written["rows"]:
        assert (
            row["ours"] == pytest.approx(shown[row["name"]]["ours"]) and row["reached"] is shown[row["name"]]["reached"]
        )


def test_what_was_not_measured_yet_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    written = run_command(monkeypatch, command.main, *rows.MEASURED, "--json", tmp_path / "b.json")
    printed = capsys.readouterr().out
    assert all(f"{name}: left out" in printed for name in rows.MEASURED) and "sampling.json" in printed
    assert written["rows"] == []


# --------------------------------------------------------------------------------------------- finished runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run whose autoencoder is trained on patches, as in 3D."""
    small = small_run(tmp_path_factory.mktemp("runs") / "run")
    patches = replace(small.profile.vqae, patches=Patches((24, 40), cuts=2))
    return replace(small, profile=replace(small.profile, vqae=patches))


def test_both_kinds_of_codebook_are_trained_alike(run):
    measured = codebook.measure(run)
    assert measured["ours"].keys() == measured["published"].keys()
    assert all(0 < measured[side]["codes_used"] <= 1 for side in ("ours", "published"))
    again = codebook.measure(run)
    assert measured == again | {"provenance": measured["provenance"]}, "loaded, not trained again"


def test_the_plain_codebook_learns_by_its_gradient():
    torch.manual_seed(0)
    model, latent = codebook.PlainCodebook(8, 4), torch.randn(2, 4, 3, 3, requires_grad=True)
    found = model(latent)
    torch.testing.assert_close(found.latent, model.look_up(found.tokens))
    found.commitment.backward()
    moved = model.vectors.grad.abs().sum(1) > 0
    assert set(moved.nonzero()[:, 0].tolist()) == set(found.tokens.unique().tolist())
    assert latent.grad.abs().sum() > 0


def test_both_samplers_are_judged_alike(run):
    measured = quality.measure(run, number=4, steps=5)
    assert measured["ours"].keys() == measured["published"].keys()
    assert measured["steps"] == {"ours": 6, "published": 5} and measured["provenance"]["pairs"] == 4
    assert all(measured[side]["bits per token under a second model"] > 0 for side in ("ours", "published"))


# ------------------------------------------------------------------------------------------- a GPU


def test_every_part_is_timed_and_compared_with_the_cpu(tmp_path, monkeypatch, capsys):
    quick = get_profile("quick", 3)
    less = {
        "denoiser": replace(quick.denoiser, convolutions=1),
        "registration": replace(quick.registration, batch=1, instance=(Level(2, 2, 2, 0.2),)),
    }
    monkeypatch.setattr(on_gpu, "get_profile", lambda *_: replace(quick, **less))
    monkeypatch.setattr(on_gpu, "STEPS", 3)
    written = run_command(monkeypatch, on_gpu.main, "--profile", "quick", "--json", tmp_path / "gpu.json")
    found, printed = {row["name"]: row for row in written["rows"]}, capsys.readouterr().out
    assert all(name in printed for name in found) and written["provenance"]["profile"] == "quick"
    assert all(found.pop(name)["agrees"] for name in on_gpu.TOLERANCE)
    assert len(found) == 7 and all(row["seconds"] > 0 for row in found.values())


def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fail():
        raise torch.OutOfMemoryError("too large\nfor this card")

    monkeypatch.setattr(on_gpu, "costs", lambda profile: {"large": fail, "small": lambda: 2.0})
    monkeypatch.setattr(on_gpu, "TOLERANCE", {})
    large, small = run_command(monkeypatch, on_gpu.main, "--json", tmp_path / "gpu.json")["rows"]
    assert large["error"] == "OutOfMemoryError: too large\nfor this card" and small["seconds"] == 2
    assert "OutOfMemoryError: too large\nsmall" in capsys.readouterr().out


def test_a_difference_between_the_devices_is_seen(monkeypatch):
    values = iter((torch.tensor([1.0, 100.0]), torch.tensor([1.0, 101.0])))
    monkeypatch.setattr(on_gpu, "results", lambda device: {"vqae: logits": lambda: next(values)})
    row = on_gpu.compare("vqae: logits")
    assert row["largest_difference"] == 1 and row["allowed"] == pytest.approx(0.101) and not row["agrees"]


# --------------------------------------------------------------------------------------- other people's programs


@pytest.mark.parametrize("peer", [peers.demons(), peers.b_splines(nodes_mm=16)], ids=["demons", "b-splines"])
def test_other_programs_answer_in_voxels_from_fixed_to_moving(peer):
    places = fields.identity_grid((40, 32, 36)) - torch.tensor([18.0, 15.0, 17.0]).reshape(3, 1, 1, 1)
    fixed, moving = (
        torch.sigmoid(8 - (places - shift).norm(dim=0)) for shift in (0, torch.eye(3)[0, :, None, None, None] * 2)
    )
    found = torch.from_numpy(peer(fixed.numpy(), moving.numpy()).copy())[:, fixed > 0.5].mean(1)
    assert found[0] == pytest.approx(2, abs=0.7) and found[1:].abs().max() < 0.5


def test_a_row_of_another_program_has_the_columns_of_ours():
    pair = lung_pairs(1, spatial=(64, 52, 64))
    row = peers.run_peer(pair, lambda fixed, moving: pair.displacement[0].numpy(), blur=1.0)
    expected = registration.score(pair, registration.Deformation(pair.displacement, pair.displacement))
    assert row["tre_mm"] == pytest.approx(expected["tre_mm"]) and row["seconds_per_pair"] >= 0
    assert set(expected) <= set(row)


def test_moved_pairs_move_their_landmarks_along():
    pairs, motions = lung_pairs(2, spatial=(64, 52, 64)), load_motions("phantom3d")
    pairs = replace(pairs, landmarks=(pairs.landmarks[0], pairs.landmarks[1][:0]))
    found = moved.moved_pairs(pairs, motions, (0, 3))
    assert found.names == tuple(f"{pairs.names[0]}+{motions.cases[number]}" for number in (0, 3))
    for index in range(2):
        assert torch.equal(found.fixed[index], pairs.fixed[0]) and not torch.equal(found.moving[index], pairs.moving[0])
        fixed, moving = found.landmarks[index].unbind(1)
        assert torch.equal(fixed, pairs.landmarks[0][:, 0])
        before, after = (maps[0].float() for maps in (pairs.moving, found.moving[index : index + 1]))
        on_vessel = [
            fields.sample_at(each[None], points).mean()
            for each, points in ((before, pairs.landmarks[0][:, 1]), (after, moving))
        ]
        assert on_vessel[1] > 0.8 * on_vessel[0] > 0


# ------------------------------------------------------------------------------------------- continuous diffusion


def test_equally_many_pairs_of_each_kind_train_a_registration(images_made, tmp_path):
    run, _ = images_made
    shutil.copytree(run.path, tmp_path / "run")
    run = replace(run, folder=tmp_path / "run")
    measured = continuous.measure(run, seeds=[0, 1], number=6, images=16)
    rows = {(row["training"], row["seed"]): row for row in measured["registration"]}
    kinds = ["real", "tokens", "tokens, given fixed", "ControlNet", "U-Net alone"]
    assert list(rows) == [(kind, seed) for seed in (0, 1) for kind in kinds]
    assert all(0 < row["dice"] < 1 for row in rows.values())
    assert rows["real", 0]["dice"] != rows["real", 1]["dice"] != rows["ControlNet", 1]["dice"]
    real = run.train[torch.randperm(len(run.train), generator=run.generator("chosen pairs"))[:6]]
    expected = metrics.mean_dice(real.fixed, real.moving, real.num_labels).mean()
    assert measured["pairs"]["real"]["dice"] == pytest.approx(float(expected))
    assert {kind: each["number"] for kind, each in measured["pairs"].items()} == dict.fromkeys(kinds, 6)
    folders = [tmp_path / "run" / f"seed{seed}" for seed in (0, 1)]
    assert all((folder / "registration-u-net-alone.safetensors").is_file() for folder in folders)
    errors = measured["translation"]
    assert set(errors) == {"ControlNet", "U-Net", "copy", "autoencoder"}
    assert all(each[kind][1] > 0 for each in errors.values() for kind in ("psnr", "mae", "ms_ssim"))
    images = measured["images"]
    assert {"tokens", "DDIM", "rectified flow", "partners, ControlNet"} < set(images)
    assert images["training people, drawn again"]["frechet"] < images["DDIM"]["frechet"]
    assert set(measured["losses"]) == {"L1", "L1 + KL", "L1 + KL + adversarial"}
    assert {name: sorted(rows) for name, rows in measured["few_steps"].items()} == {
        "DDIM": [1, 2, 4, 20], "rectified flow": [1, 2, 4, 20], "student": [1], "tokens": [1, 2, 4, 20],
        "unseen people": [0],
    }  # fmt: skip
    assert all(row["chance"] == 1 / 16 and 0 <= row["found"] <= 1 for row in measured["retrieval"].values())
    completed = {name: row["psnr"][0] for name, row in measured["reconstruction"].items()}
    assert completed["zeros"] < completed["total variation"] and len(completed) == 6


def test_interrupted_partners_continue(images_made, tmp_path):
    run, made = images_made
    run = replace(run, folder=tmp_path / "run")
    pairs, images = continuous.drawn_partners(run, made, run.train[:4], "ControlNet")
    again, _ = continuous.drawn_partners(run, made, run.train[:4], "ControlNet")
    assert torch.equal(pairs.fixed, run.train[:4].fixed)
    assert torch.equal(pairs.moving, again.moving)
    assert images.shape == (4, 1, *run.profile.spatial)
    with pytest.raises(CheckpointError):
        continuous.drawn_partners(run, made, run.train[1:5], "ControlNet")
