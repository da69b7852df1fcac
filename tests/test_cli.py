"""The command ``pairdiff``: what each command does, and how it fails: one line, the right code, nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import small_run, small_run_3d
from typer.testing import CliRunner, Result

from pairdiff_core import registration
from pairdiff_core.apps import cli
from pairdiff_core.data import fetch
from pairdiff_core.profiles import PROFILES, get_profile, to_json, with_levels

SHAPE = (20, 18, 16)
COMMANDS = ("info", "fetch", "run", "register", "evaluate", "export")
BOUNDED = settings(
    deadline=None,
    derandomize=True,  # the same cases each time: a failure is the change's, not the dice's
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own: codes and streams are what a shell sees."""
    command = [sys.executable, "-m", "pairdiff_core", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def works(result: Result) -> Result:
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def fails(result: Result, *said: str, code: int = 1) -> None:
    """The command ended with that code; with 1, after one line on stderr that has all of ``said``."""
    assert result.exit_code == code, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    if code == 1:
        assert len(lines) == 1 and lines[0].startswith("pairdiff: "), result.stderr
    for part in said:
        assert part in result.stderr


def box(shape: tuple[int, ...], shift: int = 0, dtype: type = np.uint8) -> np.ndarray:
    values = np.zeros(shape, dtype)
    values[tuple(slice(size // 4 + shift, size // 2 + shift + 1) for size in shape)] = 1
    return values


def write(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    affine = np.diag([-4.0, -4.0, 4.0, 1.0]) if affine is None else affine
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine, dtype=values.dtype), path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "fixed.nii.gz", box(SHAPE)), write(tmp_path / "moving.nii.gz", box(SHAPE, 2))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, no_data_set: None) -> None:
    """The profiles quick and laptop are those of the small runs, so that commands take seconds."""
    for run in (small_run("unused"), small_run_3d("unused")):
        profile = with_levels(replace(run.profile, max_pairs=2), steps=2)
        for name in ("quick", "laptop"):
            monkeypatch.setitem(PROFILES[profile.spatial_dims], name, profile)


# ------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert command in call("--help").stdout
    assert f"pairdiff {command}" in works(call(command, "--help")).stdout.partition("Example:")[2]


def test_the_module_is_the_command(files, tmp_path):
    done = shell("register", *files, "--steps", 1, "--out", tmp_path / "u.nii.gz")
    assert done.returncode == 0, done.stderr
    assert "Dice" in done.stdout and not done.stderr
    files[1].write_bytes(b"")
    done = shell("register", *files, "--out", tmp_path / "v.nii.gz")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"pairdiff: {files[1]} is") and done.stderr.count("\n") == 1


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = shell("info", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "pairdiff: interrupted\n")


@pytest.mark.parametrize(
    "error, said",
    [
        (KeyboardInterrupt(), "interrupted"),
        (MemoryError(), "memory ran out. Choose a smaller profile"),
        (torch.OutOfMemoryError("CUDA out of memory."), "memory ran out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (PermissionError(13, "Permission denied", "/some/file"), "/some/file: Permission denied"),
        (FloatingPointError("vqae: the loss is nan by step 20"), "the loss is nan"),
    ],
)
def test_expected_errors_are_one_line(files, tmp_path, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(registration, "register", fail)
    (tmp_path / "u.nii").write_bytes(b"older")
    fails(call("register", *files, "--out", tmp_path / "u.nii"), said)
    assert (tmp_path / "u.nii").read_bytes() == b"older"


def test_a_mistake_in_the_program_is_not_hidden(files, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(registration, "register", fail)
    result = call("register", *files, "--out", tmp_path / "u.nii")
    assert isinstance(result.exception, RuntimeError) and "do not match" in str(result.exception)


@pytest.mark.parametrize(
    "command", ["info", "register fixed.nii.gz moving.nii.gz --out u.nii", "evaluate --dataset phantom2d",
                "run vqae --dataset phantom2d --run new"],
)  # fmt: skip
def test_a_device_that_there_is_not(small, files, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAIRDIFF_DEVICE", "gpu")
    fails(call(*command.split()), "PAIRDIFF_DEVICE is 'gpu', but the devices are cpu and cuda")
    assert sorted(os.listdir()) == ["fixed.nii.gz", "moving.nii.gz"]


# ------------------------------------------------------------------------------------------ info and fetch


def test_info(no_data_set, monkeypatch, oasis_folder):
    monkeypatch.setenv("PAIRDIFF_OASIS2D", str(oasis_folder))
    monkeypatch.setenv("PAIRDIFF_PROFILE", "paper")
    rows = dict(line.split(maxsplit=1) for line in works(call("info")).stdout.splitlines())
    assert "torch" in rows["versions"] and rows["profiles"].endswith("chosen: paper")
    assert rows["oasis2d"] == str(oasis_folder) and rows["lung250m"].startswith("none: No folder")
    assert "oasis2d-laptop" in rows["models"] and "GB free" in rows["runs"]
    assert rows["device"].endswith(("32 bit throughout", "bfloat16 where a profile allows it"))
    monkeypatch.setenv("PAIRDIFF_PROFILE", "huge")
    assert "PAIRDIFF_PROFILE is 'huge', but the profiles are" in works(call("info")).stdout


def test_fetch_finds_what_is_there(tmp_path, monkeypatch, oasis_folder):
    oasis_folder.rename(tmp_path / "neurite-oasis.2d.v1.0")
    vessels, registry = tmp_path / "lung250m" / "case.nii.gz", tmp_path / "registry.txt"
    vessels.parent.mkdir()
    vessels.write_bytes(b"vessels")
    registry.write_text(f"case.nii.gz {hashlib.sha256(b'vessels').hexdigest()}\n")
    monkeypatch.setattr(fetch, "LUNG_REGISTRY", registry)
    for name, folder in (("oasis2d", "neurite-oasis.2d.v1.0"), ("lung250m", "lung250m")):
        found = works(call("fetch", name, "--to", tmp_path)).stdout
        assert f"{name} is in {tmp_path / folder}; to use it: export PAIRDIFF_DATA={tmp_path}" in found


def test_fetch_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "RETRIES", 0)
    monkeypatch.setattr(fetch, "OASIS_SITE", "http://127.0.0.1:1/")
    fails(call("fetch", "oasis2d", "--to", tmp_path), "could not be downloaded", "By hand")
    fails(call("fetch", "mnist", "--to", tmp_path), "mnist", code=2)


# --------------------------------------------------------------------------------------------------- run


def test_a_run_that_is_paused_goes_on(small, tmp_path):
    """Each time one step further; in the end the folder has everything."""
    command = ("run", "all", "--dataset", "phantom2d", "--run", tmp_path, "--pairs", 9)
    for step in (1, 2):
        paused = works(call(*command, "--max-minutes", 0))
        assert f"0 minutes are over, paused after step {step}" in paused.stderr
        assert f"{tmp_path} keeps the progress; the same command goes on" in paused.stderr
    assert not (tmp_path / "vqae.safetensors").exists()
    works(call("run", "tokens", *command[2:]))
    assert (tmp_path / "tokens.safetensors").exists() and not (tmp_path / "denoiser.safetensors").exists()
    done = works(call(*command)).stdout
    assert f"vqae: found in {tmp_path.name}" in done and "denoiser: trained in" in done
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["synthetic"]["pairs"] == 9
    assert f"dice_network_synthetic     {metrics['summary']['dice_network_synthetic']:.4g}" in done
    for name in ("config.json", "logs/vqae/metrics.csv", "registration-synthetic.safetensors"):
        assert (tmp_path / name).exists()
    fails(call(*command, "--seed", 1), f"{tmp_path} holds another run (seed 0)")
    fails(call("run", "all", "--dataset", "phantom3d", "--run", tmp_path), "holds another run (dataset phantom2d)")
    fails(call(*command[:-1], 8), "synthesis.safetensors was made with other settings (settings differ")


def test_a_signal_pauses_and_says_so(tmp_path, no_data_set):
    command = [sys.executable, "-m", "pairdiff_core", "run", "vqae", "--dataset", "phantom2d", "--profile", "quick"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen([*command, "--run", tmp_path / "run"], text=True, **pipes)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, said = run.communicate(timeout=60)
    assert run.returncode == 1 and out == ""
    assert len(said.splitlines()) == 1 and said.startswith("vqae: SIGTERM came, paused after step")
    assert (tmp_path / "run" / "vqae.progress").exists()


def test_a_run_that_is_refused_leaves_no_folder(small, tmp_path, monkeypatch):
    command, folder = ("run", "vqae", "--run", tmp_path / "run", "--dataset"), tmp_path / "run"
    fails(call(*command, "oasis2d", "--data", tmp_path / "no"), "no (from data) is not a folder")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PAIRDIFF_DEVICE", "")  # so that it is restored after the test
    fails(call(*command, "phantom2d", "--device", "cuda"), "asks for cuda, but torch finds no GPU")
    assert not folder.exists()
    monkeypatch.setenv("PAIRDIFF_DEVICE", "")
    folder.write_text("")
    fails(call(*command[:3], folder / "run", "--dataset", "phantom2d"), "run/run cannot be written")


@pytest.mark.parametrize(
    "arguments",
    ["everything --dataset phantom2d", "evaluate --dataset phantom2d", "vqae --dataset mnist", "vqae",
     "vqae --dataset phantom2d --profile huge", "vqae --dataset phantom2d --seed -1",
     "vqae --dataset phantom2d --seed 2147483648", "vqae --dataset phantom2d --device gpu"],
)  # fmt: skip
def test_wrong_use_of_run(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    fails(call("run", *arguments.split()), code=2)
    assert not os.listdir()


# ---------------------------------------------------------------------------------------------- register


@pytest.mark.parametrize("form", ["itk", "l2r"])
@pytest.mark.parametrize("shape", [SHAPE, (40, 36, 1)])
def test_register_brings_the_moving_onto_the_fixed(tmp_path, shape, form):
    values, wanted = (np.roll(box(shape, dtype=np.int16) * 9, shift, axis=0) for shift in (3, 0))
    fixed, moving = write(tmp_path / "f.nii.gz", wanted), write(tmp_path / "m.nii.gz", values)
    out, warped = tmp_path / "u.nii.gz", tmp_path / "w.nii.gz"
    works(call("register", fixed, moving, "--out", out, "--warped", warped, "--format", form, "--steps", 15))
    assert nib.load(out).shape == ((*shape, 1, 3) if form == "itk" else (*shape, 3))
    image = nib.load(warped)
    assert image.get_data_dtype() == np.int16 and image.shape == shape
    assert (np.asarray(image.dataobj) == wanted).mean() > 0.98 > (values == wanted).mean()


def test_register_by_a_network(files, tmp_path, trained_3d):
    run, network = trained_3d
    common = ("register", *files, "--run", run.path, "--format", "l2r", "--out")
    result = works(call(*common, tmp_path / "u.nii.gz", "--steps", 0))
    assert "note" not in result.stderr
    pairs = replace(run.train[0], labels=torch.from_numpy(np.stack([box(SHAPE), box(SHAPE, 2)]))[None], landmarks=None,
                    displacement=None)  # fmt: skip
    expected = registration.register(pairs, run.profile, network.model, instance=False).displacement[0]
    alone = nib.load(tmp_path / "u.nii.gz").get_fdata()
    np.testing.assert_allclose(alone, expected.movedim(0, -1), atol=1e-4)
    works(call(*common, tmp_path / "v.nii.gz", "--steps", 2, "--network", "synthetic"))
    assert not np.allclose(nib.load(tmp_path / "v.nii.gz").dataobj, alone)


def test_register_by_a_pretrained_model(tmp_path):
    values = box((160, 192, 1)) * 3
    paths = (
        write(tmp_path / "f.nii.gz", values, np.eye(4)),
        write(tmp_path / "m.nii.gz", np.roll(values, 4, 0), np.eye(4)),
    )
    result = works(call("register", *paths, "--out", tmp_path / "u.nii.gz", "--run", "oasis2d-laptop", "--steps", 0))
    before, after = (float(word.strip(",")) for word in result.stdout.split()[2:5:2])
    assert after > before


def test_what_does_not_fit_the_network_is_noted(files, tmp_path, trained_3d):
    for path in files:
        write(path, np.asarray(nib.load(path).dataobj), np.diag([0.1, 0.1, 0.1, 1.0]))
    result = works(call("register", *files, "--out", tmp_path / "u.nii", "--run", trained_3d[0].path, "--steps", 0))
    assert "trained at 4 x 4 x 4 mm; these voxels of 0.1 x 0.1 x 0.1 mm do not fit" in result.stderr
    assert "trained on axes that run to LPS, these run to RAS" in result.stderr


def test_fewer_levels_give_another_field(files, tmp_path):
    found = []
    for levels in (1, 2, 3):
        works(call("register", *files, "--out", tmp_path / "u.nii", "--levels", levels, "--steps", 2))
        found.append(nib.load(tmp_path / "u.nii").get_fdata())
    assert not np.allclose(found[0], found[1]) and not np.allclose(found[1], found[2])


BROKEN = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "elsewhere": lambda path: write(path, box(SHAPE), np.eye(4)),
    "fractions": lambda path: write(path, box(SHAPE).astype(np.float32) / 3),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_file_is_one_line_and_older_outputs_stay(files, tmp_path, kind):
    BROKEN[kind](files[1])
    out, warped = tmp_path / "u.nii.gz", tmp_path / "w.nii.gz"
    out.write_bytes(b"older")
    before = sorted(os.listdir(tmp_path))
    fails(call("register", *files, "--out", out, "--warped", warped), str(files[1]))
    assert out.read_bytes() == b"older" and sorted(os.listdir(tmp_path)) == before


def test_what_cannot_be_written_is_reported_before_anything_is_read(tmp_path):
    missing = (tmp_path / "no.nii", tmp_path / "none.nii")
    out = tmp_path / "no folder" / "u.nii.gz"
    fails(call("register", *missing, "--out", out), "cannot be written", str(out))
    (tmp_path / "u.nii").mkdir()
    fails(call("register", *missing, "--out", tmp_path / "u.nii"), "is a folder")


@pytest.mark.parametrize(
    "options",
    ["", "--out u.png", "--out u.nii --format ants", "--out u.nii --steps -1", "--out u.nii --steps many",
     "--out u.nii --levels 0", "--out u.nii --warped u.nii", "--out u.nii --warped w.txt", "--out moving.nii.gz",
     "--out u.nii --network real"],
)  # fmt: skip
def test_wrong_use_of_register(files, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    before = files[1].read_bytes()
    fails(call("register", "fixed.nii.gz", "moving.nii.gz", *options.split()), code=2)
    assert sorted(os.listdir()) == ["fixed.nii.gz", "moving.nii.gz"] and files[1].read_bytes() == before


def test_a_network_that_cannot_be_used(files, tmp_path, trained_3d):
    command, run = ("register", *files, "--out", tmp_path / "u.nii", "--run"), trained_3d[0].path
    fails(call(*command, tmp_path), "holds no config.json")
    fails(call(*command, "lungs"), "lungs is no folder and no pretrained model", "oasis2d-laptop")
    fails(call(*command, run, "--network", "best"), "holds no registration-best", "synthetic")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "registration-synthetic.safetensors"):
        (damaged / name).write_bytes((run / name).read_bytes()[:5000])
    fails(call(*command, damaged), "damaged/registration-synthetic.safetensors is not a readable")
    fails(call(*command, "oasis2d-laptop"), f"{files[0]} has 3 axes, but the network knows images with 2")
    assert not (tmp_path / "u.nii").exists()


angles = st.floats(-3.1, 3.1)


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], np.ndarray]:
    """A shape of one to thirteen voxels a side, and any place and direction that NIfTI knows."""
    shape = tuple(draw(st.lists(st.integers(1, 13), min_size=2, max_size=3)))
    affine = np.eye(4)
    for axis in range(3):
        angle, turn, (i, j) = draw(angles), np.eye(4), [other for other in range(3) if other != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        affine = affine @ turn
    affine[:3, :3] *= [draw(st.floats(0.05, 20.0)) * draw(st.sampled_from([-1, 1])) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-500, 500)) for _ in range(3)]
    return shape, affine


TYPES = [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64, np.float32, np.float64]


@settings(BOUNDED, max_examples=60)
@given(
    grid=grids(),
    dtypes=st.tuples(*[st.sampled_from(TYPES)] * 2),
    values=st.lists(st.integers(-100, 100), min_size=1, max_size=4),
    seed=st.integers(0, 9999),
    network=st.booleans(),
)
def test_register_copes_with_any_volume(trained_3d, tmp_path, grid, dtypes, values, seed, network):
    """It writes a finite field and warped labels that fit, or says in one line why not and writes nothing."""
    (shape, affine), random = grid, np.random.default_rng(seed)
    images = [random.choice([0, *values], shape).astype(dtype) for dtype in dtypes]
    paths = [write(tmp_path / f"{index}.nii", image, affine) for index, image in enumerate(images)]
    out, warped = tmp_path / "u.nii", tmp_path / "w.nii"
    for path in (out, warped):
        path.unlink(missing_ok=True)
    chosen = ["--run", trained_3d[0].path] if network and len(shape) == 3 else []
    result = call("register", *paths, "--out", out, "--warped", warped, "--steps", 1, *chosen)
    if result.exit_code:
        fails(result, str(tmp_path))
        assert not out.exists() and not warped.exists()
        reasons = "is empty|hold only the value|holds the label|has 2 axes"
        assert any(reason in result.stderr for reason in reasons.split("|")), result.stderr
        return
    field, labels = nib.load(out), nib.load(warped)
    assert field.shape == (*(*shape, 1)[:3], 1, 3) and np.isfinite(field.get_fdata()).all()
    np.testing.assert_allclose(field.affine, affine, rtol=1e-4, atol=1e-3)
    assert labels.shape == shape and labels.get_data_dtype() == dtypes[1]
    assert set(np.unique(labels.dataobj)) <= set(np.unique(images[1]))


# ---------------------------------------------------------------------------------------------- evaluate


def evaluated(*arguments: object, json_file: Path) -> dict:
    """What ``pairdiff evaluate`` writes; every case has its line on stdout, and stderr is empty."""
    result = works(call("evaluate", *arguments, "--json", json_file))
    found = json.loads(json_file.read_text())
    assert not result.stderr, "no bar where there is no terminal"
    for case, line in zip(found["cases"], result.stdout.splitlines(), strict=False):
        assert line.startswith(case["name"]) and f"Dice {case['dice']:.3f}" in line
    assert f"{'dice':26} {found['summary']['dice']:.4g}" in result.stdout
    return found


@pytest.mark.parametrize("options, by_network", [("--method baseline --levels 1 --steps 2", False),
                                                 ("--method network --network real", True), ("", True)])  # fmt: skip
def test_evaluate_has_the_numbers_of_the_registrar(tmp_path, trained, options, by_network):
    run, made = trained
    chosen = ("--dataset", "phantom2d", "--run", run.path, *options.split())
    found = evaluated(*chosen, json_file=tmp_path / "e.json")
    network = made.networks["real" if "real" in options else "synthetic"] if by_network else None
    profile = run.profile if by_network else with_levels(run.profile, 1, 2)
    registered = registration.register(run.validation, profile, network and network.model, instance=not options)
    expected = registration.score(run.validation, registered)
    assert [case["name"] for case in found["cases"]] == list(run.validation.names)
    for name in ("dice", "tre_mm", "hd95_mm", "folding_percent", "log_jacobian_sd", "inverse_consistency_error"):
        assert found["summary"][name] == pytest.approx(expected[name], abs=1e-3)
    assert found["summary"]["tre_all"]["p95"] == pytest.approx(expected["tre_all"]["p95"], abs=1e-3)
    assert len(found["cases"][0]["errors_mm"]) == len(run.validation.landmarks[0])
    made_by = found["provenance"]
    assert (made_by["profile"], made_by["split"], made_by["pairs"]) == ("quick", "validation", len(run.validation))
    assert made_by["method"] == ("network+instance" if not options else options.split()[1])
    assert made_by.get("network") == (network.fingerprint if network else None)
    assert made_by["settings"] == to_json(profile.registration)


def test_evaluate_measures_the_cases_of_the_folder(small, lung_folder, tmp_path):
    chosen = ("--dataset", "lung250m", "--data", lung_folder)
    found = evaluated(*chosen, "--method", "before", json_file=tmp_path / "e.json")
    assert found["summary"]["tre_mm"] == pytest.approx(2.0, rel=1e-3)  # mm; the moving one is shifted by two
    for more, names in ((("--cases", "2,054"), ["002", "054"]), (("--split", "test"), ["104"])):
        found = evaluated(*chosen, *more, json_file=tmp_path / "e.json")
        assert [case["name"] for case in found["cases"]] == [f"case_{name}_1~case_{name}_2" for name in names]
    fails(call("evaluate", *chosen, "--cases", "036"), "036")
    fails(call("evaluate", "--dataset", "phantom2d", "--split", "test"), "phantom2d has no split 'test'")


@pytest.mark.parametrize(
    "options, environment, expected",
    [("", "", "laptop"), ("", "quick", "quick"), ("--profile paper", "quick", "paper")],
)
def test_the_profile_of_evaluate(no_data_set, monkeypatch, tmp_path, options, environment, expected):
    for name in PROFILES[2]:
        one = replace(get_profile(name), spatial=(48, 64), num_labels=5, max_pairs=1, phantom_subjects=3)
        monkeypatch.setitem(PROFILES[2], name, with_levels(one, levels=1, steps=1))
    monkeypatch.setenv("PAIRDIFF_PROFILE", environment)
    made_by = evaluated("--dataset", "phantom2d", *options.split(), json_file=tmp_path / "e.json")["provenance"]
    assert (made_by["profile"], made_by["seed"], made_by["pairs"]) == (expected, 0, 1)


def test_bad_evaluations(small, tmp_path, trained_3d):
    older, empty = tmp_path / "e.json", tmp_path / "empty"
    older.write_text("older")
    empty.mkdir()
    command = ("evaluate", "--json", older, "--dataset")
    fails(call(*command, "lung250m", "--data", empty), str(empty), "holds none of")
    fails(call(*command, "lung250m", "--data", tmp_path / "no"), "is not a folder")
    fails(call(*command, "phantom2d", "--run", trained_3d[0].path), "knows other axes or labels than phantom2d has")
    fails(call("evaluate", "--dataset", "phantom3d", "--json", empty), "is a folder")
    assert older.read_text() == "older"


@pytest.mark.parametrize(
    "options",
    ["", "--dataset mnist", "--dataset phantom2d --profile huge", "--dataset phantom2d --method luck",
     "--dataset phantom2d --method network", "--dataset phantom2d --network real", "--dataset phantom2d --seed x",
     "--dataset phantom2d --seed -1", "--dataset phantom2d --split train"],
)  # fmt: skip
def test_wrong_use_of_evaluate(options):
    fails(call("evaluate", *options.split()), code=2)


def test_a_profile_from_the_environment_that_there_is_not_is_wrong_use(no_data_set, monkeypatch):
    monkeypatch.setenv("PAIRDIFF_PROFILE", "huge")
    fails(call("evaluate", "--dataset", "phantom2d"), "PAIRDIFF_PROFILE", code=2)


@settings(BOUNDED, max_examples=15)
@given(
    shapes=st.tuples(*[st.tuples(*[st.integers(1, 300)] * 3)] * 2),
    dtype=st.sampled_from(TYPES),
    spacing=st.sampled_from([1.0, 0.998, 1.3]),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    same=st.booleans(),
)
def test_evaluate_copes_with_any_volume(small, tmp_path, shapes, dtype, spacing, flips, same):
    """It writes a file of real numbers, or says in one line why not and leaves the older one."""
    folder, file = tmp_path / "lung250m", tmp_path / "e.json"
    affine = np.diag([*(np.array(flips) * spacing), 1.0])
    for number, shape in ((1, shapes[0]), (2, shapes[0] if same else shapes[1])):
        write(folder / "dilated_vessels_ts" / f"case_002_{number}.nii", box(shape, dtype=dtype), affine)
    file.write_text("older")
    result = call("evaluate", "--dataset", "lung250m", "--data", folder, "--method", "before", "--json", file)
    if result.exit_code:
        fails(result, "case_002_")
        assert file.read_text() == "older"
        assert not same or spacing == 1.3 or "no vessel" in result.stderr
        return

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the file")

    found = json.loads(file.read_text(), parse_constant=refuse)
    assert len(found["cases"]) == 1 and found["summary"]["dice"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------ export


def test_export(trained, trained_3d, tmp_path):
    fails(call("export", "--run", trained_3d[0].path, "--to", tmp_path / "pairs"), "vqae")
    fails(call("export", "--run", tmp_path / "no", "--to", tmp_path / "pairs"), "no folder and no pretrained model")
    fails(call("export", "--run", trained[0].path), code=2)
    assert not os.listdir(tmp_path)
    result = works(call("export", "--run", trained[0].path, "--to", tmp_path / "pairs"))
    assert result.stdout == f"8 pairs are in {tmp_path / 'pairs'}\n" and not result.stderr
    assert len(list((tmp_path / "pairs" / "imagesTr").iterdir())) == 16
