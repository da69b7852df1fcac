"""``pairdiff info``: the installed versions, devices, data and models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairdiff_core import pipeline
from pairdiff_core.data import lung250m, oasis
from pairdiff_core.profiles import PROFILES, get_profile
from pairdiff_core.storage import provenance
from pairdiff_core.training import best_device, fast_in_bfloat16


def describe() -> dict[str, str]:
    """One line of text each for versions, device, profiles, data sets, pretrained models and run folder."""
    device, made_by = best_device(), provenance("", 0, best_device())
    bits = "bfloat16 where a profile allows it" if fast_in_bfloat16(device) else "32 bit throughout"
    runs = Path(os.environ.get("PAIRDIFF_RUNS", "runs"))
    disk = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    versions = ", ".join(f"{name} {version}" for name, version in made_by["versions"].items())
    return {
        "versions": f"{versions}, commit {made_by['commit']}",
        "device": f"{device}, {made_by['device']}, {made_by['threads']} threads, {bits}",
        "profiles": f"{', '.join(PROFILES[2])}; chosen: {_or_why_not(lambda: get_profile().name)}",
        "oasis2d": _or_why_not(oasis.find_oasis),
        "lung250m": _or_why_not(lung250m.find_lung250m),
        "models": ", ".join(map(str, pipeline.pretrained_models())) or "none",
        "runs": f"{runs} ({shutil.disk_usage(disk).free / 1e9:.1f} GB free)",
    }


def _or_why_not(find: Callable[[], Any]) -> str:
    try:
        return str(find())
    except ValueError as error:
        return f"none: {error}"
