"""What is published: workflows, containers, and the numbers on the first pages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(workflow: Path) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_the_commands_of_the_readme(workflow: Path) -> None:
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    for command in commands:
        program, target = command.split()
        assert (program == "make" and target in TARGETS) or command == "bash .ci/run", command


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


def test_the_container_starts_the_notebooks() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "ARG TORCH_INDEX=" in lines
    assert any("make setup" in line for line in lines)
    assert json.loads(lines[-1].removeprefix("CMD "))[:2] == ["make", "lab"]
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"


LUNGS, BRAINS = (
    json.loads((ROOT / "book" / "results" / name).read_text())["summary"] for name in ("lung250m.json", "brain2d.json")
)


@pytest.mark.parametrize(
    ("row", "tre", "seconds"),
    [
        ("before registration", "tre_before", None),
        ("optimiser, no training", "tre_optimiser", "seconds_optimiser"),
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
