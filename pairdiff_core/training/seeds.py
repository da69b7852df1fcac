"""Random numbers that depend on their purpose, not on what was drawn before.

An interrupted run therefore continues with the same numbers, and several processes draw the same numbers as one.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(*purpose: int | str) -> int:
    """A seed, 0 to 2**31 - 1, for a purpose such as ``(seed, "warp", 17)``; each purpose has its own."""
    text = " ".join(map(str, purpose))
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 2**31


def generator(*purpose: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator on a device, seeded by :func:`seed_of`."""
    return torch.Generator(device).manual_seed(seed_of(*purpose))
