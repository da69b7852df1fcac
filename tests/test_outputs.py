"""Input files are never overwritten, however their path is written; other files only on request."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import box, call, fails, works, write

from pairdiff_cli.outputs import check_outputs
from pairdiff_core.errors import DataError


def spellings(folder: Path) -> dict[str, Path]:
    """Paths of the file ``in/m.nii.gz`` and, if possible, of one that does not exist yet, ``in/u.nii.gz``."""
    (folder / "in").mkdir()
    (folder / "linked").symlink_to("in")
    (folder / "in" / "m.nii.gz").write_bytes(b"precious")
    (folder / "link.nii.gz").symlink_to("in/m.nii.gz")
    (folder / "chain.nii.gz").symlink_to("linked/../link.nii.gz")
    os.link(folder / "in" / "m.nii.gz", folder / "hard.nii.gz")
    return {
        "itself": folder / "in" / "m.nii.gz",
        "dots": folder / "in" / ".." / "in" / "m.nii.gz",
        "link": folder / "link.nii.gz",
        "chain": folder / "chain.nii.gz",
        "linked folder": folder / "linked" / "m.nii.gz",
        "hard link": folder / "hard.nii.gz",
    }


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_spelling_of_an_input_is_an_output(tmp_path, monkeypatch, overwrite, relative):
    monkeypatch.chdir(tmp_path)
    found = spellings(tmp_path)
    for one in found.values():
        for other in found.values():
            other = other.relative_to(tmp_path) if relative else other
            with pytest.raises(typer.BadParameter) as refused:
                check_outputs({"--out": other}, {"MOVING": one}, overwrite)
            named = f"{other} is named twice, by --out and MOVING"
            both = f"{other} (--out) and {one} (MOVING) are the same file"
            assert refused.value.message.startswith(named if str(one) == str(other) else both)


def test_two_outputs_are_two_files_even_before_they_exist(tmp_path):
    spellings(tmp_path)
    (tmp_path / "dangling.nii.gz").symlink_to("in/u.nii.gz")
    names = ["in/u.nii.gz", "linked/u.nii.gz", "in/../in/u.nii.gz", "dangling.nii.gz"]
    for one in names:
        for other in names:
            with pytest.raises(typer.BadParameter, match="named twice|the same file"):
                check_outputs({"--out": tmp_path / one, "--warped": tmp_path / other}, {}, overwrite=True)
    check_outputs({"--out": tmp_path / "in/u.nii.gz", "--warped": tmp_path / "linked/w.nii.gz"})


steps = st.lists(st.sampled_from(["in", "linked", "..", "."]), max_size=6)


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=steps, other=steps, names=st.tuples(*[st.sampled_from(["m.nii.gz", "u.nii.gz"])] * 2))
def test_paths_are_one_file_exactly_if_the_system_says_so(tmp_path, one, other, names):
    if not (tmp_path / "in").exists():
        spellings(tmp_path)
    paths = [tmp_path.joinpath("in", *steps, name) for steps, name in zip((one, other), names, strict=True)]
    if not all(path.parent.is_dir() for path in paths):
        return
    same = os.path.samefile(*(path.parent for path in paths)) and names[0] == names[1]
    try:
        check_outputs({"--out": paths[0]}, {"MOVING": paths[1]}, overwrite=True)
        refused = False
    except typer.BadParameter:
        refused = True
    except DataError:  # a folder without write permission, such as a parent of the temporary ones
        return
    assert refused == same


def test_what_exists_is_replaced_only_when_asked_for(tmp_path):
    paths = write(tmp_path / "f.nii.gz", box((20, 18, 16))), write(tmp_path / "m.nii.gz", box((20, 18, 16), 2))
    out = tmp_path / "u.nii.gz"
    out.write_bytes(b"older")
    fails(call("register", *paths, "--out", out, "--steps", 1), f"{out} exists. Give --overwrite")
    assert out.read_bytes() == b"older"
    works(call("register", *paths, "--out", out, "--steps", 1, "--overwrite"))
    assert out.read_bytes() != b"older"
    fails(call("apply", out, paths[1], "--out", out, "--overwrite"), "named twice", code=2)
    link = tmp_path / "link.nii.gz"
    link.symlink_to("nowhere.nii.gz")
    fails(call("apply", out, paths[1], "--out", link), "exists. Give --overwrite")


def test_the_moving_image_outlives_register(tmp_path):
    """The input of issue 24 is not overwritten."""
    fixed, moving = (
        write(tmp_path / "f.nii.gz", box((20, 18, 16))),
        write(tmp_path / "in/m.nii.gz", box((20, 18, 16), 2)),
    )
    before = moving.read_bytes()
    out = tmp_path / "in" / ".." / "in" / "m.nii.gz"
    fails(call("register", fixed, moving, "--out", out, "--steps", 1, "--overwrite"), "are the same file", code=2)
    assert moving.read_bytes() == before


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["p.hdr", "p.img", "p.nhdr", "p.mhd"]),
    how=st.sampled_from(["link", "hard link"]),
    data=st.data(),
)
def test_no_file_of_an_image_in_two_files_is_an_output(tmp_path, name, how, data):
    if name.endswith(("hdr", "img")) and name != "p.nhdr":
        nib.save(nib.Nifti1Pair(box((9, 8, 7)), np.eye(4)), tmp_path / "p.img")
    else:
        sitk.WriteImage(sitk.GetImageFromArray(box((9, 8, 7))), str(tmp_path / name))
    files = {"p.hdr": ["p.img"], "p.img": ["p.hdr"]}.get(name, ["p.raw", "p.zraw", "p.raw.gz"])
    other = data.draw(st.sampled_from([file for file in files if (tmp_path / file).exists()]))
    out = tmp_path / "out.json"
    out.unlink(missing_ok=True)
    out.symlink_to(other) if how == "link" else os.link(tmp_path / other, out)
    with pytest.raises(typer.BadParameter, match=f"out.json .--json. belongs to .*{name} .--pair."):
        check_outputs({"--json": out}, {"--pair": (tmp_path / name, tmp_path / "else.nii")}, overwrite=True)
    check_outputs({"--json": tmp_path / "new.json"}, {"--pair": (tmp_path / name,)})


def test_the_voxels_outlive_evaluate(tmp_path):
    fixed = write(tmp_path / "f.nii.gz", box((20, 18, 16)))
    nib.save(nib.Nifti1Pair(box((20, 18, 16), 2), nib.load(fixed).affine), tmp_path / "p.img")
    before = (tmp_path / "p.img").read_bytes()
    pair = ("evaluate", "--pair", fixed, tmp_path / "p.hdr", "--overwrite", "--json")
    for name in ("p.img", "p.hdr", "scores", "scores.txt", "scores.nii.gz"):
        fails(call(*pair, tmp_path / name), f"{name} must end in .json", code=2)
    assert (tmp_path / "p.img").read_bytes() == before
    os.mkfifo(tmp_path / "pipe.json")
    fails(call(*pair, tmp_path / "pipe.json"), "pipe.json cannot be written: it is a device or a pipe")
    works(call(*pair, tmp_path / "scores.json"))


def test_the_files_of_a_run_outlive_evaluate(tmp_path, trained_3d):
    path = write(tmp_path / "f.nii.gz", box((20, 18, 16)))
    config = trained_3d[0].path / "config.json"
    before = config.read_bytes()
    command = ("evaluate", "--pair", path, path, "--run", trained_3d[0].path, "--steps", 0, "--overwrite", "--json")
    fails(call(*command, config), f"{config} (--json) belongs to {trained_3d[0].path} (--run)", code=2)
    assert config.read_bytes() == before
