"""Where a result comes from: code, settings, versions, machine and data."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import pairdiff_core

PACKAGE = Path(pairdiff_core.__file__).parent


def provenance(
    profile_name: str, seed: int, device: str | torch.device, data: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Where a result comes from, as a dictionary for JSON: everything but the wall time, which the caller knows.

    Args:
        profile_name: name of the profile.
        seed: seed of the run.
        device: torch device that computed.
        data: hashes of the data that was read, by name.
    """
    packages = {package: version(package) for package in ("monai", "numpy")}
    return {
        "commit": commit(),
        "profile": profile_name,
        "seed": seed,
        "versions": {
            "pairdiff": pairdiff_core.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # with the build, which the package's own version may leave out
            **packages,
        },
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "data": dict(data or {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def code_hash() -> str:
    """SHA-256 of this package's source, so that measurements made by other code are not reused."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """Commit of the running code, with "+changes" at the end if it was edited; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):  # installed somewhere inside another project's repository
            return "unknown"
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    """A readable name of the device, such as "NVIDIA H200" or "AMD EPYC (AVX2)".

    A CPU's name includes the instruction set that PyTorch uses, because makers give one name to very different CPUs.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
