"""Repeat a run, kill it several times at moments drawn in advance, and compare its results with the original's.

    python tests/killed_run.py runs/calm runs/killed --data DIR --json book/results/killed.json

This is not part of ``make test``: it takes as long as the run. If it is stopped, the same command continues.
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
from typing import Any

from pairdiff_core.pipeline import open_run
from pairdiff_core.profiles import STAGES
from pairdiff_core.storage import fingerprint, load_checkpoint, write_json

CHECKPOINTS = ("vqae", "tokens", "denoiser", "synthesis", "registration-real")  # one of each stage
DIFFERENT = {"provenance", "stages", "date"}  # fields that may differ between equal runs, like all seconds


def repeat(calm: Path, killed: Path, data: Path | None, kills: int, seed: int) -> dict[str, Any]:
    """Run CALM's commands in KILLED until all is done, with ``kills`` kills; returns the kills and the seconds."""
    run, log = open_run(calm), killed.parent / f"{killed.name}.kills.json"
    measured = json.loads((calm / "metrics.json").read_text())
    if log.exists():
        record = json.loads(log.read_text())
    else:  # draw moments early enough for all of them to come, even if the machine is faster this time
        whole, draw = 0.6 * measured["provenance"]["wall_seconds"], random.Random(seed)
        record = {"moments": sorted(draw.uniform(0, whole) for _ in range(kills)), "kills": [], "worked_seconds": 0.0}
    made_by = dict(zip(STAGES, (measured["stages"][name] for name in CHECKPOINTS), strict=True))
    for stage, by in (made_by | {"all": measured["provenance"]}).items():
        command = [sys.executable, "-m", "pairdiff_core", "run", stage, "--dataset", run.dataset, "--run", str(killed),
                   "--profile", run.profile.name, "--seed", str(run.seed)]  # fmt: skip
        command += ["--data", str(data)] if data else []
        while not _ended(command, {**os.environ, "OMP_NUM_THREADS": str(by["threads"])}, record, stage, log):
            pass
    return record


def _ended(command: list[str], environment: dict[str, str], record: dict[str, Any], stage: str, log: Path) -> bool:
    """Start the command, and kill it at the next moment; returns whether it ended by itself without an error."""
    process = subprocess.Popen(command, env=environment)
    before, started = record["worked_seconds"], time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            record["worked_seconds"] = before + time.monotonic() - started
            due = record["moments"] and record["worked_seconds"] >= record["moments"][0]
            if due:
                process.kill()
                record["kills"].append({"stage": stage, "second": round(record["moments"].pop(0))})
            write_json(log, record)
            if due:
                return False
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return True


def compare(calm: Path, killed: Path) -> dict[str, bool]:
    """Whether each checkpoint has the same bits in both folders, and ``metrics.json`` the same content."""
    same = {}
    for path in sorted(calm.glob("*.safetensors")):
        bits = [fingerprint(*load_checkpoint(folder / path.name)[0].values()) for folder in (calm, killed)]
        same[path.stem] = bits[0] == bits[1]
    measured = [_comparable(json.loads((folder / "metrics.json").read_text())) for folder in (calm, killed)]
    return same | {"metrics.json": measured[0] == measured[1]}


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key for key in value if key not in DIFFERENT and "seconds" not in key}
        return {key: _comparable(value[key]) for key in kept}
    return [_comparable(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calm", type=Path, help="a finished run with its metrics.json")
    parser.add_argument("killed", type=Path, help="folder of the repetition")
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args()
    record = repeat(chosen.calm, chosen.killed, chosen.data, chosen.kills, chosen.seed)
    result = {
        "kills": record["kills"],
        "worked_seconds": round(record["worked_seconds"]),
        "same": compare(chosen.calm, chosen.killed),
        "provenance": json.loads((chosen.killed / "metrics.json").read_text())["provenance"],
    }
    print(json.dumps(result, indent=1))
    if chosen.json:
        write_json(chosen.json, result)
    sys.exit(not all(result["same"].values()))


if __name__ == "__main__":
    main()
