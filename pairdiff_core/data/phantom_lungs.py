"""Phantom lungs: vessel trees drawn from curves, breathed in and out with an exactly known displacement.

A *subject* has two lungs, each with an artery tree and a vein tree. As in the real pairs, the *fixed* image is breathed
in and the *moving* one breathed out. The curves are moved and drawn again, not the voxels, so both images are sharp and
the displacement is known everywhere. Landmarks are branch points.

Millimetres are voxels of the frame in :mod:`pairdiff_core.data.lung_frame`. Its axes run to the patient's left, to the
back, and upwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pairdiff_core import fields
from pairdiff_core.data.lung_frame import FRAME, lung_pair_set, pooling_factor
from pairdiff_core.pairs import PairSet

NODE_MM = 8  # voxel size of the displacement's grid, which is fine enough because it is smooth
NODES = tuple(size // NODE_MM for size in FRAME)
SHALLOW_MM, DEEP_MM = 18.0, 24.0  # largest displacement of a subject

MIDDLE = np.array([128.0, 108.0, 125.0])  # between the lungs
LUNG = np.array([54.0, 84.0, 112.0])  # half the extent of one lung
APART_MM = 60.0  # from MIDDLE to the middle of one lung
# centre and half the extent of the heart, a dent in both lungs, larger in the left one
HEART, HEART_SIZE = np.array([142.0, 70.0, 85.0]), np.array([44.0, 52.0, 62.0])
# where artery and vein enter a lung: mm from the midline, then along axes 1 and 2
ROOTS = ((26.0, 98.0, 150.0), (26.0, 116.0, 128.0))

DIVISIONS = 9  # a tree has 2**DIVISIONS - 1 branches
POINTS = 4  # a last branch ends at the mean of this many points
TIP_MM = 1.9  # radius of the last branches, dilated by a voxel as the real ones are
TAPER = 2**-0.2  # radius of a branch over that of its parent
LANDMARK_DIVISIONS = (2, 3, 4)  # their ends are landmarks: (4 + 8 + 16) per tree


class Tree(NamedTuple):
    """Branches as quadratic Bezier curves; start, control and end are (S, 3) in mm, division is (S,)."""

    start: np.ndarray
    control: np.ndarray
    end: np.ndarray
    division: np.ndarray


def lung_pairs(number: int, *, spatial: Sequence[int] = FRAME, seed: int = 0, first_subject: int = 0) -> PairSet:
    """Pairs of the phantom subjects ``first_subject`` to ``first_subject + number - 1``, one pair each.

    ``spatial`` is (256, 208, 256), or its half or quarter, where a voxel is vessel if any full-size voxel in it is; any
    other grid raises a DataError. A subject depends on its number and the seed only. Labels are 0 and 1, with
    displacement and landmarks; 1.5 to 3 % of the voxels at full size are vessel.
    """
    spatial, factor = tuple(spatial), pooling_factor(spatial)
    labels = torch.empty((number, 2, *spatial), dtype=torch.uint8)
    displacement = torch.empty((number, 3, *spatial))
    landmarks = []
    for index in range(number):
        tree = _grow_trees(np.random.default_rng((seed, first_subject + index)))
        motion = _breathe_out(torch.Generator().manual_seed((seed << 20) + first_subject + index))
        displacement[index] = fields.resize_field(motion, spatial)[0]
        centres, radii = _along(tree)
        labels[index, 0] = _draw(centres, radii, factor)
        labels[index, 1] = _draw(_move(centres, motion), radii, factor)
        branching = tree.end[np.isin(tree.division, LANDMARK_DIVISIONS)]
        points = torch.from_numpy(np.stack([branching, _move(branching, motion)], 1)).float()  # (K, 2, 3)
        landmarks.append(fields.resize_points(points, FRAME, spatial))
    people = [f"LUNGS_{first_subject + index:04d}" for index in range(number)]
    return lung_pair_set(labels, people, landmarks, displacement)


def lung_correspondences(subject: int, seed: int = 0) -> torch.Tensor:
    """End points of the branches of a phantom subject, float (K, 2, 3) in mm, breathed in and breathed out."""
    ends = _grow_trees(np.random.default_rng((seed, subject))).end
    motion = _breathe_out(torch.Generator().manual_seed((seed << 20) + subject))
    return torch.from_numpy(np.stack([ends, _move(ends, motion)], 1)).float()


def _breathe_out(generator: torch.Generator) -> torch.Tensor:
    """Displacement from breathed in to breathed out, float (1, 3, *NODES), in voxels of the node grid."""
    grid = fields.resize_points(fields.identity_grid(NODES).movedim(0, -1), NODES, FRAME).movedim(-1, 0)
    across, back, _ = grid - torch.from_numpy(MIDDLE).float().reshape(3, 1, 1, 1)
    low = (1 - grid[2] / FRAME[2]).clamp(0, 1)
    depth, shift = torch.rand(2, generator=generator).tolist()
    depth = SHALLOW_MM + (DEEP_MM - SHALLOW_MM) * depth
    # relative to the depth: the base rises and the apex sinks, the chest wall moves towards the spine and the middle
    towards = (-0.2 * across / MIDDLE[0], -0.3 * back / MIDDLE[1], 1.2 * low - 0.45 + 0.3 * shift)
    own = fields.random_velocity(1, NODES, amplitude=0.1, smoothness=8, generator=generator)
    velocity = torch.stack(towards)[None] + own
    for _ in range(2):  # nearly linear, so twice is enough to reach the depth within a few percent
        velocity = velocity * (depth / NODE_MM / fields.exponentiate(velocity).norm(dim=1).max())
    return fields.exponentiate(velocity)


def _move(points: np.ndarray, displacement: torch.Tensor) -> np.ndarray:
    """Points (M, 3) in mm, moved by a displacement in voxels of the node grid."""
    at_nodes = fields.resize_points(torch.from_numpy(points).float(), FRAME, NODES)
    return points + NODE_MM * fields.sample_at(displacement[0], at_nodes).numpy()


def _inside(points: np.ndarray, side: int, size: np.ndarray) -> np.ndarray:
    """Whether points (M, 3) in mm lie in the right (side -1) or left (1) lung of a chest of relative ``size`` (3,)."""
    across, back, up = ((points - MIDDLE - (side * APART_MM, 0, 0)) / (LUNG * size)).T  # -1 to 1
    from_axis = across**2 + back**2
    wall = from_axis < 1 - ((up + 0.2) / 1.2).clip(0, 1) ** 2  # a dome above, a cylinder below
    diaphragm = up > -0.9 + 0.35 * (1 - from_axis) - 0.3 * back  # arched, and lower at the back
    heart = (((points - HEART) / HEART_SIZE) ** 2).sum(1) < 1
    return wall & diaphragm & ~heart & (np.abs(points[:, 0] - MIDDLE[0]) > 14)


def _grow_trees(random: np.random.Generator) -> Tree:
    """The four trees of a subject, each grown from the hilum into points spread evenly over its lung."""
    number = POINTS * 2 ** (DIVISIONS - 1)
    size = np.exp(0.05 * random.standard_normal(3))
    trees = []
    for side in (-1, 1):
        for beside, *root in ROOTS:
            box = MIDDLE + (side * APART_MM, 0, 0) + random.uniform(-1, 1, (8 * number, 3)) * LUNG * size
            points = box[_inside(box, side, size)][:number]
            start = np.array([MIDDLE[0] + side * beside, *root]) + 4 * random.standard_normal(3)
            trees.append(_grow(points, start, np.array([side, 0.0, 0.0]), random))
    return Tree(*(np.concatenate(parts) for parts in zip(*trees, strict=True)))


def _grow(points: np.ndarray, start: np.ndarray, direction: np.ndarray, random: np.random.Generator) -> Tree:
    """A tree from ``start`` (3,), first along ``direction`` (3,), into ``points`` (POINTS * 2**(DIVISIONS - 1), 3).

    Each branch ends about half-way to the mean of its points. They are then split across their longest extent, and each
    half gets a branch (after Wang et al., IEEE Trans Biomed Eng 1992, and Tawhai et al., Ann Biomed Eng 2000).
    """
    clouds, starts, directions, branches = points[None], start[None], direction[None], []
    for division in range(DIVISIONS):  # all branches of a division at once: clouds (B, P, 3), the rest (B, 3)
        middle = clouds.mean(1)
        last = division == DIVISIONS - 1
        ends = starts + (1 if last else random.uniform(0.4, 0.6, (len(starts), 1))) * (middle - starts)
        lengths = np.linalg.norm(ends - starts, axis=1, keepdims=True)
        controls = starts + 0.35 * lengths * directions
        branches.append(Tree(starts, controls, ends, np.full(len(starts), division)))
        if not last:
            centred = clouds - middle[:, None]
            longest = np.linalg.eigh(centred.swapaxes(1, 2) @ centred)[1][:, :, -1:]  # (B, 3, 1)
            order = (centred @ longest).argsort(1)  # (B, P, 1)
            clouds = np.take_along_axis(clouds, order, 1).reshape(2 * len(clouds), -1, 3)  # -> (2B, P / 2, 3)
            starts = ends.repeat(2, axis=0)
            directions = ((ends - branches[-1].start) / lengths).repeat(2, axis=0)
    return Tree(*(np.concatenate(parts) for parts in zip(*branches, strict=True)))


def _along(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Points along all branches, half a radius apart, (M, 3) in mm, and the radius there, (M,) in mm."""
    radius = TIP_MM * TAPER ** (tree.division - DIVISIONS + 1.0)
    parent = np.where(tree.division == 0, radius, radius / TAPER)
    number = np.ceil(np.linalg.norm(tree.end - tree.start, axis=1) / (0.5 * radius)).astype(int) + 2
    branch = np.repeat(np.arange(len(number)), number)
    step = np.arange(len(branch)) - np.repeat(number.cumsum() - number, number)
    t = (step / (number[branch] - 1))[:, None]  # 0 at the start of a branch, 1 at its end
    start, control, end, _ = (part[branch] for part in tree)
    centres = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    return centres, (1 - t[:, 0]) * parent[branch] + t[:, 0] * radius[branch]


def _draw(centres: np.ndarray, radii: np.ndarray, factor: int) -> torch.Tensor:
    """Balls at ``centres`` (M, 3) in mm, as 1 in a volume ``factor`` times coarser than the frame, uint8."""
    volume = np.zeros([size // factor for size in FRAME], np.uint8)
    for part in np.array_split(radii.argsort(), 1 + len(radii) // 500):  # balls of similar size, a few MB at a time
        reach = int(np.ceil(radii[part].max()))
        near = np.moveaxis(np.indices([2 * reach + 3] * 3), 0, -1).reshape(-1, 3) - reach - 1
        near = near[(near**2).sum(1) <= (reach + 0.9) ** 2].astype(np.int32)  # voxels around the nearest one
        nearest = np.rint(centres[part]).astype(np.int32)
        offset = (nearest - centres[part]).astype(np.float32)
        squared = sum((offset[:, None, d] + near[None, :, d].astype(np.float32)) ** 2 for d in range(3))
        ball, voxel = np.nonzero(squared <= radii[part, None] ** 2)
        index = nearest[ball] + near[voxel]
        index = index[((index >= 0) & (index < FRAME)).all(1)] // factor
        volume[tuple(index.T)] = 1
    return torch.from_numpy(volume)
