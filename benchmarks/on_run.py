"""The command line of benchmarks that measure a finished run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairdiff_core.pipeline import Run, open_run
from pairdiff_core.storage import write_json


def command(name: str, description: str, measure: Callable[[Run], dict[str, Any]]) -> None:
    """Measure the run that the command line names, write the JSON file, and print "ours" next to "published"."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("--data", type=Path, help="folder of the real data")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    chosen = parser.parse_args()
    measured = measure(open_run(chosen.run, chosen.data))
    write_json(chosen.json, measured)
    for key, value in measured["ours"].items():
        print(f"{key:40} {value:8.4g} {measured['published'][key]:8.4g}")
