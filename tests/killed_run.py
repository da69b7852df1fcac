"""Repeat a run, kill it again and again at moments drawn in advance, and compare its results with the calm run's.

    python tests/killed_run.py runs/calm runs/killed --data DIR --json book/results/killed.json

Not a test of ``make test``: it takes as long as the run. It may itself be stopped; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from pairdiff_core import run_folder
from pairdiff_core.checkpoints import load_checkpoint
from pairdiff_core.pipeline import STAGES
from pairdiff_core.runs import fingerprint, open_run

# What two runs of the same bits do not share: when, how fast and by which process something was made.
TIMES = {"seconds", "seconds_per_pair", "provenance", "stages"}


def repeat(calm: Path, killed: Path, data: Path | None, kills: int, seed: int) -> dict:
    """Run CALM's commands in KILLED until all is done, with as many ``kill -9``; tells the moments and the seconds."""
    run, log = open_run(calm), killed.parent / f"{killed.name}.kills.json"
    made, measured = run.stages(), json.loads((calm / "metrics.json").read_text())
    if log.exists():
        told = json.loads(log.read_text())
    else:
        # This time the machine may be faster, and all moments have to come.
        whole, draw = 0.6 * measured["provenance"]["wall_seconds"], random.Random(seed)
        moments = sorted(draw.uniform(0, whole) for _ in range(kills))
        told = {"moments": moments, "kills": [], "worked_seconds": 0.0}
    checkpoints = dict(
        zip(STAGES, ("vqae", "tokens", "denoiser", "synthesis", "registration-real"), strict=True)
    )
    for stage in (*STAGES, "evaluate"):
        by = measured["provenance"] if stage == "evaluate" else made[checkpoints[stage]]
        command = [sys.executable, "-m", "pairdiff_core", "run", stage, "--dataset", run.dataset, "--run", str(killed),
                   "--profile", run.profile.name, "--seed", str(run.seed)]  # fmt: skip
        command += ["--data", str(data)] if data else []
        while not _ended(command, {**os.environ, "OMP_NUM_THREADS": str(by["threads"])}, told, stage, log):
            pass
    return told


def _ended(command: list[str], environment: dict[str, str], told: dict, stage: str, log: Path) -> bool:
    """Start the command; kill it when the next moment has come. Whether it ended by itself, and well."""
    process, before, started = (
        subprocess.Popen(command, env=environment),
        told["worked_seconds"],
        time.monotonic(),
    )
    try:
        while process.poll() is None:
            time.sleep(0.2)
            told["worked_seconds"] = before + time.monotonic() - started
            run_folder.write_json(log, told)
            if told["moments"] and told["worked_seconds"] >= told["moments"][0]:
                moment = told["moments"].pop(0)
                process.kill()
                process.wait()
                told["kills"].append({"stage": stage, "second": round(moment)})
                run_folder.write_json(log, told)
                return False
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return True


def compare(calm: Path, killed: Path) -> dict[str, bool]:
    """Of each checkpoint whether its tensors have the same bits, and whether ``metrics.json`` says the same."""
    same = {
        path.stem: fingerprint(*load_checkpoint(path)[0].values())
        == fingerprint(*load_checkpoint(killed / path.name)[0].values())
        for path in sorted(calm.glob("*.safetensors"))
    }
    measured = [
        _without_times(json.loads((folder / "metrics.json").read_text())) for folder in (calm, killed)
    ]
    return same | {"metrics.json": measured[0] == measured[1]}


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calm", type=Path, help="a finished run with its metrics.json")
    parser.add_argument("killed", type=Path, help="folder of the repetition")
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args()
    told = repeat(chosen.calm, chosen.killed, chosen.data, chosen.kills, chosen.seed)
    result = {
        "kills": told["kills"],
        "worked_seconds": round(told["worked_seconds"]),
        "same": compare(chosen.calm, chosen.killed),
        "provenance": json.loads((chosen.killed / "metrics.json").read_text())["provenance"],
    }
    print(json.dumps(result, indent=1))
    if chosen.json:
        run_folder.write_json(chosen.json, result)
    sys.exit(not all(result["same"].values()))


if __name__ == "__main__":
    main()
