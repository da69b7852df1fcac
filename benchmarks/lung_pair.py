"""How a network registers one pair of real lungs: what the figures of chapters 9 and 10 draw.

    python -m benchmarks.lung_pair --data DIR --json book/results/lung_pair.json

The provided network with real motion registers the first validation pair, whose images are in lung250m.json, alone and
followed by the optimiser. The displacements are stored in hundredths of a voxel, on a grid a quarter as fine as the
images, as that of the velocities is. This takes a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pairdiff_core import fields
from pairdiff_core.pairs import pack_labels
from pairdiff_core.pipeline import find_model, load_model, open_run
from pairdiff_core.registration import register, score
from pairdiff_core.storage import fingerprint, provenance, write_json
from pairdiff_core.training import best_device

COARSER = 4  # voxels of the images per stored displacement
METHODS = {"real, motion": False, "real, motion + instance": True}  # whether the optimiser follows


def packed(displacement: torch.Tensor, size: Sequence[int]) -> dict[str, Any]:
    """Displacements (1, D, *spatial) in voxels as int16 (D, *size) in hundredths of them, two bytes a number."""
    hundredths = (100 * fields.resize_field(displacement, size)[0]).round().short()
    return pack_labels(hundredths.contiguous().view(torch.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lung_pair", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the real data; default: PAIRDIFF_DATA")
    parser.add_argument("--json", type=Path, default=Path("book/results/lung_pair.json"))
    chosen = parser.parse_args()
    run = open_run(find_model("lung250m-laptop"), chosen.data)
    network, pair = load_model(run.path, "registration-real-motion").model, run.validation[:1]
    errors, stored = {"before": score(pair)["tre_mm"]}, {}
    for name, instance in METHODS.items():
        found = register(pair, run.profile, network, instance=instance)
        errors[name] = score(pair, found)["tre_mm"]
        stored[name] = packed(found.displacement, [size // COARSER for size in pair.spatial])
    made_by = provenance("laptop", run.seed, best_device(), {"pair": fingerprint(pair.labels)})
    write_json(chosen.json, {"pair": pair.names[0], "tre_mm": errors, "displacement": stored, "provenance": made_by})
    print(errors)


if __name__ == "__main__":
    main()
