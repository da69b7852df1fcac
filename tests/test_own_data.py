"""Label maps of one's own: a folder that is prepared, trained on, registered, evaluated and exported."""

from __future__ import annotations

from dataclasses import replace

import pytest
from own_data import KINDS
from small_run import small_run, small_run_3d
from typer.testing import CliRunner

from pairdiff_cli import cli
from pairdiff_core.profiles import PROFILES, Patches, UNetSettings, with_levels


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def works(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def small(monkeypatch):
    """The profile quick with two steps of everything, and networks for images of 16 voxels a side."""
    for run in (small_run("unused"), small_run_3d("unused")):
        profile = with_levels(run.profile, steps=2)
        one = replace(
            profile.registration, unets=(UNetSettings(1, (4, 4, 4, 4, 4, 4)),), control=1, correlation=None, steps=2
        )
        patches = Patches((16, 16, 16), cuts=2) if profile.spatial_dims == 3 else None
        tiny = replace(
            profile,
            vqae=replace(profile.vqae, steps=2, patches=patches),
            denoiser=replace(profile.denoiser, steps=2),
            synthesis=replace(profile.synthesis, pairs=3),
            registration=one,
        )
        monkeypatch.setitem(PROFILES[profile.spatial_dims], "quick", tiny)
    for variable in ("PAIRDIFF_DATA", "PAIRDIFF_PROFILE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_path(small, tmp_path, kind):
    fixed, moving = KINDS[kind](tmp_path / "files")
    prepared, run = tmp_path / "prepared", tmp_path / "run"
    print(works("prepare", fixed, moving, "--to", prepared).output)
    works("run", "all", "--dataset", "own", "--data", prepared, "--run", run, "--quiet")
