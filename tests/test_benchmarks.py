"""The benchmarks: the published side is what it was described as, and the figures are what they say. No timings."""

import json
import sys
import time

import pytest
import torch
from small_run import small_run, small_run_3d

from benchmarks import __main__ as command
from benchmarks import codebook, measure, published, quality, rows, steps


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_published_networks_have_their_sizes():
    with torch.device("meta"):
        assert parameters(published.Denoiser()) == pytest.approx(28.0e6, rel=2e-3)
        assert parameters(published.Autoencoder().network) == pytest.approx(9.86e6, rel=0.05)
        grid = published.Autoencoder().network.encode(torch.empty(1, 2, *published.SPATIAL)).shape[2:]
    assert tuple(grid) == published.TOKENS


def test_the_published_sampler_reveals_everything_and_keeps_to_what_is_certain():
    certain = torch.arange(12) % 4

    def predict(tokens):
        return 50.0 * torch.nn.functional.one_hot(certain, 4).float()[None]

    torch.manual_seed(0)
    assert torch.equal(published.sample(predict, 12, mask=4, steps=5)[0], certain)


def test_the_published_registration_moves_towards_the_fixed_image():
    torch.manual_seed(0)
    fixed, moving = torch.zeros(2, 1, 1, 64, 32, 32)
    fixed[..., 20:40, 10:20, 10:20], moving[..., 24:44, 10:20, 10:20] = 1, 1
    network = published.Registration()
    before = float(published.registration_loss(network, fixed, moving).detach())
    published.optimise_instance(network, fixed, moving, steps=4)
    assert float(published.registration_loss(network, fixed, moving).detach()) < before


def test_the_published_exponential_of_minus_v_is_the_inverse():
    axis = torch.linspace(0, 3.14, 24).sin()
    bump = axis[:, None, None] * axis[None, :, None] * axis[None, None]
    velocity = 0.2 * bump.expand(1, 3, 24, 24, 24)
    forth, back = published.exponentiate(velocity), published.exponentiate(-velocity)
    assert (forth + published.warp(back, forth)).abs().max() < 0.1 * forth.abs().max()


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
    assert row.ratio == ratio and row.reached is reached
    assert {"name", "unit", "ours", "published", "ratio", "target", "reached"} <= row.described().keys()


def test_both_sides_are_timed_in_turn():
    calls = []

    def work(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    ours, theirs = measure.seconds_in_turn(lambda: work("a", 0), lambda: work("b", 0.05), repeats=2)
    assert calls == ["a", "b"] * 3 and theirs >= 0.05 > ours


def allocate(mebibytes):
    return lambda: torch.ones(mebibytes * 2**18).sum()


def test_peak_memory_is_that_of_the_work():
    assert measure.peak_gib(allocate, 512) == pytest.approx(0.5, abs=0.05)


def test_work_that_fails_is_not_waited_for():
    with pytest.raises(EOFError):
        measure.peak_gib(rows.decoding, True, ())


def test_the_command_prints_and_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "peak_gib", lambda *_: 0.5)  # in another process: seen above
    monkeypatch.setattr(
        sys,
        "argv",
        ["benchmarks", "--small", "--json", str(tmp_path / "b.json"), "decode", "denoiser", "sampling"],
    )
    command.main()
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"].split(":")[0] for row in written["rows"]] == ["decode of a full pair"] * 2 + [
        "one denoiser pass"
    ] * 3 + ["sampling a pair, 48 passes instead of 256"]
    assert written["provenance"]["wall_seconds"] > 0
    alike, off = written["rows"][1], written["rows"][3]
    assert alike["ours"] == 100 and 0 < off["ours"] < 1
    assert "of 6 reached" in capsys.readouterr().out


def test_what_was_not_measured_yet_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--json", str(tmp_path / "b.json"), *rows.MEASURED])
    command.main()
    told = capsys.readouterr().out
    assert all(f"{name}: left out" in told for name in rows.MEASURED) and "sampling.json" in told
    assert json.loads((tmp_path / "b.json").read_text())["rows"] == []


def test_the_same_loss_is_seen_in_both_precisions():
    time_row, loss_row = rows.autoencoder(rows.SMALL)
    assert time_row.ours > 0 and loss_row.ours < 5
    assert (loss_row.ours > 0) is rows.fast_in_bfloat16(rows.best_device()), "else both are in 32 bit"


@pytest.mark.parametrize("part", steps.PARTS)
def test_every_variant_does_the_same_work(part, monkeypatch):
    monkeypatch.setattr(steps, "peak_gib", lambda *_: 0.0)  # in another process: seen above
    monkeypatch.setattr(
        steps, "seconds_in_turn", lambda *works, repeats: [float(work() is not None) for work in works]
    )  # once is enough
    changes = list(steps.measure(part, rows.SMALL))
    assert [change.change for change in changes] == [
        variant.change for variant in steps.PARTS[part](rows.SMALL)
    ]
    assert all(change.seconds > 0 for change in changes)


def test_looking_near_vessels_alone_finds_the_same_and_is_switched_back():
    usual = rows.registration.LARGE
    everywhere, near = (
        steps.optimisation(rows.SMALL, steps.Level(1, 4, 3, 0.2), near_only)() for near_only in (False, True)
    )
    assert usual == rows.registration.LARGE
    torch.testing.assert_close(near[0], everywhere[0], atol=0.05, rtol=0)


def test_both_kinds_of_codebook_are_trained_alike(tmp_path):
    run = small_run(tmp_path / "run")
    measured = codebook.measure(run)
    assert measured["ours"].keys() == measured["published"].keys()
    assert all(0 < measured[side]["codes_used"] <= 1 for side in ("ours", "published"))
    assert measured == codebook.measure(run) | {"provenance": measured["provenance"]}, (
        "loaded, not trained again"
    )


def test_the_plain_codebook_learns_by_its_gradient():
    torch.manual_seed(0)
    model, latent = codebook.PlainCodebook(8, 4), torch.randn(2, 4, 3, 3, requires_grad=True)
    found = model(latent)
    torch.testing.assert_close(found.latent, model.look_up(found.tokens))
    found.commitment.backward()
    moved = model.vectors.grad.abs().sum(1) > 0
    assert set(moved.nonzero()[:, 0].tolist()) == set(found.tokens.unique().tolist())
    assert latent.grad.abs().sum() > 0


def test_both_samplers_are_judged_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "PASSES", 4)
    measured = quality.measure(small_run_3d(tmp_path / "run"), number=3)
    assert measured["ours"].keys() == measured["published"].keys()
    assert measured["passes"] == {"ours": 4, "published": 4}
    assert all(measured[side]["bits per token under a second model"] > 0 for side in ("ours", "published"))
