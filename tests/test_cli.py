"""The command ``pairdiff``: what each command does, and how it fails: one line, the right code, nothing lost."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
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

from pairdiff_cli import cli, cost
from pairdiff_cli.field_files import read_field
from pairdiff_cli.one_case import displacement_on
from pairdiff_cli.volume_files import read_pair, write_field
from pairdiff_core import registration, vqae
from pairdiff_core.data import datasets, fetch, grid_affine, oasis
from pairdiff_core.data.phantom_lungs import lung_pairs
from pairdiff_core.metrics import inverse_consistency_error, target_registration_error
from pairdiff_core.pairs import PairSet
from pairdiff_core.pipeline import find_model, models, open_run, stages
from pairdiff_core.profiles import PROFILES, get_profile, to_json, with_levels

SHAPE = (20, 18, 16)
COMMANDS = ("info", "fetch", "prepare", "run", "register", "apply", "evaluate", "export")
HEAVY = {"torch", "monai", "nibabel", "numpy", "scipy", "matplotlib", "lightning_fabric", "SimpleITK"}
BOUNDED = settings(
    deadline=None,
    derandomize=True,  # the same cases each time, so that a failure is due to a change
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, with the exit code and streams that a shell sees."""
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
    """Replace the profiles quick and laptop by those of the small runs, so that commands take seconds."""
    for run in (small_run("unused"), small_run_3d("unused")):
        profile = with_levels(replace(run.profile, max_pairs=2), steps=2)
        for name in ("quick", "laptop"):
            monkeypatch.setitem(PROFILES[profile.spatial_dims], name, profile)


# ------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert command in call("--help").stdout
    assert f"pairdiff {command}" in works(call(command, "--help")).stdout.partition("Example:")[2]


WRONG_USE = {
    "": [""],
    "run": ["everything --dataset phantom2d", "evaluate --dataset phantom2d", "vqae --dataset mnist", "vqae",
            "vqae --dataset phantom2d --profile huge", "vqae --dataset phantom2d --seed -1",
            "vqae --dataset phantom2d --seed 2147483648", "vqae --dataset phantom2d --device gpu",
            "vqae --model oasis2d-laptop --to new", "synthesis --model oasis2d-laptop", "synthesis --to new",
            "synthesis --model oasis2d-laptop --to new --dataset oasis2d",
            "synthesis --model oasis2d-laptop --to new --profile quick",
            "synthesis --model oasis2d-laptop --to new --run mine",
            "synthesis --dataset oasis2d --to new", "synthesis --model oasis2d-laptop --to new --max-minutes 1"],
    "register": [f"fixed.nii.gz moving.nii.gz {options}" for options in (
        "", "--out u.png", "--out u.nii --format ants", "--out u.nii --steps -1", "--out u.nii --steps many",
        "--out u.nii --levels 0", "--out u.nii --warped u.nii", "--out u.nii --warped w.txt", "--out moving.nii.gz",
        "--out u.nii --network real", "--out u.nii --inverse u.nii", "--out u.nii --inverse v.png",
        "--out u.nii --inverse moving.nii.gz")],
    "evaluate": ["", "--dataset mnist", "--dataset phantom2d --profile huge", "--dataset phantom2d --method luck",
                 "--dataset phantom2d --method network", "--dataset phantom2d --network real",
                 "--dataset phantom2d --seed x", "--dataset phantom2d --seed -1", "--dataset phantom2d --split train",
                 "--dataset phantom2d --run r --method baseline --network real", "--dataset phantom2d --field u.nii",
                 "--dataset phantom2d --method before --steps 3", "--dataset phantom2d --landmarks a.csv b.csv",
                 "--dataset phantom2d --pair fixed.nii.gz moving.nii.gz", "--pair fixed.nii.gz",
                 *(f"--pair fixed.nii.gz moving.nii.gz {options}" for options in (
                     "--split test", "--cases 008", "--profile quick", "--seed 0", "--data .", "--levels 2",
                     "--field u.nii --method baseline", "--field u.nii --run r", "--field u.nii --steps 0",
                     "--network real", "--method network", "--json fixed.nii.gz"))],
    "apply": ["", "fixed.nii.gz moving.nii.gz", "fixed.nii.gz moving.nii.gz --out fixed.nii.gz"],
    "fetch": ["", "mnist"],
    "export": ["", "--run r"],
    "prepare": ["", "fixed", "fixed moving --csv pairs.csv", *(f"fixed moving {options}" for options in (
        "--spacing 0,1", "--spacing 2;2", "--size many", "--size 2.5,2", "--profile huge", "--to"))],
}  # fmt: skip


def test_help_and_wrong_use_import_nothing_heavy_and_write_nothing(files, tmp_path):
    """They have to answer within a second, and imports take longer. One process runs all calls: imports add up."""
    calls = [["--help"], *([command, "--help"] for command in COMMANDS)]
    calls += [[*command.split(), *options.split()] for command in WRONG_USE for options in WRONG_USE[command]]
    ask = (
        "import json, sys\nfrom typer.testing import CliRunner\nfrom pairdiff_cli import cli\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    code = CliRunner().invoke(cli.app, call).exit_code\n"
        f"    print(json.dumps([call, code, sorted({HEAVY!r} & set(sys.modules))]))"
    )
    command, before = [sys.executable, "-c", ask, json.dumps(calls)], [path.read_bytes() for path in files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [[each, 0 if "--help" in each else 2, []] for each in calls]
    assert sorted(os.listdir(tmp_path)) == ["fixed.nii.gz", "moving.nii.gz"]
    assert [path.read_bytes() for path in files] == before


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
        (MemoryError(), "memory ran out. Use coarser or cropped volumes"),
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
    fails(call("register", *files, "--out", tmp_path / "u.nii", "--overwrite"), said)
    assert (tmp_path / "u.nii").read_bytes() == b"older"


@pytest.mark.parametrize("command", cli.LESS_MEMORY)
def test_memory_advice_names_existing_options(command):
    for option in re.findall("--[a-z]+", cli.LESS_MEMORY[command]):
        assert f"{option} " in call(command, "--help").stdout


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
def test_missing_device(small, files, tmp_path, monkeypatch, command):
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


def test_fetch_may_leave_out_what_only_says_how_people_breathe(tmp_path, monkeypatch):
    names = ["imagesTr/case_1.nii.gz", "corrs/case.csv", "corrs/other.csv"]
    names = [
        name.replace("imagesTr", fetch.TRAIN_FOLDERS[-1]).replace("corrs", fetch.CORRESPONDENCES) for name in names
    ]
    registry, folder = tmp_path / "registry.txt", tmp_path / "lung250m"
    registry.write_text("".join(f"{name} {hashlib.sha256(b'x').hexdigest()}\n" for name in names))
    for name in names[:2]:  # "other" has no vessels, and would have to be downloaded
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    monkeypatch.setattr(fetch, "LUNG_REGISTRY", registry)
    monkeypatch.setattr(fetch, "LUNG_SITE", "http://127.0.0.1:1/")
    monkeypatch.setattr(fetch, "RETRIES", 0)
    assert "lung250m is in" in works(call("fetch", "lung250m", "--to", tmp_path, "--no-motions")).stdout
    fails(call("fetch", "lung250m", "--to", tmp_path), "other.csv could not be downloaded")
    fails(call("fetch", "oasis2d", "--to", tmp_path, "--no-motions"), "--no-motions", code=2)


def test_fetch_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "RETRIES", 0)
    monkeypatch.setattr(fetch, "OASIS_SITE", "http://127.0.0.1:1/")
    fails(call("fetch", "oasis2d", "--to", tmp_path), "could not be downloaded", "By hand")
    fails(call("fetch", "mnist", "--to", tmp_path), "mnist", code=2)


# --------------------------------------------------------------------------------------------------- run


def test_a_run_that_is_paused_goes_on(small, tmp_path):
    """Each call gets one step further; in the end, the folder is complete."""
    command = ("run", "all", "--dataset", "phantom2d", "--run", tmp_path, "--pairs", 9)
    for step in (1, 2):
        paused = works(call(*command, "--max-minutes", 0))
        assert f"0 minutes are over, paused after step {step}" in paused.stderr
        assert f"The progress is saved in {tmp_path}: run the same command again to continue" in paused.stderr
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
    fails(call(*command[:-1], 8), "synthesis.safetensors was made with other settings (settings differ", "(--run;")


def test_a_finished_run_is_not_done_again(small, oasis_folder, tmp_path, monkeypatch):
    """If nothing has changed, a repeated command reads no data and no checkpoint, and decodes no pair."""
    measure = importlib.import_module("pairdiff_core.pipeline.measure")  # the function has its name
    monkeypatch.setattr(measure, "code_hash", lambda: "the code of today")
    folder = tmp_path / "run"
    command = ("run", "all", "--dataset", "oasis2d", "--data", oasis_folder, "--run", folder)
    first = works(call(*command, "--quiet"))
    assert not first.stderr and first.stdout.startswith("vqae_dice"), "quiet: nothing but the result"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        for module, name in ((oasis, "load_oasis_pairs"), (vqae, "decode_labels"), (vqae, "encode_pairs"),
                             (stages, "load_checkpoint"), (models, "load_checkpoint"), (measure, "load_checkpoint"),
                             (measure, "evaluate")):  # fmt: skip
            patched.setattr(module, name, None)
        again = works(call(*command))
        relative = works(call(*command[:-1], os.path.relpath(folder)))
    assert again.stdout == f"{folder} is already complete; nothing to do\n{first.stdout}" and not again.stderr
    assert relative.stdout.count("\n") == again.stdout.count("\n")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    spoilt = bytearray(before[folder / "vqae.safetensors"])
    spoilt[-1] ^= 1
    (folder / "vqae.safetensors").write_bytes(spoilt)
    fails(call(*command), "vqae.safetensors is damaged")
    (folder / "vqae.safetensors").write_bytes(before[folder / "vqae.safetensors"])
    assert "is already complete" in works(call(*command)).stdout
    fails(call(*command, "--pairs", 9), "synthesis.safetensors was made with other settings")
    (folder / "metrics.json").unlink()
    assert "vqae: found in run, not trained again" in works(call(*command)).stdout
    assert (
        json.loads((folder / "metrics.json").read_text())["summary"]
        == json.loads(before[folder / "metrics.json"])["summary"]
    )
    os.utime(next(oasis_folder.rglob("slice_seg4.nii.gz")), (0, 0))
    assert "vqae: found in run" in works(call(*command)).stdout, "data may have changed: they are read again"
    assert "is already complete" in works(call(*command)).stdout
    monkeypatch.setattr(measure, "code_hash", lambda: "other code")
    assert "vqae: found in run" in works(call(*command)).stdout


def test_a_run_without_a_terminal_says_how_far_it_is(small, tmp_path):
    lines = works(call("run", "synthesis", "--dataset", "phantom2d", "--run", tmp_path / "a")).stderr.splitlines()
    assert [line for line in lines if line.startswith("vqae")][0] == "vqae: step 2 of 12"
    for line in ("vqae: step 12 of 12", "tokens: part 2 of 2", "denoiser: step 10 of 10", "synthesis: part 1 of 1"):
        assert line in lines
    for each in ("vqae", "denoiser"):
        assert len([line for line in lines if line.startswith(each)]) <= 10
    quiet = works(call("run", "synthesis", "--dataset", "phantom2d", "--run", tmp_path / "b", "--quiet"))
    assert (quiet.stdout, quiet.stderr) == ("", "")


# ------------------------------------------------------------------------------- pairs of a pretrained model


@pytest.fixture
def without_data(trained, small, tmp_path, monkeypatch) -> Path:
    """A folder of pretrained models that holds the trained run's autoencoder and denoiser; no data can be loaded."""
    folder = tmp_path / "models" / "phantom2d-quick"
    folder.mkdir(parents=True)
    for name in ("config.json", "vqae.safetensors", "denoiser.safetensors"):
        shutil.copy(trained[0].path / name, folder)
    for name in ("brain_pairs", "lung_pairs"):
        monkeypatch.setattr(datasets, name, None)
    monkeypatch.setenv("PAIRDIFF_MODELS", str(folder.parent))
    monkeypatch.chdir(tmp_path)
    return folder


def volumes(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted((folder / "imagesTr").iterdir())}


def test_pairs_of_a_pretrained_model_need_no_data(without_data, trained, tmp_path):
    draw = ("run", "synthesis", "--model", "phantom2d-quick", "--pairs", 3)
    assert works(call(*draw, "--to", "pairs")).stdout == "3 pairs are in pairs\n"
    assert sorted(os.listdir()) == ["models", "pairs"], "no run folder"
    made = volumes(tmp_path / "pairs")
    assert len(made) == 6 and {values.shape for values in made.values()} == {(48, 80, 1)}
    assert all(values.any() and values.max() < trained[0].profile.num_labels for values in made.values())
    described = json.loads((tmp_path / "pairs" / "PairDiff-phantom2d_dataset.json").read_text())
    assert described["numPairedTraining"] == 3
    assert described["provenance"]["autoencoder"] == trained[1].autoencoder.fingerprint
    works(call(*draw, "--seed", 1, "--to", "others"))
    assert not all(np.array_equal(values, made[name]) for name, values in volumes(tmp_path / "others").items())
    fails(call(*draw, "--to", "pairs"), "pairs exists and is not empty")
    fails(call("run", "synthesis", "--model", "nothing", "--to", "new"), "nothing is neither a folder nor a pretrained")
    assert sorted(os.listdir()) == ["models", "others", "pairs"]


def test_a_run_with_pretrained_models_makes_and_exports_the_same_pairs_without_data(
    without_data, tmp_path, monkeypatch
):
    """It makes no tokens of training pairs, and exports even if the models are no longer named."""
    works(call("run", "synthesis", "--dataset", "phantom2d", "--run", "r", "--pairs", 3))
    assert not list(Path("r").glob("tokens*"))
    works(call("export", "--run", "r", "--to", "exported"))
    works(call("run", "synthesis", "--model", without_data, "--pairs", 3, "--to", "drawn"))
    exported, drawn = volumes(tmp_path / "exported"), volumes(tmp_path / "drawn")
    assert exported.keys() == drawn.keys() and all(np.array_equal(exported[name], drawn[name]) for name in drawn)
    monkeypatch.delenv("PAIRDIFF_MODELS")
    fails(call("export", "--run", "r", "--to", "again"), "was made with a different autoencoder", "Set PAIRDIFF_MODELS")
    monkeypatch.setattr(models, "MODELS", without_data.parent)
    works(call("export", "--run", "r", "--to", "again"))


def test_a_network_that_a_run_took_from_a_pretrained_model_registers(without_data, trained, files, tmp_path):
    shutil.copy(trained[0].path / "registration-synthetic.safetensors", without_data)
    (tmp_path / "r").mkdir()
    shutil.copy(without_data / "config.json", tmp_path / "r")
    for path in files:
        write(path, np.tile(box((40, 36, 1)), (2, 2, 1)))
    works(call("register", *files, "--out", "u.nii", "--run", "r", "--steps", 0))
    works(call("register", *files, "--out", "v.nii", "--run", without_data, "--steps", 0))
    assert Path("u.nii").read_bytes() == Path("v.nii").read_bytes()


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


# ---------------------------------------------------------------------------------------------- register


@pytest.mark.parametrize("form", ["itk", "l2r"])
@pytest.mark.parametrize("shape", [SHAPE, (40, 36, 1)])
def test_register_brings_the_moving_onto_the_fixed(tmp_path, shape, form):
    values, wanted = (np.roll(box(shape, dtype=np.int16) * 9, shift, axis=0) for shift in (3, 0))
    fixed, moving = write(tmp_path / "f.nii.gz", wanted), write(tmp_path / "m.nii.gz", values)
    out, warped = tmp_path / "u.nii.gz", tmp_path / "w.nii.gz"
    works(call("register", fixed, moving, "--out", out, "--warped", warped, "--format", form, "--steps", 15))
    assert nib.load(out).shape == ((*shape, 1, 2 if shape[2] == 1 else 3) if form == "itk" else (*shape, 3))
    image = nib.load(warped)
    assert image.get_data_dtype() == np.int16 and image.shape == shape
    assert (np.asarray(image.dataobj) == wanted).mean() > 0.98 > (values == wanted).mean()


@pytest.mark.parametrize("form", ["itk", "l2r"])
@pytest.mark.parametrize("shape", [SHAPE, (40, 36)])
def test_the_inverse_leads_back(tmp_path, shape, form):
    fixed = write(tmp_path / "f.nii.gz", box(shape) * 3)
    moving = write(tmp_path / "m.nii.gz", np.roll(box(shape), 2, 1) * 3)
    out, inverse = tmp_path / "u.nii.gz", tmp_path / "v.nii.gz"
    works(call("register", fixed, moving, "--out", out, "--inverse", inverse, "--format", form, "--steps", 30))
    forth, back = nib.load(out), nib.load(inverse)
    assert forth.shape == back.shape and np.array_equal(forth.affine, back.affine)
    found = json_of("evaluate", "--pair", moving, fixed, "--field", inverse, json_file=tmp_path / "e.json")
    assert found["summary"]["dice"] == pytest.approx(1.0)
    pair = read_pair(fixed, moving)
    u, v = (displacement_on(pair, read_field(path))[None] for path in (out, inverse))
    assert u.abs().max() > 1 and inverse_consistency_error(u, v) < 0.02


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


def test_the_pretrained_lung_model_does_what_the_optimiser_does_in_fewer_steps(tmp_path):
    pair = lung_pairs(1, spatial=(128, 104, 128))
    affine = grid_affine("phantom3d", pair.spatial)
    paths = [write(tmp_path / f"{n}.nii.gz", image.numpy(), affine) for n, image in enumerate(pair.labels[0])]
    tre = {}
    for name, options in {"without": [], "with": ["--run", "lung250m-laptop"]}.items():
        works(call("register", *paths, "--out", tmp_path / f"{name}.nii.gz", "--format", "l2r", *options))
        field = torch.from_numpy(nib.load(tmp_path / f"{name}.nii.gz").get_fdata(dtype=np.float32)).movedim(-1, 0)
        tre[name] = float(target_registration_error(field, pair.landmarks[0], pair.spacing).mean())
    assert tre["with"] < tre["without"] + 0.2
    used = open_run(find_model("lung250m-laptop")).profile.registration
    assert 2 * sum(level.steps for level in used.instance) < sum(level.steps for level in used.baseline)


def test_what_does_not_fit_the_network_is_noted(files, tmp_path, trained_3d):
    for path in files:
        write(path, np.asarray(nib.load(path).dataobj), np.diag([0.1, 0.1, 0.1, 1.0]))
    result = works(call("register", *files, "--out", tmp_path / "u.nii", "--run", trained_3d[0].path, "--steps", 0))
    assert "trained on voxels of 4 x 4 x 4 mm, but these have 0.1 x 0.1 x 0.1 mm, so it may" in result.stderr
    assert "trained on volumes with axes LPS, but these have RAS, so it may" in result.stderr


def test_a_size_that_does_not_fit_is_not_blamed_on_the_voxels(tmp_path):
    path = write(tmp_path / "f.nii", box((5, 5)), np.diag([-1.0, -1.0, 1.0, 1.0]))
    result = works(call("register", path, path, "--out", tmp_path / "u.nii", "--run", "oasis2d-laptop", "--steps", 0))
    assert "trained on images of 160 x 192 voxels, but these have 5 x 5 voxels, so it may" in result.stderr


def test_fewer_levels_give_another_field(files, tmp_path):
    found = []
    for levels in (1, 2, 3):
        works(call("register", *files, "--out", tmp_path / "u.nii", "--levels", levels, "--steps", 2, "--overwrite"))
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
    fails(call("register", *files, "--out", out, "--warped", warped, "--overwrite"), str(files[1]))
    assert out.read_bytes() == b"older" and sorted(os.listdir(tmp_path)) == before


def test_what_cannot_be_written_is_reported_before_anything_is_read(tmp_path):
    missing = (tmp_path / "no.nii", tmp_path / "none.nii")
    out = tmp_path / "no folder" / "u.nii.gz"
    fails(call("register", *missing, "--out", out), "cannot be written", str(out))
    (tmp_path / "u.nii").mkdir()
    fails(call("register", *missing, "--out", tmp_path / "u.nii"), "is a folder")


def test_each_level_of_optimisation_is_watched(trained):
    run, made = trained
    seen: list[int] = []

    def watch(steps: range) -> range:
        seen.append(len(steps))
        return steps

    for network in (None, made.networks["real"].model):
        seen.clear()
        watched = registration.register(run.validation[:1], run.profile, network, watch=watch)
        levels = run.profile.registration.instance if network else run.profile.registration.baseline
        assert seen == [level.steps for level in levels]
        plain = registration.register(run.validation[:1], run.profile, network)
        assert torch.equal(watched.both, plain.both)


def test_bars_are_shown_in_a_terminal_and_not_with_quiet(files, tmp_path, monkeypatch):
    command = ("register", *files, "--steps", 3, "--out")
    shown = [in_a_terminal(monkeypatch, *command, tmp_path / "u.nii"),
             in_a_terminal(monkeypatch, *command, tmp_path / "v.nii", "--quiet")]  # fmt: skip
    assert all(f"level {number}:" in shown[0] for number in (1, 2, 3)) and "/3" in shown[0], shown[0]
    assert shown[1] == ""
    assert (tmp_path / "v.nii").exists()


def in_a_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What a command writes to stderr if that is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    shown: list[bytes] = []

    def read() -> None:  # beside the command, which would wait once the terminal is full
        try:
            while part := os.read(ours, 4096):
                shown.append(part)
        except OSError:  # how Linux ends a terminal
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        cli.app([str(argument) for argument in arguments], standalone_mode=False)
    reader.join()
    os.close(ours)
    return b"".join(shown).decode()


def of_size(spatial: tuple[int, ...], labels: int) -> PairSet:
    """A pair without the memory that it would need."""
    names = tuple(map(str, range(labels)))
    return PairSet(torch.zeros(1, dtype=torch.uint8).expand(1, 2, *spatial), names, (1.0,) * len(spatial), ("a~b",))


def test_long_work_is_told_before_it_is_done(capsys, monkeypatch):
    """For 200 labels and 512 voxels a side; work that takes two processors seconds is not announced."""
    monkeypatch.setenv("PAIRDIFF_DEVICE", "cpu")
    laptop = get_profile("laptop", 3)
    sides = [cost.expected_cost(of_size((side,) * 3, 3), laptop) for side in (64, 128, 256, 512)]
    many = [cost.expected_cost(of_size((64,) * 3, labels), laptop) for labels in (2, 20, 200)]
    for costs in (sides, many):
        assert costs == sorted(costs) and [each.bytes for each in costs] == sorted(each.bytes for each in costs)
    measured = {(64, 52, 64): {3: 83e6, 9: 204e6, 33: 593e6}, (128, 104, 128): {3: 489e6, 9: 952e6}}
    for spatial, by_labels in measured.items():
        for labels, bytes_ in by_labels.items():
            assert 0.6 < cost.expected_cost(of_size(spatial, labels), laptop).bytes / bytes_ < 1.6
    quick = [(of_size((64, 52, 64), 2), ""), (of_size((160, 192), 25), "")]
    long = [(of_size((128, 104, 128), 200), "200 labels: about"), (of_size((512,) * 3, 3), "512 x 512 x 512 voxels")]
    for pairs, told in quick + long:
        cost.note_cost(pairs, get_profile("laptop", pairs.spatial_dims))
        assert told in (said := capsys.readouterr().err) and bool(said) == bool(told)
    monkeypatch.setattr(cost, "best_device", lambda: torch.device("cuda"))
    cost.note_cost(of_size((512,) * 3, 200), laptop)
    assert not capsys.readouterr().err, "measured on processors"


def test_a_network_that_cannot_be_used(files, tmp_path, trained_3d):
    command, run = ("register", *files, "--out", tmp_path / "u.nii", "--run"), trained_3d[0].path
    fails(call(*command, tmp_path), "holds no config.json")
    fails(call(*command, "lungs"), "lungs is neither a folder nor a pretrained model", "oasis2d-laptop")
    fails(call(*command, run, "--network", "best"), "holds no registration-best", "synthetic")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "registration-synthetic.safetensors"):
        (damaged / name).write_bytes((run / name).read_bytes()[:5000])
    fails(call(*command, damaged), "damaged/registration-synthetic.safetensors is not a readable")
    fails(call(*command, "oasis2d-laptop"), f"{files[0]} has 3 axes, but the network was trained on images with 2")
    assert not (tmp_path / "u.nii").exists()


angles = st.floats(-3.1, 3.1)


@st.composite
def placed_grids(draw: st.DrawFn) -> np.ndarray:
    """A voxel-to-world matrix with any place, direction and spacing that NIfTI knows."""
    affine = np.eye(4)
    for axis in range(3):
        angle, turn, (i, j) = draw(angles), np.eye(4), [other for other in range(3) if other != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        affine = affine @ turn
    affine[:3, :3] *= [draw(st.floats(0.05, 20.0)) * draw(st.sampled_from([-1, 1])) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-500, 500)) for _ in range(3)]
    return affine


shapes = st.lists(st.integers(1, 13), min_size=2, max_size=3).map(tuple)


TYPES = [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64, np.float32, np.float64]


@settings(BOUNDED, max_examples=60)
@given(
    grid=st.tuples(shapes, placed_grids()),
    dtypes=st.tuples(*[st.sampled_from(TYPES)] * 2),
    values=st.lists(st.integers(-1, 100), min_size=1, max_size=4),
    seed=st.integers(0, 9999),
    network=st.booleans(),
)
def test_register_handles_any_volume(trained_3d, tmp_path, grid, dtypes, values, seed, network):
    """It writes a finite field and warped labels that fit, or one line that says why not, and then no files."""
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
        reasons = "is empty|hold only the value|holds negative labels|no label in common|holds the label|has 2 axes"
        assert any(reason in result.stderr for reason in reasons.split("|")), result.stderr
        return
    field, labels = nib.load(out), nib.load(warped)
    volume = (*shape, 1)[:3]
    flat = len(shape) == 2 or volume[2] == 1 and volume.count(1) == 1
    assert field.shape == (*volume, 1, 2 if flat else 3) and np.isfinite(field.get_fdata()).all()
    np.testing.assert_allclose(field.affine, affine, rtol=1e-4, atol=1e-3)
    assert labels.shape == shape and labels.get_data_dtype() == dtypes[1]
    assert set(np.unique(labels.dataobj)) <= {0, *np.unique(images[1])}


# ---------------------------------------------------------------------------------------------- evaluate


def evaluated(*arguments: object, json_file: Path) -> dict:
    """What ``pairdiff evaluate`` writes; every case has its line on stdout, and stderr is empty."""
    result = works(call("evaluate", *arguments, "--json", json_file, "--overwrite"))
    found = json.loads(json_file.read_text())
    assert not result.stderr, "no bar where there is no terminal"
    for case, line in zip(found["cases"], result.stdout.splitlines(), strict=False):
        assert line.startswith(case["name"]) and f"Dice {case['dice']:.3f}" in line
    assert f"{'dice':26} {found['summary']['dice']:.4g}" in result.stdout
    return found


def json_of(*arguments: object, json_file: Path) -> dict:
    """What a command writes to ``--json``; the command succeeds."""
    works(call(*arguments, "--json", json_file, "--overwrite"))
    return json.loads(json_file.read_text())


def points(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """A CSV file of landmarks in mm, from voxels (K, 3)."""
    np.savetxt(path, voxels @ affine[:3, :3].T + affine[:3, 3], delimiter=",", fmt="%.6f")
    return path


@settings(BOUNDED, max_examples=12)
@given(
    grid=placed_grids(),
    shifts=st.tuples(*[st.integers(-2, 2)] * 3),
    form=st.sampled_from(["itk", "l2r"]),
    flat=st.booleans(),
)
def test_a_case_has_the_errors_of_its_landmarks_and_of_its_field(tmp_path, grid, shifts, form, flat):
    """The moving image is the fixed one, shifted by some voxels, as are its landmarks; the field agrees."""
    shape = (*SHAPE[:2], 1) if flat else SHAPE
    shift = np.array([*shifts[:2], 0] if flat else shifts)
    image = box(shape) * 5 if not flat else box(SHAPE)[..., 6:7] * 5
    fixed, moving = (
        write(tmp_path / f"{name}.nii", np.roll(image, move, (0, 1, 2)), grid)
        for name, move in (("f", 0 * shift), ("m", shift))
    )
    voxels = np.random.default_rng(0).uniform([5, 4, 0], [9, 8, 0] if flat else [9, 8, 7], (6, 3))
    landmarks = points(tmp_path / "f.csv", voxels, grid), points(tmp_path / "m.csv", voxels + shift, grid)
    command = ("evaluate", "--pair", fixed, moving, "--landmarks", *landmarks)
    before = json_of(*command, json_file=tmp_path / "e.json")["cases"][0]
    apart = np.linalg.norm(shift * nib.affines.voxel_sizes(grid))
    np.testing.assert_allclose(before["errors_mm"], apart, rtol=1e-3, atol=1e-3)
    pair = read_pair(fixed, moving)
    u = torch.tensor(shift[: 2 if flat else 3], dtype=torch.float32).reshape(-1, *[1] * (2 if flat else 3))
    write_field(tmp_path / "u.nii", pair, u.expand(-1, *pair.labels.shape[1:]), form)
    after = json_of(*command, "--field", tmp_path / "u.nii", json_file=tmp_path / "e.json")["cases"][0]
    np.testing.assert_allclose(after["errors_mm"], 0, atol=2e-3)
    assert after["dice"] == pytest.approx(1.0) and after["folding_percent"] == 0
    both = (image > 0) & (np.roll(image, shift, (0, 1, 2)) > 0)
    assert before["dice"] == pytest.approx(both.sum() / (image > 0).sum(), rel=1e-5)  # both have the same size
    assert "inverse_consistency_error" not in after and "seconds" not in after


def test_one_case_is_registered_as_register_does_it(files, tmp_path, trained_3d):
    field, options = tmp_path / "u.nii.gz", ("--steps", 3)
    for chosen, method in (((), "baseline"), (("--run", trained_3d[0].path), "network+instance")):
        works(call("register", *files, "--out", field, "--overwrite", *options, *chosen))
        command, json_file = ("evaluate", "--pair", *files), tmp_path / "e.json"
        own = json_of(*command, "--field", field, json_file=json_file)["summary"]
        found = json_of(*command, "--method", method, *options, *chosen, json_file=json_file)
        for name, value in own.items():
            assert found["summary"][name] == pytest.approx(value, abs=1e-4), (method, name)
        assert found["summary"]["inverse_consistency_error"] < 0.1 and found["summary"]["seconds_per_pair"] > 0
        assert found["provenance"]["method"] == method and found["provenance"]["files"] == [str(path) for path in files]


def test_landmarks_outside_the_field_stay_as_in_apply(files, tmp_path):
    affine, field = nib.load(files[0]).affine, tmp_path / "u.nii.gz"
    works(call("register", *files, "--out", field, "--steps", 3))
    voxels = np.array([[-2, 8, 8], [8, 8, 8], [19.6, 8, 8], [-0.4, 8, 8], [8, 8, 40]])
    fixed, moved = points(tmp_path / "f.csv", voxels, affine), tmp_path / "m.csv"
    told = "3 of 5 landmarks lie outside the field and stay where they are"
    assert told in works(call("apply", field, fixed, "--out", moved)).stderr
    for chosen in (("--field", field), ("--method", "baseline", "--steps", 3)):
        result = works(call("evaluate", "--pair", *files, "--landmarks", fixed, moved, *chosen))
        assert told in result.stderr
        (line,) = (line for line in result.stdout.splitlines() if line.startswith("tre_all worst30"))
        assert float(line.split()[-1]) < 2e-3
        apart = json_of(
            "evaluate", "--pair", *files, "--landmarks", fixed, fixed, *chosen, json_file=tmp_path / "e.json"
        )
        assert np.allclose(np.array(apart["cases"][0]["errors_mm"])[[0, 2, 4]], 0, atol=1e-4)
        assert apart["cases"][0]["errors_mm"][1] > 0.1
    assert told not in works(call("evaluate", "--pair", *files, "--landmarks", fixed, fixed)).stderr


@settings(BOUNDED, max_examples=20)
@given(
    grid=placed_grids(),
    cut=st.tuples(*[st.integers(0, 3)] * 3),
    flips=st.tuples(*[st.booleans()] * 3),
    form=st.sampled_from(["itk", "l2r"]),
    seed=st.integers(0, 99),
)
def test_evaluate_puts_landmarks_where_apply_does(tmp_path, grid, cut, flips, form, seed):
    """On grids that are rotated, or smaller or larger than the field's, and for points inside and outside both."""
    random = np.random.default_rng(seed)
    whole = [write(tmp_path / f"{i}.nii", np.roll(box(SHAPE), i, 0), grid) for i in (0, 1)]
    pair = read_pair(*whole)
    write_field(tmp_path / "u.nii", pair, torch.from_numpy(random.normal(0, 1, (3, *SHAPE)).astype(np.float32)), form)
    turn = np.array([[axis, -1 if flip else 1] for axis, flip in enumerate(flips)])
    images = [nib.load(path).slicer[cut[0] :, : 18 - cut[1], cut[2] :].as_reoriented(turn) for path in whole]
    paths = [write(tmp_path / f"cut{i}.nii", np.asarray(each.dataobj), each.affine) for i, each in enumerate(images)]
    fixed, moved = points(tmp_path / "f.csv", random.uniform(-3, 22, (12, 3)), grid), tmp_path / "m.csv"
    shifted = works(call("apply", tmp_path / "u.nii", fixed, "--out", moved, "--overwrite"))
    command = ("evaluate", "--pair", *paths, "--field", tmp_path / "u.nii", "--landmarks", fixed, moved)
    result = works(call(*command, "--json", tmp_path / "e.json", "--overwrite"))
    assert max(json.loads((tmp_path / "e.json").read_text())["cases"][0]["errors_mm"]) < 2e-3
    outside = [line for line in shifted.stderr.splitlines() if "outside the field" in line]
    assert outside and outside[0] in result.stderr


@pytest.mark.parametrize("network", [False, True])
def test_evaluate_says_what_register_says(tmp_path, trained_3d, network):
    """It prints the same notes on files and network, and the same warnings."""
    chosen, spoken = ("--run", trained_3d[0].path, "--steps", 0) if network else ("--steps", 1), []
    fixed = write(tmp_path / "f.nii", box(SHAPE), np.diag([0.5, 0.5, 0.5, 1]))
    for index, moving in enumerate((box(SHAPE), np.roll(box(SHAPE), 8, 0))):
        path = write(tmp_path / f"{index}.nii", moving, np.diag([0.5, 0.5, 0.5, 1]))
        registered = works(call("register", fixed, path, "--out", tmp_path / "u.nii", "--overwrite", *chosen))
        method = () if network else ("--method", "baseline")
        evaluated = works(call("evaluate", "--pair", fixed, path, *method, *chosen))
        assert evaluated.stderr == registered.stderr
        spoken.append(evaluated.stderr)
        quiet = works(call("evaluate", "--pair", fixed, path, "--quiet", *method, *chosen)).stderr
        assert quiet.splitlines() == [line for line in evaluated.stderr.splitlines() if line.startswith("warning")]
    assert "warning: Dice started at 0" in spoken[1]
    assert not network or "note: the network was trained on" in spoken[0]


def test_register_and_evaluate_where_grids_differ_in_size_only(tmp_path):
    sizes = {"volume": (20, 18, 16), "shorter": (20, 18, 12), "slice": (20, 18, 1), "flat": (20, 18), "thin": (20, 15)}
    whole = np.zeros((20, 18, 16), np.uint8)
    whole[3:9, 4:11, :8] = 1
    paths = {}
    for name, size in sizes.items():
        values = whole[tuple(map(slice, (*size, 1)[:3]))].reshape(size)
        paths[name] = write(tmp_path / f"{name}.nii", values, np.eye(4))
    for fixed, moving in (("volume", "shorter"), ("shorter", "volume"), ("slice", "volume"), ("flat", "thin"),
                          ("thin", "slice"), ("flat", "volume"), ("volume", "slice")):  # fmt: skip
        pair = (paths[fixed], paths[moving], "--resample")
        out = ("--out", tmp_path / "u.nii", "--warped", tmp_path / "w.nii", "--steps", 1, "--overwrite")
        assert "was resampled onto the grid" in works(call("register", *pair, *out)).stderr
        assert nib.load(tmp_path / "w.nii").shape == sizes[fixed]
        assert "was resampled onto the grid" in works(call("evaluate", "--pair", *pair)).stderr


def test_bad_cases(files, tmp_path):
    good, other, words = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.csv"
    good.write_text("x,y,z\n-20,-20,20\n-24,-20,20\n")
    other.write_text("-20,-20,20\n")
    words.write_text("here,and,there\n")
    command = ("evaluate", "--pair", *files)
    fails(call(*command, "--landmarks", good, other), f"{other} holds 1 x 3 numbers, but {good} holds 2 x 3")
    fails(call(*command, "--landmarks", good, words), str(words))
    fails(call(*command, "--landmarks", good, tmp_path / "no.csv"), str(tmp_path / "no.csv"))
    fails(call(*command, "--field", files[0]), str(files[0]), "not a displacement field")
    fails(call("evaluate", "--pair", files[0], tmp_path / "no.nii"), str(tmp_path / "no.nii"))
    works(call(*command, "--landmarks", good, good))


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
    for path in (lung_folder / "dilated_vessels_ts").glob("*"):
        if "case_104" not in path.name:
            path.unlink()
    fails(call("evaluate", *chosen), str(lung_folder), "only official test cases", "--split test")
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
    fails(call("evaluate", "--dataset", "phantom2d", "--json", older), f"{older} exists. Give --overwrite")
    command = ("evaluate", "--overwrite", "--json", older, "--dataset")
    fails(call(*command, "lung250m", "--data", empty), str(empty), "holds none of")
    fails(call(*command, "lung250m", "--data", tmp_path / "no"), "is not a folder")
    fails(call(*command, "phantom2d", "--run", trained_3d[0].path), "has other axes or labels than phantom2d")
    fails(call("evaluate", "--dataset", "phantom3d", "--json", empty), f"{empty} must end in .json", code=2)
    folder = tmp_path / "folder.json"
    folder.mkdir()
    fails(call("evaluate", "--dataset", "phantom3d", "--json", folder), "is a folder")
    assert older.read_text() == "older"


def test_unknown_profile_in_the_environment_is_wrong_use(no_data_set, monkeypatch):
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
def test_evaluate_handles_any_volume(small, tmp_path, shapes, dtype, spacing, flips, same):
    """It writes a file of finite numbers, or one line that says why not, and then keeps the older file."""
    folder, file = tmp_path / "lung250m", tmp_path / "e.json"
    affine = np.diag([*(np.array(flips) * spacing), 1.0])
    for number, shape in ((1, shapes[0]), (2, shapes[0] if same else shapes[1])):
        write(folder / "dilated_vessels_ts" / f"case_002_{number}.nii", box(shape, dtype=dtype), affine)
    file.write_text("older")
    result = call("evaluate", "--dataset", "lung250m", "--data", folder, "--method", "before", "--json", file,
                  "--overwrite")  # fmt: skip
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
    command = ("export", "--to", tmp_path / "pairs", "--run")
    fails(call(*command, trained_3d[0].path), "synthesis.safetensors does not exist")
    model = ("export", "--run", "oasis2d-laptop", "--to", tmp_path / "pairs")
    fails(call(*model), f"run: pairdiff run synthesis --model oasis2d-laptop --to {tmp_path / 'pairs'}")
    fails(call("export", "--run", tmp_path / "no", "--to", tmp_path / "pairs"), "is neither a folder nor a pretrained")
    fails(call("export", "--run", trained[0].path), code=2)
    assert not os.listdir(tmp_path)
    result = works(call("export", "--run", trained[0].path, "--to", tmp_path / "pairs"))
    assert result.stdout == f"8 pairs are in {tmp_path / 'pairs'}\n" and not result.stderr
    assert len(list((tmp_path / "pairs" / "imagesTr").iterdir())) == 16
