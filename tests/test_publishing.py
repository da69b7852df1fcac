"""What is published: workflows, containers, and the numbers on the first pages."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def documented_commands() -> set[str]:
    """What the code of README.md and CONTRIBUTING.md runs by make or bash; `make test book` is two commands."""
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ *(```+).*?^ *\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [code for _, code in re.findall(r"(`+)(.+?)\1(?!`)", prose, re.DOTALL)]
    commands = set()
    for line in [*"".join(blocks).splitlines(), *spans]:
        program, *arguments = line.split(" #")[0].split() or [""]
        if program == "make":
            commands |= {f"make {target}" for target in arguments if re.fullmatch("[a-z-]+", target)}
        elif program == "bash":
            commands.add(" ".join([program, *arguments]))
    return commands


def steps(workflow: Path) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_the_commands_of_the_readme(workflow: Path) -> None:
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    assert set(commands) <= documented_commands()


def test_documented_commands_are_those_of_the_code_alone() -> None:
    commands = documented_commands()
    assert {"make setup", "make book", "make test", "make lab", "make sync", "bash .ci/run"} <= commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command.removeprefix("make ") for command in commands if command.startswith("make ")} <= targets


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_actions_by_hash_and_may_only_read(workflow: Path) -> None:
    uses = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name) for name in uses), uses
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in content["jobs"].items() if "permissions" in job}
    assert granted == ({"deploy": {"pages": "write", "id-token": "write"}} if workflow.stem == "pages" else {})


def test_each_push_is_checked_and_the_main_branch_is_published() -> None:
    # YAML takes the key "on" for true
    events = {workflow.stem: yaml.safe_load(workflow.read_text())[True] for workflow in WORKFLOWS}
    assert set(events) == {"check", "newest", "pages"}
    assert "push" in events["check"] and events["pages"]["push"] == {"branches": ["main"]}
    assert "schedule" in events["newest"]
    site = next(step["with"]["path"] for step in steps(WORKFLOWS[-1]) if "upload-pages" in step.get("uses", ""))
    assert f"{site}/index.html" == "book/_build/html/index.html"
    assert "book/_build" in (ROOT / "Makefile").read_text()


def test_the_site_is_published_only_if_the_checks_have_passed() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())["jobs"]
    assert jobs["deploy"]["needs"] == "build"
    assert not any(
        "if" in part or "continue-on-error" in part for job in jobs.values() for part in (job, *job["steps"])
    )
    names = [step.get("run") or step["uses"].split("@")[0] for step in jobs["build"]["steps"]]
    assert names.index("bash .ci/run") < names.index("actions/upload-pages-artifact")
    assert [name for name in names if name.startswith(("make", "bash"))] == ["bash .ci/run"]  # nothing is built anew
    assert "make book" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("needed", ["1", ""])
def test_browser_tests_fail_without_a_browser_where_one_is_needed(needed: str, tmp_path: Path) -> None:
    for name in ("tests", "book/_build/html/book"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "test_pages.py", tmp_path / "tests")
    (tmp_path / "book" / "_build" / "html" / "book" / "page.html").write_text("<title>A page</title>")
    variables = {"PATH": "", "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path), "PAIRDIFF_NEEDS_CHROMIUM": needed}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-k", "this_host_alone"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True)
    assert ("1 error" if needed else "1 skipped") in done.stdout, done.stdout + done.stderr


def test_no_workflow_can_leave_out_the_browser_tests() -> None:
    for workflow in WORKFLOWS:
        content = yaml.safe_load(workflow.read_text())
        runs = {step["run"] for step in steps(workflow) if "run" in step}
        assert "bash .ci/run" in runs or content["env"]["PAIRDIFF_NEEDS_CHROMIUM"] == "1", workflow.name
    assert "export PAIRDIFF_NEEDS_CHROMIUM=1" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_container_starts_the_notebooks() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "ARG TORCH_INDEX=" in lines
    assert any("make setup" in line for line in lines)
    assert json.loads(lines[-1].removeprefix("CMD "))[:2] == ["make", "lab"]
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert container["postAttachCommand"].startswith("make lab ")


def test_the_development_container_uses_the_environment_of_its_image() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    (image,) = re.findall(r"^WORKDIR (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert container["workspaceFolder"] != image  # the checkout would hide what the image has installed
    environment = f"{image}/.venv"
    for key, program in (("postCreateCommand", "python -m pip install"), ("postAttachCommand", "jupyter lab")):
        command = [*shlex.split(container[key]), "--dry-run"]
        variables = os.environ | container["containerEnv"]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
        assert f"{environment}/bin/{program}" in done.stdout
        assert " .venv/" not in done.stdout


LUNGS, BRAINS, BRIEF = (
    json.loads((ROOT / "book" / "results" / f"{name}.json").read_text())["summary"]
    for name in ("lung250m", "brain2d", "brief")
)
LUNGS |= {"tre_brief": BRIEF["tre_mm"], "seconds_brief": BRIEF["seconds_per_pair"]}


@pytest.mark.parametrize(
    ("row", "tre", "seconds"),
    [
        ("before registration", "tre_before", None),
        ("optimiser, no training", "tre_optimiser", "seconds_optimiser"),
        ("optimiser, first two levels", "tre_brief", "seconds_brief"),
        ("network, ten real pairs under random", "tre_network_random_warps", "seconds_network_random_warps"),
        ("network, ten real pairs with", "tre_network_motion", "seconds_network_motion"),
        ("that network, then the optimiser", "tre_network_motion_instance", "seconds_network_motion_instance"),
        ("network, ten real pairs |", "tre_network_real", "seconds_network_real"),
        ("network, synthetic pairs only", "tre_network_synthetic", "seconds_network_synthetic"),
        ("network, synthetic images", "tre_network_synthetic_motion", "seconds_network_synthetic_motion"),
    ],
)
def test_the_readme_shows_the_measured_results(row: str, tre: str, seconds: str | None) -> None:
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if row in line)
    assert f"{LUNGS[tre]:.2f} mm" in line
    assert seconds is None or f"{LUNGS[seconds]:.1f} s" in line


def test_the_readme_quotes_the_measured_results() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in ("dice_before", "dice_network_real", "dice_network_synthetic", "dice_optimiser"):
        assert f"{BRAINS[name]:.3f}" in readme, name
    rows = json.loads((ROOT / "book" / "results" / "seeds.json").read_text())["rows"]
    for method in ("real, motion", "synthetic, motion"):
        alone = [row["tre_mm"] for row in rows if row["method"] == method]
        assert len(alone) == 3
        assert f"{min(alone):.2f} to {max(alone):.2f} mm with three seeds" in " ".join(readme.split())
