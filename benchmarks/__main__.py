"""``python -m benchmarks``: the published procedure and ours, side by side, as a table of ratios and a JSON file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.rows import MEASURED, PARTS, RESULTS, SMALL, Sizes, missing_results
from pairdiff_core.storage import provenance, write_json
from pairdiff_core.training import best_device


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def line(*cells: str) -> None:
    name, unit, ours, published, ratio, target, reached = cells
    print(f"{name:75} {unit:16} {ours:>8} {published:>10} {ratio:>7} {target:>14}  {reached}", flush=True)


def main() -> None:
    known = ", ".join((*PARTS, *MEASURED))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {known}; default: all")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to check that it runs; numbers mean nothing")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench.json", help="file to write")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - {*PARTS, *MEASURED}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: the parts are {known}")
    started, rows, sizes = time.perf_counter(), [], SMALL if chosen.small else Sizes()
    line("what", "unit", "ours", "published", "ratio", "target", "reached")
    for name in chosen.parts or (*PARTS, *MEASURED):
        if name in MEASURED and (missing := missing_results(name)):
            print(f"{name}: left out, because {', '.join(map(str, missing))} does not exist; see CONTRIBUTING.md")
            continue
        for row in PARTS[name](sizes) if name in PARTS else MEASURED[name]():
            rows.append(row)
            side = ("at least" if row.more_is_better else "at most") if row.absolute else "ratio"
            values = map(number, (row.ours, row.published, row.ratio))
            line(row.name, row.unit, *values, f"{side} {number(row.target)}", "yes" if row.reached else "NO")
    seconds = time.perf_counter() - started
    made_by = provenance("published sizes", 0, best_device()) | {"wall_seconds": seconds}
    write_json(chosen.json, {"rows": [row.described() for row in rows], "provenance": made_by})
    print(f"{chosen.json}: {sum(row.reached for row in rows)} of {len(rows)} reached, {seconds:.0f} s")


if __name__ == "__main__":
    main()
