"""The command ``pairdiff``: what each command does, and how it fails: one line, the right code, nothing lost."""

from __future__ import annotations

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
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import small_run, small_run_3d
from typer.testing import CliRunner, Result

from pairdiff_core import cli, evaluation, pipeline, volume_registration
from pairdiff_core.data import fetch

SHAPE = (20, 18, 16)
COMMANDS = ("info", "fetch", "run", "register", "evaluate", "export")
BOUNDED = settings(
    deadline=None,
    derandomize=True,  # the same cases each time: a failure is the change's, not the dice's
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of phantom lungs with one registration network, called "synthetic"."""
    small = small_run_3d(tmp_path_factory.mktemp("run"))
    pipeline.train_registration(small, small.train[:2], "synthetic")
    return small.path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, no_data_set: None) -> None:
    """The quick profiles are those of the small runs, so that commands take seconds."""
    profiles = {2: small_run("unused").profile, 3: small_run_3d("unused").profile}
    few = {dims: replace(profile, max_pairs=2) for dims, profile in profiles.items()}
    few[3] = volume_registration.with_levels(few[3], steps=2)
    monkeypatch.setattr(cli, "get_profile", lambda name=None, dims=2: few[dims])


# ------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0 and f"pairdiff {command}" in result.stdout.partition("Example:")[2]


def test_help_lists_the_commands():
    listed = call("--help").stdout
    assert all(command in listed for command in COMMANDS)


def test_the_module_is_the_command(files, tmp_path):
    """Once for real, with its own interpreter: codes and streams are what a shell sees."""
    command = [sys.executable, "-m", "pairdiff_core", "register", *map(str, files), "--steps", "1", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "u.nii.gz")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "Dice" in done.stdout and not done.stderr
    files[1].write_bytes(b"")
    done = subprocess.run(
        [*command, str(tmp_path / "v.nii.gz")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"pairdiff: {files[1]} is") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError(), "memory ran out. Take a smaller profile"),
        (torch.OutOfMemoryError("CUDA out of memory."), "memory ran out"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "memory ran out",
        ),
        (PermissionError(13, "Permission denied", "/some/file"), "/some/file: Permission denied"),
    ],
)
def test_expected_errors_are_one_line(files, tmp_path, monkeypatch, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(volume_registration, "register_without_training", fail)
    (tmp_path / "u.nii").write_bytes(b"older")
    fails(call("register", *files, "--out", tmp_path / "u.nii"), said)
    assert (tmp_path / "u.nii").read_bytes() == b"older"


def test_a_mistake_in_the_program_is_not_hidden(files, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(volume_registration, "register_without_training", fail)
    result = call("register", *files, "--out", tmp_path / "u.nii")
    assert isinstance(result.exception, RuntimeError) and "do not match" in str(result.exception)


# ------------------------------------------------------------------------------------------ info and fetch


def test_info(no_data_set, monkeypatch, oasis_folder):
    monkeypatch.setenv("PAIRDIFF_OASIS2D", str(oasis_folder))
    monkeypatch.setenv("PAIRDIFF_PROFILE", "paper")
    told = call("info")
    assert told.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in told.stdout.splitlines())
    assert "torch" in rows["versions"] and rows["profiles"].endswith("chosen: paper")
    assert rows["oasis2d"] == str(oasis_folder) and rows["lung250m"].startswith("not found")
    assert "oasis2d-laptop" in rows["models"] and "GB free" in rows["runs"]
    assert rows["device"].endswith(("32 bit throughout", "bfloat16 where a profile allows it"))


def test_info_tells_a_profile_that_there_is_not(no_data_set, monkeypatch):
    monkeypatch.setenv("PAIRDIFF_PROFILE", "huge")
    told = call("info")
    assert told.exit_code == 0 and "PAIRDIFF_PROFILE is 'huge', but the profiles are" in told.stdout


@pytest.mark.parametrize("name", ["oasis2d", "lung250m"])
def test_fetch(tmp_path, monkeypatch, name):
    asked = []

    def download(to, *, progress):
        asked.append((to, progress))
        return to / "folder"

    monkeypatch.setattr(fetch, f"fetch_{name}", download)
    result = call("fetch", name, "--to", tmp_path)
    assert result.exit_code == 0 and str(tmp_path / "folder") in result.stdout
    assert asked == [(tmp_path, False)], "no bar where there is no terminal"


def test_fetch_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    monkeypatch.setattr(fetch, "OASIS2D", replace(fetch.OASIS2D, url="http://127.0.0.1:1/file.tar"))
    monkeypatch.setattr(fetch.fetch_oasis2d, "__kwdefaults__", {"remote": fetch.OASIS2D, "progress": False})
    fails(call("fetch", "oasis2d", "--to", tmp_path), "could not be downloaded", "By hand")
    fails(call("fetch", "mnist", "--to", tmp_path), "mnist", code=2)


# ---------------------------------------------------------------------------------------------- register


def test_a_run_that_is_paused_goes_on(small, tmp_path):
    """Each time one step further; in the end the folder tells everything."""
    command = ("run", "all", "--dataset", "phantom2d", "--run", tmp_path, "--pairs", 9)
    for step in (1, 2):
        paused = call(*command, "--max-minutes", 0)
        assert paused.exit_code == 0 and f"0 minutes are over: paused after step {step}" in paused.stderr
        assert f"{tmp_path} keeps what is done; the same command goes on" in paused.stderr
    assert not (tmp_path / "vqae.safetensors").exists()
    assert call("run", "tokens", *command[2:]).exit_code == 0
    assert (tmp_path / "tokens.safetensors").exists() and not (tmp_path / "denoiser.safetensors").exists()
    done = call(*command)
    assert done.exit_code == 0, done.output
    assert f"vqae: found in {tmp_path.name}" in done.stdout and "denoiser: trained in" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["synthetic"]["pairs"] == 9
    assert f"dice_synthetic             {metrics['summary']['dice_synthetic']:.4g}" in done.stdout
    for name in ("config.json", "log.csv", "provenance.json", "registration-synthetic.safetensors"):
        assert (tmp_path / name).exists()
    fails(call(*command, "--seed", 1), f"{tmp_path} holds another run (seed 0)")
    fails(
        call("run", "all", "--dataset", "phantom3d", "--run", tmp_path),
        "holds another run (dataset phantom2d)",
    )
    fails(call(*command[:-1], 8), "synthesis.safetensors was made with other settings (numbers differ")


def test_a_signal_pauses_and_says_so(tmp_path, no_data_set):
    command = [
        sys.executable,
        "-m",
        "pairdiff_core",
        "run",
        "vqae",
        "--dataset",
        "phantom2d",
        "--profile",
        "quick",
    ]
    run = subprocess.Popen(
        [*command, "--run", tmp_path / "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, said = run.communicate(timeout=60)
    assert run.returncode == 1 and out == ""
    assert len(said.splitlines()) == 1 and said.startswith("SIGTERM came: paused after step")
    assert (tmp_path / "run" / "vqae.part").exists()


def test_the_stages_have_the_names_that_the_readme_and_schedulers_use():
    names = ["all", "vqae", "tokens", "diffusion", "synthesise", "registration", "evaluate"]
    assert list(cli.StageName) == names


def test_runs_that_cannot_be(small, tmp_path, monkeypatch):
    command = ("run", "vqae", "--dataset", "phantom2d", "--run", tmp_path / "run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PAIRDIFF_DEVICE", "")  # so that it is restored after the test
    fails(call(*command, "--device", "cuda"), "asks for cuda, but torch finds no GPU")
    monkeypatch.setenv("PAIRDIFF_DEVICE", "")
    fails(call("run", "everything", *command[2:]), "'everything'", code=2)
    fails(call(*command, "--profile", "huge"), "'huge'", code=2)
    (tmp_path / "file").write_text("")
    fails(call(*command[:-1], tmp_path / "file" / "run"), "file/run cannot be written")

    def overflow(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "train_vqae", overflow)
    fails(call(*command), "memory ran out", "smaller profile", "batch")


@pytest.mark.parametrize("form", ["itk", "l2r"])
@pytest.mark.parametrize("shape", [SHAPE, (40, 36, 1)])
def test_register_brings_the_moving_onto_the_fixed(tmp_path, shape, form):
    values = np.roll(box(shape, dtype=np.int16) * 9, 3, axis=0)
    fixed = write(tmp_path / "f.nii.gz", box(shape, dtype=np.int16) * 9)
    moving = write(tmp_path / "m.nii.gz", values)
    out, warped = tmp_path / "u.nii.gz", tmp_path / "w.nii.gz"
    result = call(
        "register", fixed, moving, "--out", out, "--warped", warped, "--format", form, "--steps", 15
    )
    assert result.exit_code == 0, result.stderr
    assert nib.load(out).shape == ((*shape, 1, 3) if form == "itk" else (*shape, 3))
    image = nib.load(warped)
    assert image.get_data_dtype() == np.int16 and image.shape == shape
    agreement = (np.asarray(image.dataobj) == box(shape) * 9).mean()
    assert agreement > 0.98 > (values == box(shape) * 9).mean()
    if form == "itk":
        read, grid, image = (sitk.ReadImage(str(path)) for path in (out, fixed, moving))
        if shape[2] == 1:  # ITK reads the field of one slice as a flat image of 3D vectors
            read = sitk.JoinSeries(read)
            read.CopyInformation(grid)
        field = sitk.DisplacementFieldTransform(sitk.Cast(read, sitk.sitkVectorFloat64))
        resampled = sitk.GetArrayFromImage(sitk.Resample(image, grid, field, sitk.sitkNearestNeighbor)).T
        assert (resampled == np.asarray(nib.load(warped).dataobj)).mean() > 0.99


def test_register_by_a_network(files, tmp_path, run):
    out = tmp_path / "u.nii.gz"
    result = call("register", *files, "--out", out, "--run", run, "--steps", 0, "--format", "l2r")
    assert result.exit_code == 0, result.stderr
    found = volume_registration.register_by_network(
        torch.from_numpy(np.stack([box(SHAPE), box(SHAPE, 2)])),
        (4.0, 4.0, 4.0),
        volume_registration.load_trained(run),
    )
    np.testing.assert_allclose(nib.load(out).get_fdata(), found.displacement[0].movedim(0, -1), atol=1e-4)
    assert "note" not in result.stderr
    more = call(
        "register", *files, "--out", tmp_path / "v.nii.gz", "--run", run, "--steps", 2, "--format", "l2r"
    )
    assert more.exit_code == 0 and not np.allclose(
        nib.load(tmp_path / "v.nii.gz").dataobj, nib.load(out).dataobj
    )


def test_register_by_a_provided_model(tmp_path):
    shape = (160, 192, 1)
    fixed = write(tmp_path / "f.nii.gz", box(shape) * 3, np.eye(4))
    moving = write(tmp_path / "m.nii.gz", np.roll(box(shape) * 3, 4, axis=0), np.eye(4))
    result = call(
        "register", fixed, moving, "--out", tmp_path / "u.nii.gz", "--run", "oasis2d-laptop", "--steps", 0
    )
    assert result.exit_code == 0, result.stderr
    before, after = (float(word.strip(",")) for word in result.stdout.split()[2:5:2])
    assert after > before


def test_what_does_not_fit_the_network_is_noted(files, tmp_path, run):
    for path in files:
        write(path, np.asarray(nib.load(path).dataobj), np.diag([0.1, 0.1, 0.1, 1.0]))
    result = call("register", *files, "--out", tmp_path / "u.nii", "--run", run, "--steps", 0)
    assert result.exit_code == 0 and result.stderr.count("note: ") == 2


BROKEN = {
    "missing": lambda path: path.unlink(),
    "no nifti": lambda path: path.write_bytes(b"no image" * 100),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "other shape": lambda path: write(path, box((9, 9, 9))),
    "elsewhere": lambda path: write(path, box(SHAPE), np.eye(4)),
    "empty": lambda path: write(path, np.zeros(SHAPE, np.uint8)),
    "nan": lambda path: write(path, np.full(SHAPE, np.nan, np.float32)),
    "fractions": lambda path: write(path, box(SHAPE).astype(np.float32) / 3),
    "in time": lambda path: write(path, np.ones((*SHAPE, 2), np.uint8)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_file_is_one_line_and_older_outputs_stay(files, tmp_path, kind):
    BROKEN[kind](files[1])
    (tmp_path / "u.nii.gz").write_bytes(b"older")
    (tmp_path / "w.nii.gz").write_bytes(b"older still")
    before = sorted(os.listdir(tmp_path))
    fails(
        call("register", *files, "--out", tmp_path / "u.nii.gz", "--warped", tmp_path / "w.nii.gz"),
        str(files[1]),
    )
    assert (tmp_path / "u.nii.gz").read_bytes() == b"older"
    assert (tmp_path / "w.nii.gz").read_bytes() == b"older still"
    assert sorted(os.listdir(tmp_path)) == before


def test_what_cannot_be_written_is_told_before_anything_is_read(tmp_path):
    missing = (tmp_path / "no.nii", tmp_path / "none.nii")
    out = tmp_path / "no folder" / "u.nii.gz"
    fails(call("register", *missing, "--out", out), "cannot be written", str(out))
    (tmp_path / "u.nii").mkdir()
    fails(call("register", *missing, "--out", tmp_path / "u.nii"), "is a folder")


@pytest.mark.parametrize(
    "options",
    [
        ["--out", "u.png"],
        ["--out", "u.nii", "--format", "ants"],
        ["--out", "u.nii", "--steps", "-1"],
        ["--out", "u.nii", "--steps", "many"],
        ["--out", "u.nii", "--levels", "0"],
        ["--out", "u.nii", "--warped", "u.nii"],
        ["--out", "u.nii", "--warped", "w.txt"],
        [],
    ],
)
def test_wrong_use_of_register(files, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    fails(call("register", *files, *options), code=2)
    assert sorted(os.listdir()) == ["fixed.nii.gz", "moving.nii.gz"]


def test_inputs_are_not_written_over(files):
    before = files[1].read_bytes()
    fails(call("register", *files, "--out", files[1]), "named twice", code=2)
    assert files[1].read_bytes() == before


def test_a_run_that_is_none(files, tmp_path, run):
    out = ["--out", tmp_path / "u.nii"]
    fails(call("register", *files, *out, "--run", tmp_path), "holds no finished stage")
    fails(
        call("register", *files, *out, "--run", "lungs"),
        "lungs is no folder and no provided model",
        "oasis2d-laptop",
    )
    fails(
        call("register", *files, *out, "--run", run, "--network", "best"),
        "holds no network 'best'; it holds: syn",
    )
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    content = bytearray((run / "registration-synthetic.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "registration-synthetic.safetensors").write_bytes(content)
    fails(
        call("register", *files, *out, "--run", damaged), "is damaged", "registration-synthetic.safetensors"
    )
    fails(call("register", *files, *out, "--run", "oasis2d-laptop"), "was trained on slices")
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


@settings(BOUNDED, max_examples=100)
@given(
    grid=grids(),
    dtypes=st.tuples(*[st.sampled_from(TYPES)] * 2),
    values=st.lists(st.integers(-100, 100), min_size=1, max_size=4),
    seed=st.integers(0, 9999),
    network=st.booleans(),
)
def test_register_copes_with_any_volume(run, tmp_path, grid, dtypes, values, seed, network):
    """It writes a finite field and warped labels that fit, or says in one line why not and writes nothing."""
    (shape, affine), random = grid, np.random.default_rng(seed)
    network = network and len(shape) == 3
    images = [random.choice([0, *values], shape).astype(dtype) for dtype in dtypes]
    paths = [write(tmp_path / f"{index}.nii", image, affine) for index, image in enumerate(images)]
    out, warped = tmp_path / "u.nii", tmp_path / "w.nii"
    for path in (out, warped):
        path.unlink(missing_ok=True)
    chosen = ["--run", run] if network else []
    result = call("register", *paths, "--out", out, "--warped", warped, "--steps", 1, *chosen)
    if result.exit_code:
        fails(result, str(tmp_path))
        assert not out.exists() and not warped.exists()
        reasons = "is empty|nothing but the value|holds the label|is one of slices"
        assert any(reason in result.stderr for reason in reasons.split("|")), result.stderr
        return
    field, labels = nib.load(out), nib.load(warped)
    assert field.shape == (*(*shape, 1)[:3], 1, 3) and np.isfinite(field.get_fdata()).all()
    np.testing.assert_allclose(field.affine, affine, rtol=1e-4, atol=1e-3)
    assert labels.shape == shape and labels.get_data_dtype() == dtypes[1]
    assert set(np.unique(labels.dataobj)) <= set(np.unique(images[1]))


# ---------------------------------------------------------------------------------------------- evaluate


def test_evaluate(small, tmp_path, run):
    file = tmp_path / "e.json"
    common = ["evaluate", "--dataset", "phantom3d", "--run", run, "--json", file]
    result = call(*common, "--method", "network")
    assert result.exit_code == 0, result.stderr
    told = json.loads(file.read_text())
    lines = result.stdout.splitlines()
    for case, line in zip(told["cases"], lines, strict=False):
        assert line.startswith(case["name"]) and f"-> {case['tre']:.2f} mm" in line
    wanted = (
        "tre_mean tre_before tre_p25 tre_p50 tre_p75 tre_p95 tre_worst30 folding_percent inverse_error_voxel"
    )
    assert {*wanted.split(), "seconds_per_pair", "dice_mean", "dice_before"} == set(told["summary"])
    made_by = told["provenance"]
    assert (made_by["method"], made_by["profile"], made_by["split"]) == ("network", "quick", "test")
    assert told["summary"]["tre_mean"] == pytest.approx(
        np.mean([case["tre"] for case in told["cases"]]), rel=1e-4
    )
    assert not result.stderr, "no bar where there is no terminal"


def test_the_first_levels_alone(small, files, tmp_path, monkeypatch):
    """A file tells which levels it was measured with, and fewer of them give another field."""
    profile, found = cli.get_profile(dims=3), {}
    baseline = tuple(profile.registration.baseline[0]._replace(scale=scale) for scale in (4, 2, 1))
    profile = replace(profile, registration=replace(profile.registration, baseline=baseline))
    monkeypatch.setattr(cli, "get_profile", lambda name=None, dims=3: profile)
    for levels in (1, 2, 3):
        told = tmp_path / f"{levels}.json"
        result = call("evaluate", "--dataset", "phantom3d", "--levels", levels, "--json", told)
        assert result.exit_code == 0, result.stderr
        made_by = json.loads(told.read_text())["provenance"]
        assert [level["scale"] for level in made_by["levels"]] == [4, 2, 1][:levels]
        out = tmp_path / f"{levels}.nii.gz"
        result = call("register", *files, "--out", out, "--levels", levels, "--steps", 2, "--format", "l2r")
        assert result.exit_code == 0, result.stderr
        found[levels] = nib.load(out).get_fdata()
    assert not np.allclose(found[1], found[2]) and not np.allclose(found[2], found[3])


def test_evaluate_measures_the_pairs_of_the_folder(small, lung_folder, tmp_path):
    result = call("evaluate", "--dataset", "lung250m", "--data", lung_folder, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.stderr
    told = json.loads((tmp_path / "e.json").read_text())
    assert {case["name"] for case in told["cases"]} <= {
        f"case_{n}_1~case_{n}_2" for n in ("002", "054", "114")
    }
    assert told["summary"]["tre_before"] == pytest.approx(
        2.0, rel=1e-3
    )  # mm; the moving one is shifted by two


@pytest.mark.parametrize(
    "given_, environment, expected",
    [([], None, "laptop"), ([], "quick", "quick"), (["--profile", "paper"], "quick", "paper")],
)
def test_the_profile_of_evaluate(no_data_set, monkeypatch, tmp_path, given_, environment, expected):
    measured = []
    monkeypatch.setattr(evaluation, "evaluate", lambda run, *_: measured.append(run) or iter([]))
    monkeypatch.setattr("pairdiff_core.runs.data_sets.load_pairs", lambda *_, **__: [])
    if environment:
        monkeypatch.setenv("PAIRDIFF_PROFILE", environment)
    assert call("evaluate", "--dataset", "phantom2d", *given_).exit_code == 0
    assert measured[0].profile.name == expected and measured[0].seed == 0


def test_bad_evaluations(small, monkeypatch, tmp_path, run):
    older = tmp_path / "e.json"
    older.write_text("older")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(
        call("evaluate", "--dataset", "lung250m", "--data", empty, "--json", older),
        str(empty),
        "holds none of",
    )
    fails(
        call("evaluate", "--dataset", "lung250m", "--data", tmp_path / "no", "--json", older),
        "is not a folder",
    )
    fails(
        call("evaluate", "--dataset", "phantom2d", "--run", run, "--json", older), "knows images with 3 axes"
    )
    fails(call("evaluate", "--dataset", "phantom3d", "--json", empty), "is a folder")
    assert older.read_text() == "older"


@pytest.mark.parametrize(
    "options",
    [
        ["--dataset", "mnist"],
        ["--dataset", "phantom2d", "--profile", "huge"],
        ["--dataset", "phantom2d", "--method", "luck"],
        ["--dataset", "phantom2d", "--method", "network"],
        ["--dataset", "phantom2d", "--seed", "x"],
        [],
    ],
)
def test_wrong_use_of_evaluate(options):
    fails(call("evaluate", *options), code=2)


def test_a_profile_from_the_environment_that_there_is_not_is_wrong_use(no_data_set, monkeypatch):
    monkeypatch.setenv("PAIRDIFF_PROFILE", "huge")
    fails(call("evaluate", "--dataset", "phantom2d"), "PAIRDIFF_PROFILE", code=2)


@settings(BOUNDED, max_examples=20)
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
    result = call("evaluate", "--dataset", "lung250m", "--data", folder, "--json", file)
    if result.exit_code:
        fails(result, "case_002_")
        assert file.read_text() == "older"
        assert not same or spacing == 1.3 or "no vessel" in result.stderr
        return

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the file")

    told = json.loads(file.read_text(), parse_constant=refuse)
    assert len(told["cases"]) == 1 and told["summary"]["dice_before"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------ export


def test_export(tmp_path, run, monkeypatch):
    fails(call("export", "--run", run, "--to", tmp_path / "pairs"), "synthesis.safetensors does not exist")
    fails(
        call("export", "--run", tmp_path / "no", "--to", tmp_path / "pairs"),
        "no folder and no provided model",
    )
    assert not os.listdir(tmp_path)
    fails(call("export", "--run", run), code=2)
    asked = []

    def export_pairs(run, to, *, progress):
        asked.append(progress)
        write(to / "imagesTr" / "a.nii", box(SHAPE))
        write(to / "imagesTr" / "b.nii", box(SHAPE))
        return to

    monkeypatch.setattr(cli, "export_pairs", export_pairs)
    result = call("export", "--run", run, "--to", tmp_path / "pairs")
    assert result.exit_code == 0 and "1 pairs are in" in result.stdout and asked == [False]
